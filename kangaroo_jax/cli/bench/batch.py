"""Batches: Kangaroo beside plain decoding at the same batch size, and slots that are refilled beside fixed batches.

    python -m kangaroo_jax.bench batch

    python -m kangaroo_jax.bench batch --model=smollm2-135m --requests=0

Kangaroo drafts with gamma and eta in all rounds ("fixed"), and with sequences that decide how far ("deciding"), by the
costs of the adapter's decode.json, or else predicted ones. Held-out prompts, greedy; EOS ends nothing. Runs are
interleaved in one process; their medians count prefill, and not compilation. "Identical" counts the answers whose
tokens are plain decoding's: at the first batch size, then in fixed batches.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax import compilation_cache
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.batch_speed import (
    compare_with_fixed,
    compare_with_plain,
    ragged_lengths,
    requests_of,
    ways_of_drafting,
)
from kangaroo_jax.bench.benchmark_prompts import held_out_functions
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.errors import InputError

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", ["1", "2", "4", "8", "16"], "Sequences on the device; the last is refilled."
)
_PROMPTS = shared_flags.define_prompt_count(16)
_MAX_NEW_TOKENS = shared_flags.define_max_new_tokens()
_REQUESTS = flags.DEFINE_integer("requests", 64, "Prompts with answers of different lengths; 0: none.")
_SHORTEST = flags.DEFINE_integer("shortest", 16, "New tokens of the shortest of those answers.")
_LONGEST = flags.DEFINE_integer("longest", 256, "New tokens of the longest.")
_RUNS = shared_flags.define_runs()
_DRAFT = shared_flags.define_draft()
_DTYPE = shared_flags.define_dtype()


def main() -> None:
    sizes = shared_flags.counts(_BATCH_SIZES)
    shared_flags.check_positive(_PROMPTS, _MAX_NEW_TOKENS, _SHORTEST, _RUNS)
    if _REQUESTS.value < 0:
        raise InputError(f"--requests: expected at least 0, found {_REQUESTS.value}")
    if _LONGEST.value < _SHORTEST.value:
        raise InputError(f"--longest: expected at least --shortest ({_SHORTEST.value}), found {_LONGEST.value}")
    _DRAFT.given()  # names a value out of range before anything is loaded
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value)
    dtype = str(target.model.dtype)
    adapter = load_adapter_of(target, _ADAPTER.value)
    draft = _DRAFT.over(adapter.draft)
    print(machine.describe())
    print(f"{target.name}, {draft}, {dtype}, greedy")

    count, length = _PROMPTS.value, _MAX_NEW_TOKENS.value
    requests = requests_of(_prompts(target, count, length), [length] * count)
    print(f"\n{len(requests)} prompts, {length} new tokens each, tokens per second of the complete batch")
    ways = ways_of_drafting(draft)
    print(
        f"{'batch':>5}{'plain':>8}"
        + "".join(f"{name:>10}{'speed-up':>10}{'accept':>8}{'identical':>11}" for name in ways)
    )
    for row in compare_with_plain(target, adapter, ways, requests, sizes, _RUNS.value):
        print(
            f"{row.batch_size:5}{row.tokens / row.plain_seconds:8.1f}"
            + "".join(
                f"{row.tokens / way.seconds:10.1f}{row.plain_seconds / way.seconds:10.2f}{way.mean_accept_length:8.2f}"
                f"{f'{way.identical} of {row.answers}':>11}"
                for way in row.ways.values()
            ),
            flush=True,
        )

    if _REQUESTS.value:
        _print_refilled(target, adapter, draft, sizes[-1])


def _print_refilled(target: Target, adapter: TrainedAdapter, draft: DraftConfig, size: int) -> None:
    """Slots that are refilled, beside fixed batches."""
    lengths = ragged_lengths(_REQUESTS.value, _SHORTEST.value, _LONGEST.value)
    requests = requests_of(_prompts(target, _REQUESTS.value, max(lengths)), lengths)
    print(
        f"\n{len(requests)} prompts, answers of {min(lengths)} to {max(lengths)} tokens ({sum(lengths)} together), "
        f"batch {size}, tokens per second"
    )
    print(f"{'':10}{'refilled':>10}{'fixed':>10}{'ratio':>8}{'identical':>12}")
    for row in compare_with_fixed(target, adapter, draft, requests, size, _RUNS.value):
        print(
            f"{row.name:10}{row.tokens / row.refilled_seconds:10.1f}{row.tokens / row.fixed_seconds:10.1f}"
            f"{row.fixed_seconds / row.refilled_seconds:8.2f}{f'{row.identical} of {row.answers}':>12}"
        )


def _prompts(target: Target, count: int, max_new_tokens: int) -> list[list[int]]:
    texts = shared_flags.texts_for(target, lambda: held_out_functions(count), count)
    return shared_flags.encoded_prompts(target, texts, max_new_tokens)
