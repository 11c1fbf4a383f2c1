"""Finds the fastest way to draft with an adapter on this machine: gamma and eta of a single sequence, alone or with
look-ups, or of a tree with its K and budget.

Measures what rounds cost and records what the target accepts on calibration prompts; from these predicts the speed of
every gamma and eta, of a single sequence, with every look-up and of every tree. Predictions are corrected by the ratio
of measured to predicted speed of one setting. The best few of each kind are then measured by decoding with them.

What rounds of single sequences cost is also measured for batches: by these costs, sequences decide how far to draft.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from kangaroo_jax import DecideConfig, DraftConfig, LookupConfig, TreeConfig
from kangaroo_jax.bench import parts
from kangaroo_jax.bench.acceptance import Chains, Found, Trees, record, record_found, record_trees
from kangaroo_jax.bench.progress import Progress, silent
from kangaroo_jax.bench.tree_speed import time_settings
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import RoundCosts

# The draft lengths whose verification pass is of a width that CPU programs have anyway.
DRAFT_LENGTHS = (1, 2, 4, 6, 8, 12)
_THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))
# A tree's threshold compares with the probability of complete paths, so low ones matter.
_TREE_THRESHOLDS = (0.0, 0.01, 0.02, 0.03, *_THRESHOLDS[1:])
LEVELS = 6  # levels of the trees that are timed
# Lengths of look-ups, whose verification is of such a width too; the fewest last tokens that have to be found, and the
# most that are searched for; and with how many of the best single sequences they are considered.
LOOKUP_LENGTHS = (4, 8, 12)
_NGRAMS = tuple((fewest, LookupConfig().max_ngram) for fewest in (1, 2, 3, 4))
WITH_LOOKUPS = 12
# The setting whose measured speed corrects the predictions: the paper's eta, and drafts whose lengths vary.
_REFERENCE = DraftConfig(None, 4, 0.6)


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds of the parts of this target and adapter.

    Attributes:
      plain_step: seconds of a plain step.
      draft_step: seconds of one more drafted token.
      rounds: draft length -> seconds of a complete round of that many drafts, with the narrowest verification that
        holds them.
      tree_levels: K -> seconds of one more level of a tree.
      tree_rounds: tree -> seconds of a complete round of `levels` levels.
      tree_verifications: width -> seconds of verifying and committing a tree of that width.
      levels: levels of the timed tree rounds.
      lookup_rounds: tokens that are looked up -> seconds of a complete round of them.
      platform: that rounds run on: which widths a verification may have depends on it. None is this machine's.
    """

    plain_step: float
    draft_step: float
    rounds: dict[int, float]
    tree_levels: dict[int, float] = dataclasses.field(default_factory=dict)
    tree_rounds: dict[TreeConfig, float] = dataclasses.field(default_factory=dict)
    tree_verifications: dict[int, float] = dataclasses.field(default_factory=dict)
    levels: int = LEVELS
    lookup_rounds: dict[int, float] = dataclasses.field(default_factory=dict)
    platform: str | None = None

    def in_plain_steps(self, batch_size: int, shallow: float) -> RoundCosts:
        """What single sequences decide by how far to draft. `shallow`: share of a plain step of the shallow layers."""
        step = max(0.0, self.draft_step)
        # A verification takes no less time than a plain step, but measured times may say so.
        verified = {count + 1: max(1.0, (self.rounds[count] - count * step) / self.plain_step) for count in self.rounds}
        return RoundCosts(batch_size, step / self.plain_step, ((1, 1.0), *sorted(verified.items())), shallow)

    def round(self, steps: int, draft: DraftConfig) -> float:
        """Seconds of a round of `draft` that takes `steps` draft steps: drafted tokens, or levels of a tree; 0: of one
        that looks up."""
        tree = draft.tree
        if steps == 0:
            found = draft.lookup.max_tokens
            width = next(w for w in parts.verification_widths(draft, self.platform) if w > found)
            return self.lookup_rounds[found] + self._verification(width) - self._verification(found + 1)
        drafted = steps if tree is None else tree.drafted(steps)
        width = next(w for w in parts.verification_widths(draft, self.platform) if w > drafted)
        if tree is None:
            return self.rounds[width - 1] - (width - 1 - drafted) * self.draft_step
        timed = 1 + tree.drafted(self.levels)
        return (
            self.tree_rounds[tree]
            - (self.levels - steps) * self.tree_levels[tree.topk]
            - (self.tree_verifications[timed] - self.tree_verifications[width])
        )

    def _verification(self, width: int) -> float:
        """Seconds of a round without its draft steps."""
        return self.rounds[width - 1] - (width - 1) * self.draft_step


def measure_costs(
    context: parts.Context,
    tree_context: parts.Context,
    trees: Sequence[DraftConfig],
    lookups: Sequence[int] = (),
    progress: Progress = silent,
) -> Costs:
    """Times the parts; one compiled program per draft length and length of a look-up, two per K of `trees`, one per
    tree, and two per width of their verification.

    Args:
      context: with caches for single sequences.
      tree_context: with caches for all of `trees`.
      trees: settings that are considered.
      lookups: numbers of tokens that are looked up.
      progress: shows how many parts are timed.
    """
    few, many = DRAFT_LENGTHS[1], DRAFT_LENGTHS[3]
    draft_step = (parts.draft_seconds(context, many) - parts.draft_seconds(context, few)) / (many - few)
    shapes = sorted({draft.tree for draft in trees}, key=dataclasses.astuple)
    topks = sorted({tree.topk for tree in shapes})
    widths = {1 + tree.drafted(LEVELS): tree.topk for tree in shapes}
    widths |= {width: draft.tree.topk for draft in trees for width in parts.verification_widths(draft)}

    def level(topk: int) -> float:
        deep, shallow = (parts.growth_seconds(tree_context, topk, levels) for levels in (LEVELS, 2))
        return (deep - shallow) / (LEVELS - 2)

    def verification(width: int) -> float:
        topk = widths[width]
        levels = max(LEVELS, 1 + -(-(width - 1 - topk) // topk**2))  # enough levels for a tree to fill the width
        return parts.tree_verification_seconds(tree_context, TreeConfig(topk, width - 1), levels)

    costs = Costs(parts.plain_step_seconds(context), draft_step, {})
    jobs: list[tuple[dict, object, Callable[[], float]]] = [
        *((costs.rounds, n, functools.partial(parts.round_seconds, context, n)) for n in DRAFT_LENGTHS),
        *((costs.lookup_rounds, n, functools.partial(parts.lookup_seconds, context, n)) for n in lookups),
        *((costs.tree_levels, topk, functools.partial(level, topk)) for topk in topks),
        *((costs.tree_rounds, t, functools.partial(parts.round_seconds, tree_context, LEVELS, t)) for t in shapes),
        *((costs.tree_verifications, w, functools.partial(verification, w)) for w in sorted(widths)),
    ]
    for seconds, key, measure in progress(jobs, "costs of rounds", "part"):
        seconds[key] = measure()
    return costs


@dataclasses.dataclass(frozen=True)
class Recording:
    """What the target accepts on one calibration prompt.

    Attributes:
      chains: drafts of single sequences.
      trees: K -> drafted trees.
      found: (min_ngram, max_ngram) -> what would be looked up.
    """

    chains: Chains
    trees: dict[int, Trees]
    found: dict[tuple[int, int], Found] = dataclasses.field(default_factory=dict)

    def rounds(self, draft: DraftConfig) -> list[tuple[int, int]]:
        """(draft steps, accept length) of each round that `generate` would run with these settings; 0 draft steps in
        those that look up."""
        if draft.lookup is not None:
            found = self.found[draft.lookup.min_ngram, draft.lookup.max_ngram]
            return self.chains.rounds(draft.max_draft_len, draft.threshold, found, draft.lookup.max_tokens)
        if draft.tree is None:
            return self.chains.rounds(draft.max_draft_len, draft.threshold)
        return self.trees[draft.tree.topk].rounds(draft.max_draft_len, draft.threshold, draft.tree.budget)


def record_all(
    target: Target, adapter: TrainedAdapter, prompt: list[int], trees: Sequence[DraftConfig], max_new_tokens: int
) -> Recording:
    """What the target accepts on one prompt, of single sequences, look-ups and `trees`."""
    topks = sorted({draft.tree.topk for draft in trees})
    deepest = max((draft.max_draft_len for draft in trees), default=1)
    found = record_found(target, prompt, max_new_tokens, [LookupConfig(LOOKUP_LENGTHS[-1], *x) for x in _NGRAMS])
    return Recording(
        record(target, adapter, prompt, max_new_tokens, DRAFT_LENGTHS[-1]),
        record_trees(target, adapter, prompt, max_new_tokens, deepest, topks),
        {(lookup.min_ngram, lookup.max_ngram): each for lookup, each in found.items()},
    )


def mean_round(recordings: Sequence[Recording], draft: DraftConfig) -> tuple[float, float]:
    """(draft steps, accept length) of a round in the mean."""
    return tuple(np.mean([r for recording in recordings for r in recording.rounds(draft)], axis=0).tolist())


def acceptance(recordings: Sequence[Recording], draft: DraftConfig) -> float:
    """Share of the drafted tokens that are accepted, of those whose predecessors are, with a single sequence."""
    rounds = [r for recording in recordings for r in recording.rounds(draft)]
    accepted = sum(committed - 1 for _, committed in rounds)
    return round(accepted / sum(min(steps, committed) for steps, committed in rounds), 3)


def predict(recordings: Sequence[Recording], costs: Costs, draft: DraftConfig) -> float:
    """The predicted speed-up over plain decoding, prefill not counted, over all answers together."""
    rounds = collections.Counter(r for recording in recordings for r in recording.rounds(draft))
    tokens = sum(count * committed for (_, committed), count in rounds.items())
    seconds = sum(count * costs.round(steps, draft) for (steps, _), count in rounds.items())
    return tokens * costs.plain_step / seconds


def single_sequences() -> list[DraftConfig]:
    """All settings that are considered for single sequences."""
    return [DraftConfig(None, *setting) for setting in itertools.product(DRAFT_LENGTHS, _THRESHOLDS)]


def settings_of_trees(topks: Sequence[int], budgets: Sequence[int]) -> list[DraftConfig]:
    """All settings that are considered for trees of these Ks and budgets: every depth that the budget can verify."""
    shapes = itertools.product(topks, budgets, DRAFT_LENGTHS, _TREE_THRESHOLDS)
    return [
        DraftConfig(None, gamma, threshold, TreeConfig(topk, budget))
        for topk, budget, gamma, threshold in shapes
        if gamma <= budget
    ]


def with_lookups(drafts: Sequence[DraftConfig]) -> list[DraftConfig]:
    """The single sequences among these, with every look-up that is considered."""
    lookups = [LookupConfig(most, *ngrams) for most in LOOKUP_LENGTHS for ngrams in _NGRAMS]
    return [dataclasses.replace(draft, lookup=x) for draft in drafts if draft.tree is None for x in lookups]


def best_of(speeds: dict[DraftConfig, float], count: int) -> list[DraftConfig]:
    """The `count` single sequences with the best predicted speeds, the best setting with each of the `count` best
    look-ups that are predicted to be faster, and the best setting of each of the `count` best trees: predictions are
    less accurate between trees than between thresholds of one tree."""
    ranked = sorted(speeds, key=lambda draft: -speeds[draft])
    singles = [draft for draft in ranked if draft.tree is None and draft.lookup is None]
    lookups, trees = {}, {}
    for draft in ranked:
        if draft.lookup is not None and speeds[draft] > speeds[singles[0]]:
            lookups.setdefault(draft.lookup, draft)
        if draft.tree is not None:
            trees.setdefault(draft.tree, draft)
    return [*singles[:count], *list(lookups.values())[:count], *list(trees.values())[:count]]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much a tuning run measures.

    Attributes:
      max_new_tokens: length of each answer.
      runs: timed runs of each setting, interleaved; the median counts.
      confirm: settings to measure: this many of the best predicted single sequences, the best with this many look-ups,
        and the best of this many trees.
      batch_sizes: for which costs are measured; 1 is among them in any case.
    """

    max_new_tokens: int = 128
    runs: int = 3
    confirm: int = 3
    batch_sizes: tuple[int, ...] = (1,)


@dataclasses.dataclass(frozen=True)
class TunedSetting:
    """A setting that was measured.

    Attributes:
      draft: the setting.
      accept_length: predicted mean tokens committed by a round.
      draft_steps: predicted mean draft steps of a round.
      predicted: speed-up over plain decoding, corrected.
      measured: speed-up over plain decoding, prefill not counted.
    """

    draft: DraftConfig
    accept_length: float
    draft_steps: float
    predicted: float
    measured: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """What a tuning run found.

    Attributes:
      reference: the setting whose measured speed corrected the predictions.
      correction: its measured over its predicted speed.
      settings: those measured.
      batches: batch size -> the single sequence with the best predicted speed, and that speed.
      costs: by batch size, which sequences decide by how far to draft.
      acceptance: share of the drafted tokens that were accepted, of those whose predecessors were, with the best
        predicted single sequence.
      decided: each sequence decides how far to draft, otherwise as the best predicted setting without a tree.
      deciding: measured speed-up of that.
      beside: that of the same setting with gamma and eta.
    """

    reference: DraftConfig
    correction: float
    settings: list[TunedSetting]
    batches: dict[int, tuple[DraftConfig, float]]
    costs: tuple[RoundCosts, ...]
    acceptance: float
    decided: DraftConfig
    deciding: float
    beside: float

    @property
    def fastest(self) -> TunedSetting:
        return max(self.settings, key=lambda setting: setting.measured)

    def draft(self, machine: str) -> DraftConfig:
        """What decode.json says: the fastest setting alone, or deciding how far to draft, where that was measured to be
        as fast; in batches the latter, but for a tree, which has no such rule. `machine`: this one."""
        alone = self.deciding >= self.fastest.measured
        draft = self.decided if alone else self.fastest.draft
        if draft.tree is not None:
            return draft
        return dataclasses.replace(draft, decide=DecideConfig(self.costs, self.acceptance, machine, 1 if alone else 2))


def tune(
    target: Target,
    adapter: TrainedAdapter,
    exit_layer: int,
    prompts: Sequence[list[int]],
    trees: Sequence[DraftConfig],
    effort: Effort,
    progress: Progress = silent,
) -> Tuning:
    """Predicts all settings for one adapter, and measures the best.

    Args:
      target: the adapter's.
      adapter: to tune.
      exit_layer: number of shallow layers.
      prompts: calibration prompts, token ids.
      trees: from `settings_of_trees`.
      effort: how much to measure.
      progress: shows how far each of the phases is.

    Raises:
      InputError: for a tree that is wider than what can be drafted, before the work begins.
    """
    longest = max(prompts, key=len)
    timed = [DraftConfig(None, LEVELS, tree=TreeConfig(d.tree.topk, max(d.tree.budget, LEVELS))) for d in trees]
    tree_positions = max((parts.positions_per_round(adapter.model, draft) for draft in [*trees, *timed]), default=0)
    recordings = [
        record_all(target, adapter, ids, trees, effort.max_new_tokens)
        for ids in progress(prompts, "recording acceptance", "prompt")
    ]
    length = len(longest) + effort.max_new_tokens
    middle = np.resize(np.asarray(longest, np.int32), (1, len(longest) + effort.max_new_tokens // 2))
    context, tree_context = (
        parts.Context(target.model, adapter.model, exit_layer, middle, parts.rounded_capacity(length + positions))
        for positions in (DRAFT_LENGTHS[-1] + 1, tree_positions)
    )
    costs = {1: measure_costs(context, tree_context, trees, LOOKUP_LENGTHS, progress)}
    for size in effort.batch_sizes:
        if size not in costs:
            tokens = np.resize(middle, (size, middle.shape[1]))
            batch = dataclasses.replace(context, tokens=tokens)
            costs[size] = measure_costs(batch, batch, [], (), progress)
    (found,) = _measure(target, adapter, prompts, [_REFERENCE], effort, progress, "correcting")
    correction = found / predict(recordings, costs[1], _REFERENCE)
    singles = single_sequences()

    def predicted(drafts: Sequence[DraftConfig]) -> dict[DraftConfig, float]:
        return {draft: predict(recordings, costs[1], draft) * correction for draft in drafts}

    speeds = predicted([*singles, *trees])
    speeds |= predicted(with_lookups(best_of(speeds, WITH_LOOKUPS)))
    batches = {}
    for size in sorted(costs):
        of_size = {draft: predict(recordings, costs[size], draft) * correction for draft in singles}
        best = max(of_size, key=of_size.get)
        batches[size] = best, of_size[best]
    parts_read = context.bytes
    shallow = parts_read.shallow / parts_read.plain_step
    in_plain_steps = tuple(costs[size].in_plain_steps(size, shallow) for size in sorted(costs))
    accepted = acceptance(recordings, batches[1][0])
    drafts = best_of(speeds, effort.confirm)
    best = max((draft for draft in drafts if draft.tree is None), key=speeds.get)
    decided = dataclasses.replace(best, decide=DecideConfig(in_plain_steps, accepted))
    *measured, deciding = _measure(target, adapter, prompts, [*drafts, decided], effort, progress, "confirming")
    settings = []
    for draft, speedup in zip(drafts, measured, strict=True):
        steps, committed = mean_round(recordings, draft)
        settings.append(TunedSetting(draft, committed, steps, speeds[draft], speedup))
    beside = measured[drafts.index(best)]
    return Tuning(_REFERENCE, correction, settings, batches, in_plain_steps, accepted, decided, deciding, beside)


def _measure(
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[list[int]],
    drafts: Sequence[DraftConfig],
    effort: Effort,
    progress: Progress,
    purpose: str,
) -> list[float]:
    """The speed-up of each setting over plain decoding, prefill not counted, over all answers."""
    timings = time_settings(target, adapter, prompts, drafts, effort.max_new_tokens, effort.runs, progress, purpose)
    plain, *totals = timings.seconds.sum(axis=1).tolist()
    return [plain / total for total in totals]
