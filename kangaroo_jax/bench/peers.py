"""The demo on held-out prompts: Kangaroo, plain decoding, and transformers' `generate` (torch) in three modes.

    python -m kangaroo_jax.bench peers

The modes are greedy, early exit (`assistant_early_exit`, at the adapter's exit layer) and prompt lookup
(`prompt_lookup_num_tokens`). Same weights, prompts, dtype (float32) and threads, interleaved. Prints a line per prompt,
the medians, and the plain step against the machine's read bandwidth. Needs torch.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from absl import flags

from kangaroo_jax import DraftConfig, compilation_cache, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.prompts import held_out_prompts, held_out_tokens
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.host_loop import Generation
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", str(demo.MODEL), "Target.")
_ADAPTER = flags.DEFINE_string("adapter", str(demo.ADAPTER), "Adapter.")
_PROMPTS = flags.DEFINE_integer("prompts", 10, "Held-out prompts.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs of each method per prompt, interleaved; the median counts.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", None, "gamma; what the adapter's decode.json says if absent.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "eta; as above.")

# Prompt ids -> new ids, seconds without compilation, mean accept length.
Method = Callable[[list[int]], tuple[list[int], float, float]]


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError("torch is not installed, and transformers' models need it; pip install -e '.[parity]'")
    compilation_cache.enable()
    target = load_target(_MODEL.value, "float32")
    adapter = load_adapter(_ADAPTER.value, target)
    given = {"max_draft_len": _MAX_DRAFT_LEN.value, "threshold": _THRESHOLD.value}
    draft = dataclasses.replace(adapter.draft, **{name: value for name, value in given.items() if value is not None})
    threads = os.cpu_count() or 1
    print(machine.describe("torch", "transformers"))
    print(f"{draft}, {_MAX_NEW_TOKENS.value} new tokens, float32, greedy")
    _compare(_methods(target, adapter, draft, threads), target)
    _print_step(target, adapter)


def _methods(target: Target, adapter: TrainedAdapter, draft: DraftConfig, threads: int) -> dict[str, Method]:
    def ours(out: Generation) -> tuple[list[int], float, float]:
        return out.tokens[0], out.seconds.prefill + out.seconds.decode, out.mean_accept_length

    count = _MAX_NEW_TOKENS.value
    return {
        "kangaroo": lambda ids: ours(generate(target, adapter, [ids], count, draft, eos_token_ids=())),
        "plain": lambda ids: ours(generate_plain(target, [ids], count, eos_token_ids=())),
        **_transformers(target, adapter, threads),
    }


def _compare(methods: dict[str, Method], target: Target) -> None:
    """Prints a row per prompt: the median speed of each method, and whether all tokens are the same."""
    print("tokens per second (accept: mean accept length; speed-up: Kangaroo over plain)")
    print(f"{'prompt':24}" + "".join(f"{name:>14}" for name in methods) + f"{'accept':>8}{'speed-up':>10}  identical")
    rows, identical = [], 0
    for name, prompt in held_out_prompts(_PROMPTS.value).items():
        ids = target.tokenizer.encode(prompt, verbose=False)
        seconds: dict[str, list[float]] = {method: [] for method in methods}
        results = {method: call(ids) for method, call in methods.items()}  # warms up
        for _ in range(_RUNS.value):
            for method, call in methods.items():
                seconds[method].append(call(ids)[1])
        speeds = [_MAX_NEW_TOKENS.value / statistics.median(times) for times in seconds.values()]
        same = len({tuple(tokens) for tokens, _, _ in results.values()}) == 1
        identical += same
        rows.append([*speeds, results["kangaroo"][2], speeds[0] / speeds[1]])
        print(_row(name, rows[-1]) + f"  {'yes' if same else 'no'}", flush=True)
    medians = [statistics.median(column) for column in zip(*rows, strict=True)]
    print(_row("median", medians) + f"  {identical} of {len(rows)}")
    names = list(methods)
    for i, name in enumerate(names[:2]):
        ratios = [statistics.median(row[i] / row[j] for row in rows) for j in range(2, len(names))]
        over = ", ".join(f"{ratio:.2f} over {peer}" for ratio, peer in zip(ratios, names[2:], strict=True))
        print(f"{name}, median of ratios: {over}")


def _row(name: str, values: list[float]) -> str:
    *speeds, accept, speedup = values
    return f"{name:24}" + "".join(f"{speed:14.1f}" for speed in speeds) + f"{accept:8.2f}{speedup:10.2f}"


def _transformers(target: Target, adapter: TrainedAdapter, threads: int) -> dict[str, Method]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(target.name, dtype=torch.float32, trust_remote_code=False)
    model.generation_config.eos_token_id = None

    def method(**mode: Any) -> Method:
        def run(ids: list[int]) -> tuple[list[int], float, float]:
            prompt = torch.tensor([ids])
            start = time.perf_counter()
            out = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=_MAX_NEW_TOKENS.value,
                do_sample=False,
                pad_token_id=0,
                **mode,
            )
            return out[0, len(ids) :].tolist(), time.perf_counter() - start, 1.0

        return run

    return {
        "transformers": method(),
        "early exit": method(assistant_early_exit=adapter.exit_layer),
        "prompt lookup": method(prompt_lookup_num_tokens=10),
    }


def _print_step(target: Target, adapter: TrainedAdapter) -> None:
    """The plain step in caches of two sizes: if it copied its cache, the larger would show it."""
    valid = 256
    print(f"\n{f'plain step, {valid} valid tokens':32}{'ms':>8}{'MB read':>10}{'GB/s':>8}{'of read bandwidth':>20}")
    for capacity in (512, 4096):
        tokens = held_out_tokens(target, valid)[None]
        context = parts.Context(target.model, adapter.model, adapter.exit_layer or 1, tokens, capacity)
        seconds, read = parts.plain_step_seconds(context), context.bytes.plain_step
        bandwidth = machine.read_bandwidth(read, target.model.dtype)
        print(
            f"{f'cache of {capacity}':32}{seconds * 1e3:8.3f}{read / 1e6:10.1f}{read / seconds / 1e9:8.1f}"
            f"{f'{read / seconds / bandwidth:.0%} of {bandwidth / 1e9:.1f}':>20}"
        )
