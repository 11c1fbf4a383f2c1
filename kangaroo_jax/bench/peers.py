"""The demo on held-out prompts: Kangaroo, plain decoding, and transformers' greedy `generate` (torch), interleaved.

    python -m kangaroo_jax.bench peers

Same weights, prompts, dtype (float32) and threads. Prints a line per prompt, the medians, and the plain step against
the memory's measured bandwidth. Needs torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
from absl import flags

from kangaroo_jax import DraftConfig, compilation_cache, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.bench.prompts import held_out_prompts
from kangaroo_jax.bench.roofline import cache_bytes, plain_step_seconds, read_bandwidth, step_bytes
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.host_loop import Generation
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", str(demo.MODEL), "Target.")
_ADAPTER = flags.DEFINE_string("adapter", str(demo.ADAPTER), "Adapter.")
_PROMPTS = flags.DEFINE_integer("prompts", 10, "Held-out prompts.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs of each method per prompt, interleaved; the median counts.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", demo.DRAFT.max_draft_len, "gamma.")
_THRESHOLD = flags.DEFINE_float("threshold", demo.DRAFT.threshold, "eta.")

# Prompt ids -> new ids, seconds without compilation, mean accept length.
Method = Callable[[list[int]], tuple[list[int], float, float]]


def main() -> None:
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "torch is not installed, and transformers' models need it; pip install -r requirements-parity.txt"
        )
    compilation_cache.enable()
    target = load_target(_MODEL.value, "float32")
    adapter = load_adapter(_ADAPTER.value, target)
    draft = DraftConfig(None, _MAX_DRAFT_LEN.value, _THRESHOLD.value)
    threads = os.cpu_count() or 1
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in ("jax", "torch", "transformers")]
    device = jax.devices()[0].device_kind
    print(
        f"{_cpu_name()}, {threads} threads, JAX on {device}, Python {platform.python_version()}, {', '.join(versions)}"
    )
    print(f"gamma {draft.max_draft_len}, eta {draft.threshold}, {_MAX_NEW_TOKENS.value} new tokens, float32, greedy")
    _compare(_methods(target, adapter, draft, threads), target)
    _print_step(target)


def _methods(target: Target, adapter: TrainedAdapter, draft: DraftConfig, threads: int) -> dict[str, Method]:
    def ours(out: Generation) -> tuple[list[int], float, float]:
        return out.tokens[0], out.seconds.prefill + out.seconds.decode, out.mean_accept_length

    count = _MAX_NEW_TOKENS.value
    return {
        "kangaroo": lambda ids: ours(generate(target, adapter, [ids], count, draft, eos_token_ids=())),
        "plain": lambda ids: ours(generate_plain(target, [ids], count, eos_token_ids=())),
        "transformers": _transformers(target, threads),
    }


def _compare(methods: dict[str, Method], target: Target) -> None:
    """Prints a row per prompt: the median speed of each method, and whether all tokens are the same."""
    print(f"{'prompt':28}" + "".join(f"{name:>14}" for name in methods) + f"{'accept':>8}{'speed-up':>10}  identical")
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
    for i, name in enumerate(("kangaroo", "plain")):
        ratio = statistics.median(row[i] / row[2] for row in rows)
        print(f"{name} over transformers, median: {ratio:.2f}")


def _row(name: str, values: list[float]) -> str:
    *speeds, accept, speedup = values
    return f"{name:28}" + "".join(f"{speed:8.1f} tok/s" for speed in speeds) + f"{accept:8.2f}{speedup:10.2f}"


def _transformers(target: Target, threads: int) -> Method:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(target.name, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def run(ids: list[int]) -> tuple[list[int], float, float]:
        prompt = torch.tensor([ids])
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_MAX_NEW_TOKENS.value,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist(), time.perf_counter() - start, 1.0

    return run


def _print_step(target: Target) -> None:
    weights = step_bytes(target)
    bandwidth = read_bandwidth(weights)
    print(f"\nread bandwidth of a {weights / 1e6:.1f} MB working set: {bandwidth / 1e9:.1f} GB/s")
    print(f"{'plain step, 256 valid tokens':32}{'ms':>8}{'MB read':>10}{'GB/s':>8}{'of bandwidth':>14}")
    for capacity in (512, 4096):
        seconds = plain_step_seconds(target, capacity, 256)
        read = weights + cache_bytes(target, capacity)
        print(
            f"{f'cache of {capacity}':32}{seconds * 1e3:8.3f}{read / 1e6:10.1f}{read / seconds / 1e9:8.1f}"
            f"{read / seconds / bandwidth:14.0%}"
        )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
