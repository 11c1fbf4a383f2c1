"""The demo on held-out prompts: Kangaroo, plain decoding, and transformers' greedy `generate` (torch), interleaved.

    python -m kangaroo_jax.bench peers

Same weights, prompts, dtype (float32) and threads. Prints a line per prompt, the medians, and the plain step against
the memory's measured bandwidth. transformers is left out, and said to be, where torch is not installed.
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
import numpy as np
from absl import flags

from kangaroo_jax import DraftConfig, compilation_cache, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.bench.prompts import held_out_prompts
from kangaroo_jax.bench.roofline import cache_bytes, plain_step_seconds, read_bandwidth, step_bytes
from kangaroo_jax.checkpoint.huggingface import Target

_MODEL = flags.DEFINE_string("model", str(demo.MODEL), "Target.")
_ADAPTER = flags.DEFINE_string("adapter", str(demo.ADAPTER), "Adapter.")
_PROMPTS = flags.DEFINE_integer("prompts", 10, "Held-out prompts.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_RUNS = flags.DEFINE_integer("runs", 5, "Timed runs of each method per prompt, interleaved; the median counts.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", DraftConfig.max_draft_len, "gamma.")
_THRESHOLD = flags.DEFINE_float("threshold", DraftConfig.threshold, "eta.")

Method = Callable[[list[int]], tuple[list[int], float]]


def main(argv: list[str]) -> None:
    del argv
    compilation_cache.enable()
    target = load_target(_MODEL.value, "float32")
    adapter = load_adapter(_ADAPTER.value, target)
    draft = DraftConfig(None, _MAX_DRAFT_LEN.value, _THRESHOLD.value)
    accepted: list[float] = []

    def kangaroo(ids: list[int]) -> tuple[list[int], float]:
        out = generate(target, adapter, [ids], _MAX_NEW_TOKENS.value, draft, eos_token_ids=())
        accepted.append(out.mean_accept_length)
        return out.tokens[0], out.seconds.prefill + out.seconds.decode

    def plain(ids: list[int]) -> tuple[list[int], float]:
        out = generate_plain(target, [ids], _MAX_NEW_TOKENS.value, eos_token_ids=())
        return out.tokens[0], out.seconds.prefill + out.seconds.decode

    methods: dict[str, Method] = {"kangaroo": kangaroo, "plain": plain}
    threads = os.cpu_count() or 1
    if importlib.util.find_spec("torch") is not None:
        methods["transformers"] = _transformers(target, threads)
    else:
        print("torch is not installed: transformers is left out")

    print(f"{platform.processor() or platform.machine()}, {threads} threads, {jax.devices()[0].device_kind}, {_versions()}")
    print(f"gamma {draft.max_draft_len}, eta {draft.threshold}, {_MAX_NEW_TOKENS.value} new tokens, medians of {_RUNS.value}")
    names = list(methods)
    print(f"{'prompt':32}" + "".join(f"{name + ' tok/s':>20}" for name in names) + f"{'accept':>8}{'speed-up':>10}  identical")
    table: dict[str, list[float]] = {name: [] for name in names}
    speedups, identical, accepts = [], [], []
    for name, prompt in held_out_prompts(_PROMPTS.value).items():
        ids = target.tokenizer.encode(prompt, verbose=False)
        seconds, tokens = _interleaved(methods, ids)
        same = all(tokens[other] == tokens["plain"] for other in names)
        speed = {method: _MAX_NEW_TOKENS.value / statistics.median(seconds[method]) for method in names}
        speedups.append(speed["kangaroo"] / speed["plain"])
        accepts.append(accepted[-1])
        identical.append(same)
        for method in names:
            table[method].append(speed[method])
        print(
            f"{name:32}"
            + "".join(f"{speed[method]:20.1f}" for method in names)
            + f"{accepts[-1]:8.2f}{speedups[-1]:10.2f}  {'yes' if same else 'no'}",
            flush=True,
        )
    print(
        f"{'median':32}"
        + "".join(f"{statistics.median(table[name]):20.1f}" for name in names)
        + f"{statistics.median(accepts):8.2f}{statistics.median(speedups):10.2f}  {sum(identical)} of {len(identical)}"
    )
    if "transformers" in table:
        for name in ("kangaroo", "plain"):
            ratios = [ours / theirs for ours, theirs in zip(table[name], table["transformers"], strict=True)]
            print(f"{name} over transformers, median: {statistics.median(ratios):.2f}")
    _print_step(target)


def _interleaved(methods: dict[str, Method], ids: list[int]) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    tokens = {name: method(ids)[0] for name, method in methods.items()}  # warms up
    for _ in range(_RUNS.value):
        for name, method in methods.items():
            seconds[name].append(method(ids)[1])
    return seconds, tokens


def _transformers(target: Target, threads: int) -> Method:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(target.name, dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def run(ids: list[int]) -> tuple[list[int], float]:
        prompt = torch.tensor([ids])
        start = time.perf_counter()
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=_MAX_NEW_TOKENS.value,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, len(ids) :].tolist(), time.perf_counter() - start

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


def _versions() -> str:
    names = ["jax"] + [name for name in ("torch", "transformers") if importlib.util.find_spec(name)]
    versions = [f"{name} {importlib.import_module(name).__version__}" for name in names]
    return ", ".join([f"Python {platform.python_version()}", *versions, f"numpy {np.__version__}"])
