"""Finds the best way to draft with an adapter on this machine, and writes it beside the adapter for decode.py to use:
gamma and eta of a single sequence, or of a tree with its K and budget.

    python -m kangaroo_jax.bench tune                                            the demo
    python -m kangaroo_jax.bench tune --model=... --adapter=... --prompts=prompts.jsonl
    python -m kangaroo_jax.bench tune --tree_topk=4,10 --tree_budget=16,32,64     other trees; --tree_topk= for none

Measures what rounds cost and records what the target accepts on calibration prompts; from these predicts the speed of
every gamma and eta, of a single sequence and of every tree, corrected by how far decoding with one setting is from what
was predicted of it. Confirms the best few of both by decoding with them, and writes the fastest to `decode.json` in the
adapter's folder. With several --adapter flags (other exit layers, say) each gets its own, and the fastest is named.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from kangaroo_jax import (
    DraftConfig,
    TreeConfig,
    compilation_cache,
    demo,
    generate,
    generate_plain,
    load_adapter,
    load_target,
)
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.acceptance import Chains, Trees, record, record_trees
from kangaroo_jax.bench.prompts import held_out_prompts, read_prompts
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, write_draft_settings
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.generate import resolve_exit_layer
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", None, "Target; the demo if absent.")
_ADAPTER = flags.DEFINE_multi_string("adapter", [], "Adapter of --model; may be given several times.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, 'Calibration prompts: JSON Lines with a "prompt" each. Held-out library modules if absent.'
)
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_CONFIRM = flags.DEFINE_integer(
    "confirm",
    3,
    "Settings to measure: so many of the best predicted single sequences, and the best of so many trees.",
    lower_bound=1,
)
_TREE_TOPK = flags.DEFINE_list(
    "tree_topk",
    None,
    "Ks of the trees to consider; none if empty. Each takes a recording of its own. 2,3,4 on CPU if absent, else 4,10.",
)
_TREE_BUDGET = flags.DEFINE_list(
    "tree_budget",
    None,
    "Their budgets. A round of each K and budget is timed, and a verification of each width that such trees have. "
    "8,12,16 on CPU if absent, else 16,32,64.",
)
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs of each, interleaved; the median counts.")
_WRITE = flags.DEFINE_bool("write", True, "Write decode.json.")

# Those whose verification pass is a width that CPU programs have anyway.
_DRAFT_LENGTHS = (1, 2, 4, 6, 8, 12)
_THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))
# A tree's compares with the probability of whole paths, so low ones matter.
_TREE_THRESHOLDS = (0.0, 0.01, 0.02, 0.03, *_THRESHOLDS[1:])
_LEVELS = 6  # of the tree rounds that are timed
# What predictions are corrected by: the paper's eta, and drafts whose lengths vary.
_REFERENCE = DraftConfig(None, 4, 0.6)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of this target and adapter.

    Attributes:
      plain_step: of a plain step.
      draft_step: of one more drafted token.
      rounds: draft length -> of a whole round of that many drafts, with the narrowest verification that holds them.
      tree_levels: K -> of one more level of a tree.
      tree_rounds: tree -> of a whole round of `levels` levels.
      tree_verifications: width -> of verifying and committing a tree that needs it.
      levels: of the timed tree rounds.
    """

    plain_step: float
    draft_step: float
    rounds: dict[int, float]
    tree_levels: dict[int, float] = dataclasses.field(default_factory=dict)
    tree_rounds: dict[TreeConfig, float] = dataclasses.field(default_factory=dict)
    tree_verifications: dict[int, float] = dataclasses.field(default_factory=dict)
    levels: int = _LEVELS

    def round(self, steps: int, draft: DraftConfig) -> float:
        """Seconds of a round of `draft` that takes `steps` draft steps: so many tokens, or levels of a tree."""
        tree = draft.tree
        drafted = steps if tree is None else tree.drafted(steps)
        width = next(w for w in parts.verification_widths(draft) if w > drafted)
        if tree is None:
            return self.rounds[width - 1] - (width - 1 - drafted) * self.draft_step
        timed = 1 + tree.drafted(self.levels)
        return (
            self.tree_rounds[tree]
            - (self.levels - steps) * self.tree_levels[tree.topk]
            - (self.tree_verifications[timed] - self.tree_verifications[width])
        )


def measure_costs(context: parts.Context, of_trees: parts.Context, trees: Sequence[DraftConfig]) -> Costs:
    """Times the parts; one compiled program per draft length, two per K of `trees`, one per tree, and two per width of
    their verification.

    Args:
      context: with caches for single sequences.
      of_trees: with caches for all of `trees`.
      trees: settings that are considered.
    """
    few, many = _DRAFT_LENGTHS[1], _DRAFT_LENGTHS[3]
    draft_step = (parts.draft_seconds(context, many) - parts.draft_seconds(context, few)) / (many - few)
    shapes = sorted({draft.tree for draft in trees}, key=dataclasses.astuple)
    topks = sorted({tree.topk for tree in shapes})
    widths = {1 + tree.drafted(_LEVELS): tree.topk for tree in shapes}
    widths |= {width: draft.tree.topk for draft in trees for width in parts.verification_widths(draft)}

    def level(topk: int) -> float:
        deep, shallow = (parts.growth_seconds(of_trees, topk, levels) for levels in (_LEVELS, 2))
        return (deep - shallow) / (_LEVELS - 2)

    def verification(width: int) -> float:
        topk = widths[width]
        levels = max(_LEVELS, 1 + -(-(width - 1 - topk) // topk**2))  # so many that a tree fills the width
        return parts.tree_verification_seconds(of_trees, TreeConfig(topk, width - 1), levels)

    total = len(_DRAFT_LENGTHS) + len(topks) + len(shapes) + len(widths)
    with tqdm(total=total, desc="costs of rounds", unit="part", leave=False) as bar:

        def times(keys: Iterable[Any], measure: Callable[[Any], float]) -> dict[Any, float]:
            found = {}
            for key in keys:
                found[key] = measure(key)
                bar.update()
            return found

        return Costs(
            plain_step=parts.plain_step_seconds(context),
            draft_step=draft_step,
            rounds=times(_DRAFT_LENGTHS, lambda count: parts.round_seconds(context, count)),
            tree_levels=times(topks, level),
            tree_rounds=times(shapes, lambda tree: parts.round_seconds(of_trees, _LEVELS, tree)),
            tree_verifications=times(sorted(widths), verification),
        )


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the target accepts on one calibration prompt.

    Attributes:
      chains: of single sequences.
      trees: K -> of trees.
    """

    chains: Chains
    trees: dict[int, Trees]

    def rounds(self, draft: DraftConfig) -> list[tuple[int, int]]:
        """(draft steps, accept length) of each round that `generate` would run with these settings."""
        if draft.tree is None:
            return self.chains.rounds(draft.max_draft_len, draft.threshold)
        return self.trees[draft.tree.topk].rounds(draft.max_draft_len, draft.threshold, draft.tree.budget)


def predict(recordings: Sequence[Recording], costs: Costs, draft: DraftConfig) -> float:
    """The speed-up over plain decoding, prefill not counted, over all answers together."""
    rounds = collections.Counter(r for recording in recordings for r in recording.rounds(draft))
    tokens = sum(count * committed for (_, committed), count in rounds.items())
    seconds = sum(count * costs.round(steps, draft) for (steps, _), count in rounds.items())
    return tokens * costs.plain_step / seconds


def settings_of_trees(topks: Sequence[int], budgets: Sequence[int]) -> list[DraftConfig]:
    """All that are considered of these Ks and budgets: the depths that a budget can verify."""
    shapes = itertools.product(topks, budgets, _DRAFT_LENGTHS, _TREE_THRESHOLDS)
    return [
        DraftConfig(None, gamma, threshold, TreeConfig(topk, budget))
        for topk, budget, gamma, threshold in shapes
        if gamma <= budget
    ]


def main() -> None:
    on_cpu = jax.default_backend() == "cpu"
    topks = _numbers(_TREE_TOPK, (2, 3, 4) if on_cpu else (4, 10))
    budgets = _numbers(_TREE_BUDGET, (8, 12, 16) if on_cpu else (16, 32, 64))
    compilation_cache.enable()
    dtype = _DTYPE.value or ("float32" if on_cpu else "bfloat16")
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
    trees = settings_of_trees(topks, budgets)
    best = {path: _tune(target, adapter, prompts, trees) for path, adapter in zip(paths, adapters, strict=True)}
    for path, (draft, _) in best.items():
        if _WRITE.value:
            print(f"wrote {write_draft_settings(path, draft)}")
    if len(best) > 1:
        path = max(best, key=lambda path: best[path][1])
        print(f"fastest: {path}, {best[path][1]:.2f} times plain decoding")


def best_of(speeds: dict[DraftConfig, float], count: int) -> list[DraftConfig]:
    """Of settings and their predicted speeds, the `count` best single sequences, and the best setting of each of the
    `count` best trees: between trees, a prediction errs more than between thresholds of one."""
    ranked = sorted(speeds, key=lambda draft: -speeds[draft])
    singles = [draft for draft in ranked if draft.tree is None]
    trees = {}
    for draft in ranked:
        trees.setdefault(draft.tree, draft)
    trees.pop(None, None)
    return singles[:count] + list(trees.values())[:count]


def _numbers(flag: flags.FlagHolder[list[str] | None], default: tuple[int, ...]) -> tuple[int, ...]:
    values = default if flag.value is None else [value for value in flag.value if value.strip()]
    try:
        numbers = tuple(sorted({int(value) for value in values}))
    except ValueError:
        numbers = (0,)
    if any(number < 1 for number in numbers):
        raise InputError(f"--{flag.name}: expected whole numbers above 0, found {','.join(flag.value)!r}")
    return numbers


def _tune(
    target: Target, adapter: TrainedAdapter, prompts: list[list[int]], trees: list[DraftConfig]
) -> tuple[DraftConfig, float]:
    """The best settings for one adapter, and their measured speed-up."""
    exit_layer = resolve_exit_layer(target, adapter, DraftConfig())
    longest, count = max(prompts, key=len), _MAX_NEW_TOKENS.value
    # A tree that is wider than what can be drafted is named before the work begins.
    timed = [DraftConfig(None, _LEVELS, tree=TreeConfig(d.tree.topk, max(d.tree.budget, _LEVELS))) for d in trees]
    slots = max((parts.positions_per_round(adapter.model, draft) for draft in [*trees, *timed]), default=0)
    print(f"\n{adapter.name}, exit layer {exit_layer}")
    recordings = [
        _record(target, adapter, ids, trees)
        for ids in tqdm(prompts, desc="recording acceptance", unit="prompt", leave=False)
    ]
    middle = np.resize(np.asarray(longest, np.int32), (1, len(longest) + count // 2))
    single, wide = (
        parts.Context(target.model, adapter.model, exit_layer, middle, _capacity(longest, count, room))
        for room in (_DRAFT_LENGTHS[-1] + 1, slots)
    )
    costs = measure_costs(single, wide, trees)
    singles = [DraftConfig(None, *setting) for setting in itertools.product(_DRAFT_LENGTHS, _THRESHOLDS)]
    speeds = {draft: predict(recordings, costs, draft) for draft in [*singles, *trees]}
    (found,) = _measure(target, adapter, prompts, [_REFERENCE], "correcting")
    correction = found / predict(recordings, costs, _REFERENCE)
    print(f"with {_REFERENCE} decoding is {correction:.2f} times as fast as rounds timed alone say; so below")
    speeds = {draft: speed * correction for draft, speed in speeds.items()}
    drafts = best_of(speeds, _CONFIRM.value)
    measured = _measure(target, adapter, prompts, drafts, "confirming")
    print(
        f"{'':8}{'K':>4}{'budget':>8}{'gamma':>7}{'eta':>6}{'accept length':>15}{'steps':>7}{'predicted':>11}"
        f"{'measured':>10}{'off':>6}"
    )
    for draft, speedup in zip(drafts, measured, strict=True):
        predicted = speeds[draft]
        rounds = [r for recording in recordings for r in recording.rounds(draft)]
        steps, committed = np.mean(rounds, axis=0)
        shape = ("single", "", "") if draft.tree is None else ("tree", draft.tree.topk, draft.tree.budget)
        print(
            f"{shape[0]:8}{shape[1]:>4}{shape[2]:>8}{draft.max_draft_len:7}{draft.threshold:6.2f}{committed:15.2f}"
            f"{steps:7.2f}{predicted:11.2f}{speedup:10.2f}{predicted / speedup - 1:6.0%}"
        )
    fastest = int(np.argmax(measured))
    return drafts[fastest], measured[fastest]


def _record(target: Target, adapter: TrainedAdapter, prompt: list[int], trees: list[DraftConfig]) -> Recording:
    count, topks = _MAX_NEW_TOKENS.value, sorted({draft.tree.topk for draft in trees})
    deepest = max((draft.max_draft_len for draft in trees), default=1)
    return Recording(
        record(target, adapter, prompt, count, _DRAFT_LENGTHS[-1]),
        record_trees(target, adapter, prompt, count, deepest, topks),
    )


def _capacity(prompt: list[int], max_new_tokens: int, slots: int) -> int:
    return 128 * -(-(len(prompt) + max_new_tokens + slots) // 128)


def _measure(
    target: Target, adapter: TrainedAdapter, prompts: list[list[int]], drafts: list[DraftConfig], purpose: str
) -> list[float]:
    """The speed-up of decoding with each setting over plain decoding, prefill not counted, over all answers."""
    count = _MAX_NEW_TOKENS.value
    calls = [lambda ids: generate_plain(target, [ids], count, eos_token_ids=())]
    calls += [lambda ids, d=d: generate(target, adapter, [ids], count, d, eos_token_ids=()) for d in drafts]
    totals = np.zeros(len(calls))
    for ids in tqdm(prompts, desc=purpose, unit="prompt", leave=False):
        times = [[] for _ in calls]
        for run in range(_RUNS.value + 1):
            for call, seconds in zip(calls, times, strict=True):
                out = call(ids)
                if run:  # the first warms up
                    seconds.append(out.seconds.decode)
        totals += [statistics.median(seconds) for seconds in times]
    return [float(totals[0] / total) for total in totals[1:]]
