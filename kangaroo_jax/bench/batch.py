"""Batches: Kangaroo beside plain decoding at the same batch size, and slots that are refilled beside fixed batches.

    python -m kangaroo_jax.bench batch

Held-out prompts, greedy; EOS ends nothing. Runs are interleaved in one process; their medians count prefill, and not
compilation. "Identical" counts the answers whose tokens are plain decoding's: at the smallest batch size, then in fixed
batches.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
from absl import flags

from kangaroo_jax import compilation_cache, demo, generate_many, load_adapter, load_target
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.prompts import held_out_functions
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.engine.requests import Answer
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", str(demo.MODEL), "Target.")
_ADAPTER = flags.DEFINE_string("adapter", str(demo.ADAPTER), "Adapter.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "4", "8"], "Sequences on the device; the last is refilled.")
_PROMPTS = flags.DEFINE_integer("prompts", 16, "Held-out prompts of the comparison with plain decoding.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt there.")
_REQUESTS = flags.DEFINE_integer("requests", 64, "Prompts of the ragged workload.")
_SHORTEST = flags.DEFINE_integer("shortest", 16, "New tokens of its shortest answer.")
_LONGEST = flags.DEFINE_integer("longest", 256, "New tokens of its longest.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs of each way.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", None, "gamma; what the adapter's decode.json says if absent.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "eta; as above.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")

Way = Callable[[], list[Answer]]


def main() -> None:
    if not _BATCH_SIZES.value or not all(value.isdecimal() and int(value) > 0 for value in _BATCH_SIZES.value):
        raise InputError(f"--batch_sizes: expected whole numbers above 0, found {','.join(_BATCH_SIZES.value or [])!r}")
    for flag in (_PROMPTS, _REQUESTS, _SHORTEST, _RUNS):
        if flag.value < 1:
            raise InputError(f"--{flag.name}: expected at least 1, found {flag.value}")
    if _LONGEST.value < _SHORTEST.value:
        raise InputError(f"--longest: expected at least --shortest ({_SHORTEST.value}), found {_LONGEST.value}")
    sizes = [int(value) for value in _BATCH_SIZES.value]
    compilation_cache.enable()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    target = load_target(_MODEL.value, dtype)
    adapter = load_adapter(_ADAPTER.value, target)
    given = {"max_draft_len": _MAX_DRAFT_LEN.value, "threshold": _THRESHOLD.value}
    draft = dataclasses.replace(adapter.draft, **{name: value for name, value in given.items() if value is not None})
    print(machine.describe())
    print(f"{_MODEL.value}, {draft}, {dtype}, greedy")
    _compare_with_plain(target, adapter, draft, sizes)
    _compare_with_fixed(target, adapter, draft, sizes[-1])


def _compare_with_plain(target: Target, adapter: TrainedAdapter, draft: DraftConfig, sizes: list[int]) -> None:
    requests = _requests(_PROMPTS.value, [_MAX_NEW_TOKENS.value] * _PROMPTS.value)
    print(f"\n{len(requests)} prompts, {_MAX_NEW_TOKENS.value} new tokens each, tokens per second of the whole batch")
    print(f"{'batch':>5}{'Kangaroo':>10}{'plain':>10}{'speed-up':>10}{'accept':>8}{'identical':>12}")
    truth = None
    for size in sizes:
        ways = [_fixed(target, which, requests, size, draft) for which in (adapter, None)]
        (ours, our_seconds), (plain, plain_seconds) = _measure(ways)
        truth = truth or plain
        tokens = sum(len(answer.tokens) for answer in ours)
        accept = statistics.mean(length for answer in ours for length in answer.accept_lengths)
        print(
            f"{size:5}{tokens / our_seconds:10.1f}{tokens / plain_seconds:10.1f}{plain_seconds / our_seconds:10.2f}"
            f"{accept:8.2f}{_identical(ours, truth):>12}",
            flush=True,
        )


def _compare_with_fixed(target: Target, adapter: TrainedAdapter, draft: DraftConfig, size: int) -> None:
    lengths = np.random.default_rng(0).integers(_SHORTEST.value, _LONGEST.value + 1, _REQUESTS.value).tolist()
    requests = _requests(_REQUESTS.value, lengths)
    print(
        f"\n{len(requests)} prompts, answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} together), "
        f"batch {size}, tokens per second"
    )
    print(f"{'':10}{'refilled':>10}{'fixed':>10}{'ratio':>8}{'identical':>12}")
    kinds = {"plain": None, "Kangaroo": adapter}
    ways = [make(target, which, requests, size, draft) for which in kinds.values() for make in (_fixed, _refilled)]
    results = _measure(ways)
    truth = results[0][0]
    for name, (_, fixed), (ours, refilled) in zip(kinds, results[::2], results[1::2], strict=True):
        print(
            f"{name:10}{sum(lengths) / refilled:10.1f}{sum(lengths) / fixed:10.1f}{fixed / refilled:8.2f}"
            f"{_identical(ours, truth):>12}"
        )


def _requests(count: int, lengths: Sequence[int]) -> list[Request]:
    prompts = held_out_functions(count)
    return [Request(prompts[i % len(prompts)], length) for i, length in enumerate(lengths)]


def _refilled(
    target: Target, adapter: TrainedAdapter | None, requests: list[Request], size: int, draft: DraftConfig
) -> Way:
    def run() -> list[Answer]:
        answers = generate_many(target, adapter, requests, size, draft=draft, eos_token_ids=())
        return sorted(answers, key=lambda answer: answer.id)

    return run


def _fixed(
    target: Target, adapter: TrainedAdapter | None, requests: list[Request], size: int, draft: DraftConfig
) -> Way:
    """Batch after batch, each waiting for its slowest sequence."""
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    ways = [_refilled(target, adapter, batch, size, draft) for batch in batches]
    return lambda: list(itertools.chain.from_iterable(way() for way in ways))


def _measure(ways: Sequence[Way]) -> list[tuple[list[Answer], float]]:
    """The answers of each, and the median of its seconds without compilation."""
    results: list[list[list[Answer]]] = [[] for _ in ways]
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(_RUNS.value):
        for way, answers, times in zip(ways, results, seconds, strict=True):
            start = time.perf_counter()
            answers.append(way())
            compiling = sum(answer.compile_seconds for answer in answers[-1])
            times.append(time.perf_counter() - start - compiling)
    return [(answers[0], statistics.median(times)) for answers, times in zip(results, seconds, strict=True)]


def _identical(answers: list[Answer], truth: list[Answer]) -> str:
    same = sum(a.tokens == b.tokens for a, b in zip(answers, truth, strict=True))
    return f"{same} of {len(truth)}"
