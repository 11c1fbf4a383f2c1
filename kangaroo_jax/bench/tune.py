"""Finds the best gamma and eta for an adapter on this machine, and writes them beside it for decode.py to use.

    python -m kangaroo_jax.bench tune                                            the demo
    python -m kangaroo_jax.bench tune --model=... --adapter=... --prompts=prompts.jsonl

Measures what rounds cost and records what the target accepts on calibration prompts; from these predicts the speed of
every gamma and eta, confirms the best few by decoding with them, and writes the fastest to `decode.json` in the
adapter's folder. With several --adapter flags (other exit layers, say) each gets its own, and the fastest is named.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from kangaroo_jax import DraftConfig, compilation_cache, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.acceptance import Chains, record
from kangaroo_jax.bench.prompts import held_out_prompts, read_prompts
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, write_draft_settings
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.generate import resolve_exit_layer, verification_widths
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", None, "Target; the demo if absent.")
_ADAPTER = flags.DEFINE_multi_string("adapter", [], "Adapter of --model; may be given several times.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, 'Calibration prompts: JSON Lines with a "prompt" each. Held-out library modules if absent.'
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_CONFIRM = flags.DEFINE_integer("confirm", 3, "Settings to measure, of the best predicted.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs of each, interleaved; the median counts.")
_WRITE = flags.DEFINE_bool("write", True, "Write decode.json.")

# Those whose verification pass is a width that CPU programs have anyway.
_DRAFT_LENGTHS = (1, 2, 4, 6, 8, 12)
_THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of this target and adapter.

    Attributes:
      plain_step: of a plain step.
      draft_step: of one more drafted token.
      rounds: draft length -> of a whole round of that many drafts, with the narrowest verification that holds them.
    """

    plain_step: float
    draft_step: float
    rounds: dict[int, float]

    def round(self, drafted: int, max_draft_len: int) -> float:
        """Seconds of a round with `drafted` tokens of at most `max_draft_len`."""
        width = next(w for w in verification_widths(DraftConfig(None, max_draft_len)) if w > drafted)
        return self.rounds[width - 1] - (width - 1 - drafted) * self.draft_step


def measure_costs(context: parts.Context) -> Costs:
    """Times the parts; one compiled program per draft length."""
    few, many = _DRAFT_LENGTHS[1], _DRAFT_LENGTHS[3]
    draft_step = (parts.draft_seconds(context, many) - parts.draft_seconds(context, few)) / (many - few)
    counts = tqdm(_DRAFT_LENGTHS, desc="costs of rounds", unit="length", leave=False)
    return Costs(
        parts.plain_step_seconds(context), draft_step, {count: parts.round_seconds(context, count) for count in counts}
    )


def predict(chains: Sequence[Chains], costs: Costs, max_draft_len: int, threshold: float) -> float:
    """The speed-up over plain decoding, prefill not counted, over all answers together."""
    tokens = seconds = 0.0
    for chain in chains:
        for drafted, committed in chain.rounds(max_draft_len, threshold):
            tokens += committed
            seconds += costs.round(drafted, max_draft_len)
    return tokens * costs.plain_step / seconds


def main() -> None:
    compilation_cache.enable()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    target = load_target(_MODEL.value or str(demo.MODEL), dtype)
    paths = _ADAPTER.value or [str(demo.ADAPTER)]
    adapters = [load_adapter(path, target) for path in paths]
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside the weights")
    # The peers benchmark has the first ten of the held-out modules.
    texts = read_prompts(_PROMPTS.value) if _PROMPTS.value else list(held_out_prompts(100).values())[10:]
    prompts = [target.tokenizer.encode(text, verbose=False) for text in texts]
    print(machine.describe())
    print(f"{len(prompts)} calibration prompts, {_MAX_NEW_TOKENS.value} new tokens, {dtype}, greedy")
    best = {path: _tune(target, adapter, prompts) for path, adapter in zip(paths, adapters, strict=True)}
    for path, (draft, _) in best.items():
        if _WRITE.value:
            print(f"wrote {write_draft_settings(path, draft)}")
    if len(best) > 1:
        path = max(best, key=lambda path: best[path][1])
        print(f"fastest: {path}, {best[path][1]:.2f} times plain decoding")


def _tune(target: Target, adapter: TrainedAdapter, prompts: list[list[int]]) -> tuple[DraftConfig, float]:
    """The best settings for one adapter, and their measured speed-up."""
    exit_layer = resolve_exit_layer(target, adapter, DraftConfig())
    print(f"\n{adapter.name}, exit layer {exit_layer}")
    count = _MAX_NEW_TOKENS.value
    chains = [
        record(target, adapter, ids, count, _DRAFT_LENGTHS[-1])
        for ids in tqdm(prompts, desc="recording acceptance", unit="prompt", leave=False)
    ]
    longest = max(prompts, key=len)
    middle = np.resize(np.asarray(longest, np.int32), (1, len(longest) + count // 2))
    costs = measure_costs(parts.Context(target.model, adapter.model, exit_layer, middle, _capacity(longest, count)))
    settings = sorted(
        itertools.product(_DRAFT_LENGTHS, _THRESHOLDS), key=lambda setting: -predict(chains, costs, *setting)
    )
    drafts = [DraftConfig(None, *setting) for setting in settings[: _CONFIRM.value]]
    measured = _measure(target, adapter, prompts, drafts)
    print(f"{'gamma':>5}{'eta':>6}{'accept length':>15}{'drafts':>8}{'predicted':>11}{'measured':>10}{'off':>6}")
    for draft, speedup in zip(drafts, measured, strict=True):
        rounds = [r for chain in chains for r in chain.rounds(draft.max_draft_len, draft.threshold)]
        drafted, committed = np.mean(rounds, axis=0)
        predicted = predict(chains, costs, draft.max_draft_len, draft.threshold)
        print(
            f"{draft.max_draft_len:5}{draft.threshold:6.2f}{committed:15.2f}{drafted:8.2f}{predicted:11.2f}"
            f"{speedup:10.2f}{predicted / speedup - 1:6.0%}"
        )
    fastest = int(np.argmax(measured))
    return drafts[fastest], measured[fastest]


def _capacity(prompt: list[int], max_new_tokens: int) -> int:
    return 128 * -(-(len(prompt) + max_new_tokens + _DRAFT_LENGTHS[-1] + 1) // 128)


def _measure(
    target: Target, adapter: TrainedAdapter, prompts: list[list[int]], drafts: list[DraftConfig]
) -> list[float]:
    """The speed-up of decoding with each setting over plain decoding, prefill not counted, over all answers."""
    count = _MAX_NEW_TOKENS.value
    calls = [lambda ids: generate_plain(target, [ids], count, eos_token_ids=())]
    calls += [lambda ids, d=d: generate(target, adapter, [ids], count, d, eos_token_ids=()) for d in drafts]
    totals = np.zeros(len(calls))
    for ids in tqdm(prompts, desc="confirming", unit="prompt", leave=False):
        times = [[] for _ in calls]
        for run in range(_RUNS.value + 1):
            for call, seconds in zip(calls, times, strict=True):
                out = call(ids)
                if run:  # the first warms up
                    seconds.append(out.seconds.decode)
        totals += [statistics.median(seconds) for seconds in times]
    return [float(totals[0] / total) for total in totals[1:]]
