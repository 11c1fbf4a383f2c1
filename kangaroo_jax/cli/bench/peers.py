"""The demo on held-out prompts: Kangaroo, plain decoding, and transformers' `generate` (torch) in three modes.

    python -m kangaroo_jax.bench peers

The modes are greedy, early exit (`assistant_early_exit`, at the adapter's exit layer) and prompt lookup
(`prompt_lookup_num_tokens`). Same weights, prompts, dtype (float32) and threads, interleaved. Prints a line per prompt,
the medians, and the plain step against the machine's read bandwidth. Needs torch.
"""

from __future__ import annotations

import importlib.util
import os
import statistics

from kangaroo_jax import compilation_cache
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.benchmark_prompts import held_out_prompts
from kangaroo_jax.bench.chat_prompts import CHAT_PROMPTS
from kangaroo_jax.bench.peer_speed import PromptSpeeds, StepSpeed, compare, decoders, plain_step_speeds
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.errors import InputError

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_PROMPTS = shared_flags.define_prompt_count(10)
_MAX_NEW_TOKENS = shared_flags.define_max_new_tokens()
_RUNS = shared_flags.define_runs(5)
_DRAFT = shared_flags.define_draft()


def main() -> None:
    shared_flags.check_positive(_PROMPTS, _MAX_NEW_TOKENS, _RUNS)
    _DRAFT.given()  # names a value out of range before anything is loaded
    if importlib.util.find_spec("torch") is None:
        raise InputError("torch is not installed, and transformers' models need it; pip install -e '.[parity]'")
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, "float32")
    adapter = load_adapter_of(target, _ADAPTER.value)
    draft = _DRAFT.over(adapter.draft).at(1)
    named = {} if shared_flags.is_chat(target) else held_out_prompts(_PROMPTS.value)
    texts = list(named.values()) or CHAT_PROMPTS[: _PROMPTS.value]
    ids = shared_flags.encoded_prompts(target, texts, _MAX_NEW_TOKENS.value)
    prompts = dict(zip(named or [text[:22] for text in texts], ids, strict=True))
    print(machine.describe("torch", "transformers"))
    print(f"{draft}, {_MAX_NEW_TOKENS.value} new tokens, float32, greedy")
    by_name = decoders(target, adapter, draft, _MAX_NEW_TOKENS.value, os.cpu_count() or 1)
    print("tokens per second (accept: mean accept length; speed-up: Kangaroo over plain)")
    print(f"{'prompt':24}" + "".join(f"{name:>14}" for name in by_name) + f"{'accept':>8}{'speed-up':>10}  identical")
    rows = []
    for row in compare(by_name, prompts, _RUNS.value):
        rows.append(row)
        values = [*row.tokens_per_second.values(), row.mean_accept_length, row.speedup]
        print(_line(row.prompt, values) + f"  {'yes' if row.identical else 'no'}", flush=True)
    _print_medians(rows)
    _print_steps(list(plain_step_speeds(target, adapter)))


def _print_medians(rows: list[PromptSpeeds]) -> None:
    names = list(rows[0].tokens_per_second)
    speeds = [statistics.median(row.tokens_per_second[name] for row in rows) for name in names]
    accept = statistics.median(row.mean_accept_length for row in rows)
    medians = [*speeds, accept, statistics.median(row.speedup for row in rows)]
    print(_line("median", medians) + f"  {sum(row.identical for row in rows)} of {len(rows)}")
    for name in names[:2]:
        ratios = {
            peer: statistics.median(row.tokens_per_second[name] / row.tokens_per_second[peer] for row in rows)
            for peer in names[2:]
        }
        over = ", ".join(f"{ratio:.2f} over {peer}" for peer, ratio in ratios.items())
        print(f"{name}, median of ratios: {over}")


def _line(name: str, values: list[float]) -> str:
    *speeds, accept, speedup = values
    return f"{name:24}" + "".join(f"{speed:14.1f}" for speed in speeds) + f"{accept:8.2f}{speedup:10.2f}"


def _print_steps(steps: list[StepSpeed]) -> None:
    print(f"\n{'plain step, 256 valid tokens':32}{'ms':>8}{'MB read':>10}{'GB/s':>8}{'of read bandwidth':>20}")
    for step in steps:
        rate = step.num_bytes / step.seconds
        print(
            f"{f'cache of {step.capacity}':32}{step.seconds * 1e3:8.3f}{step.num_bytes / 1e6:10.1f}{rate / 1e9:8.1f}"
            f"{f'{rate / step.read_bandwidth:.0%} of {step.read_bandwidth / 1e9:.1f}':>20}"
        )
