"""Finds the fastest way to draft with an adapter on a machine that is not here: gamma and eta of a single sequence,
alone or with look-ups, or of a tree with its K and budget; with the adapter's draft vocabulary or with the complete
one.

What the target accepts is recorded on this machine, as `tuning` does. What rounds cost is predicted for the other
(`preflight`). Both go into the same search; nothing is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from flax import nnx

from kangaroo_jax.bench.progress import Progress, silent
from kangaroo_jax.bench.tuning import (
    DRAFT_LENGTHS,
    LEVELS,
    LOOKUP_LENGTHS,
    WITH_LOOKUPS,
    Costs,
    Recording,
    acceptance,
    best_of,
    mean_round,
    predict,
    record_all,
    single_sequences,
    with_lookups,
)
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DecideConfig, DraftConfig, RoundCosts, TreeConfig
from kangaroo_jax.errors import MachineError
from kangaroo_jax.model import sharding
from kangaroo_jax.preflight.decoding import Work
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.prediction import PartPredictor, RoundWork
from kangaroo_jax.preflight.report import Program


@dataclasses.dataclass(frozen=True)
class There:
    """What decoding will be on the other machine.

    Attributes:
      machine: whose limits are known; one of its devices decodes.
      dtype: of weights and caches there.
      prompt_tokens: of each prompt.
      max_new_tokens: of each answer.
    """

    machine: Machine
    dtype: str
    prompt_tokens: int
    max_new_tokens: int

    def work(self, target: Target, adapter: TrainedAdapter, draft: DraftConfig, batch_size: int) -> Work:
        """Decoding there, as shapes."""
        mesh = sharding.decoding_mesh(1, self.machine.devices)
        shape = target.config, adapter.model, self.dtype, draft, self.prompt_tokens, self.max_new_tokens
        return Work(*shape, self.machine, mesh, batch_size)


@dataclasses.dataclass(frozen=True)
class PredictedSetting:
    """A setting, and how fast it would be.

    Attributes:
      draft: the setting.
      vocabulary: tokens that can be drafted.
      accept_length: mean tokens committed by a round.
      draft_steps: mean draft steps of a round.
      predicted: speed-up over plain decoding, prefill not counted.
    """

    draft: DraftConfig
    vocabulary: int
    accept_length: float
    draft_steps: float
    predicted: float


@dataclasses.dataclass(frozen=True)
class PredictedTuning:
    """What was found.

    Attributes:
      settings: of each draft vocabulary the best single sequences, the best setting with each of the best look-ups, and
        that of each of the best trees.
      batches: batch size -> the best single sequence.
      costs: predicted, by draft vocabulary and batch size.
      acceptance: by draft vocabulary, as `tuning.Tuning.acceptance`.
      shallow: share of a plain step's bytes that are the shallow layers', by batch size.
      peak: bytes of the largest program that was compiled.
    """

    settings: list[PredictedSetting]
    batches: dict[int, PredictedSetting]
    costs: dict[int, dict[int, Costs]]
    acceptance: dict[int, float]
    shallow: dict[int, float]
    peak: float

    @property
    def best(self) -> PredictedSetting:
        return max(self.settings, key=lambda setting: setting.predicted)

    def decide(self, vocabulary: int, machine: str) -> DecideConfig:
        """What decode.json says about deciding how far to draft with a draft vocabulary. `machine`: the other one."""
        costs: list[RoundCosts] = [
            of_size.in_plain_steps(size, self.shallow[size]) for size, of_size in self.costs[vocabulary].items()
        ]
        return DecideConfig(tuple(costs), self.acceptance[vocabulary], machine)


def predicted_costs(
    singles: PartPredictor, trees: Mapping[int, PartPredictor], shapes: Sequence[TreeConfig], platform: str
) -> Costs:
    """The parts of rounds as `tuning.measure_costs` would measure them.

    Args:
      singles: predicts the parts where single sequences are drafted.
      trees: K -> the same where trees are.
      shapes: of the trees.
      platform: of the machine.
    """

    def verification(predictor: PartPredictor, width: int) -> float:
        return predictor.verification(width, compiled=False).seconds

    def of_tree(predictor: PartPredictor, width: int) -> float:
        # Before it, all of the tree's tokens go through the shallow layers together.
        return beginning + predictor.shallow(width - 1).seconds + verification(predictor, width)

    beginning, step = singles.beginning().seconds, singles.draft_step().seconds
    costs = Costs(singles.plain_step().seconds, step, {}, platform=platform)
    for count in DRAFT_LENGTHS:
        ending = singles.shallow().seconds + verification(singles, count + 1)
        costs.rounds[count] = beginning + count * step + ending
    for count in LOOKUP_LENGTHS:
        costs.lookup_rounds[count] = singles.looking_up(count).seconds + verification(singles, count + 1)
    for shape in shapes:
        predictor = trees[shape.topk]
        level = costs.tree_levels[shape.topk] = predictor.draft_step(shape.topk).seconds
        for levels in {*DRAFT_LENGTHS, *range(1, LEVELS + 1)}:
            width = 1 + shape.drafted(levels)
            costs.tree_verifications[width] = of_tree(predictor, width)
        # The first level drafts on from one token.
        growth = predictor.draft_step().seconds + (LEVELS - 1) * level
        costs.tree_rounds[shape] = growth + costs.tree_verifications[1 + shape.drafted(LEVELS)]
    return costs


def search(
    recordings: Mapping[int, Sequence[Recording]],
    costs: Mapping[int, Costs],
    drafts: Sequence[DraftConfig],
    count: int,
    *,
    lookups: bool = False,
) -> list[PredictedSetting]:
    """The best of `drafts` by predicted speed: of each draft vocabulary, as `best_of` of `count`.

    Args:
      recordings: draft vocabulary's size -> what the target accepts.
      costs: the same for what rounds cost.
      drafts: settings that are considered.
      count: how many of each kind.
      lookups: whether the best single sequences are considered with look-ups too.
    """
    found = []
    for vocabulary, recorded in recordings.items():
        speeds = {draft: predict(recorded, costs[vocabulary], draft) for draft in drafts}
        if lookups:
            looking_up = with_lookups(best_of(speeds, WITH_LOOKUPS))
            speeds |= {draft: predict(recorded, costs[vocabulary], draft) for draft in looking_up}
        for draft in best_of(speeds, count):
            steps, committed = mean_round(recorded, draft)
            found.append(PredictedSetting(draft, vocabulary, committed, steps, speeds[draft]))
    return found


def tune_for(
    there: There,
    target: Target,
    adapter: TrainedAdapter,
    exit_layer: int,
    prompts: Sequence[list[int]],
    trees: Sequence[DraftConfig],
    count: int,
    batch_sizes: Sequence[int],
    progress: Progress = silent,
) -> PredictedTuning:
    """Predicts all settings for one adapter.

    Args:
      there: the other machine.
      target: the adapter's, on this machine.
      adapter: to tune.
      exit_layer: number of shallow layers.
      prompts: calibration prompts, token ids.
      trees: from `tuning.settings_of_trees`.
      count: of the best settings that are returned, of single sequences, look-ups and trees.
      batch_sizes: that the best single sequence is also found for; 1 is among them in any case.
      progress: shows how far each of the phases is.

    Raises:
      InputError: for a tree that is wider than what can be drafted.
      MachineError: where decoding does not fit the machine, or the compiler fails.
    """
    variants = _vocabularies(adapter, target.config.vocab_size)
    sizes, shapes = sorted({1, *batch_sizes}), sorted({draft.tree for draft in trees}, key=dataclasses.astuple)
    single = DraftConfig(exit_layer, DRAFT_LENGTHS[-1])
    # Another budget is another width of verification, which is predicted from the same program.
    deepest = {draft.tree: draft.max_draft_len for draft in sorted(trees, key=lambda draft: draft.max_draft_len)}
    widest = {shape.topk: dataclasses.replace(single, max_draft_len=deepest[shape], tree=shape) for shape in shapes}
    jobs = [(vocabulary, size, draft) for vocabulary in variants for size in sizes for draft in [single]]
    jobs += [(vocabulary, 1, draft) for vocabulary in variants for draft in widest.values()]
    predictors, peaks, shallow, plain = {}, {}, {}, {}
    launches = there.machine.limits.launch > 0
    for vocabulary, size, draft in progress(jobs, "predicting costs", "program"):
        work, launched = there.work(target, variants[vocabulary], draft, size), None
        # What programs launch takes time on GPUs alone. Elsewhere one of each size is compiled, to see that it fits.
        if launches or size not in peaks:
            if size not in peaks:
                peaks[size] = _fitting(there.machine, work.no_room() or work.prefill(), size)
            rounds = work.rounds()
            peaks[size] = max(peaks[size], _fitting(there.machine, rounds, size))
        if launches:
            plain[size] = plain.get(size) or work.plain_rounds()
            launched = RoundWork.of(plain[size].body, rounds.body)
        predictors[vocabulary, size, draft] = work.predictor(launched)
        shallow[size] = work.num_bytes.shallow / work.num_bytes.plain_step
    costs = {
        vocabulary: {
            size: predicted_costs(
                predictors[vocabulary, size, single],
                {topk: predictors[vocabulary, size, draft] for topk, draft in widest.items() if size == 1},
                shapes if size == 1 else [],
                there.machine.platform,
            )
            for size in sizes
        }
        for vocabulary in variants
    }
    pairs = [(vocabulary, ids) for vocabulary in variants for ids in prompts]
    recordings = {vocabulary: [] for vocabulary in variants}
    for vocabulary, ids in progress(pairs, "recording acceptance", "prompt"):
        recordings[vocabulary].append(record_all(target, variants[vocabulary], ids, trees, there.max_new_tokens))
    singles = single_sequences()
    batches = {}
    for size in sizes:
        best = search(recordings, {vocabulary: costs[vocabulary][size] for vocabulary in variants}, singles, 1)
        batches[size] = max(best, key=lambda setting: setting.predicted)
    alone = {vocabulary: costs[vocabulary][1] for vocabulary in variants}
    best = {setting.vocabulary: setting.draft for setting in search(recordings, alone, singles, 1)}
    return PredictedTuning(
        search(recordings, alone, [*singles, *trees], count, lookups=True),
        batches,
        costs,
        {vocabulary: acceptance(recordings[vocabulary], draft) for vocabulary, draft in best.items()},
        shallow,
        max(peaks.values()),
    )


def _vocabularies(adapter: TrainedAdapter, vocab_size: int) -> dict[int, TrainedAdapter]:
    """The adapter as it is, and drafting from the complete vocabulary, by how many tokens that is."""
    variants = {adapter.model.num_tokens(vocab_size): adapter}
    if adapter.model.draft_vocabulary is not None:
        complete = nnx.clone(adapter.model)
        complete.draft_vocabulary = None
        variants[vocab_size] = dataclasses.replace(adapter, model=complete)
    return variants


def _fitting(machine: Machine, program: Program, batch_size: int) -> float:
    """The program's peak; raises `MachineError` where that is more than a device has."""
    if program.no_room is not None or (machine.memory is not None and program.peak > machine.memory):
        why = program.no_room or f"{program.peak / 2**30:.2f} GiB of {machine.memory / 2**30:.2f}"
        raise MachineError(f"machine {machine.name}: decoding a batch of {batch_size} does not fit ({why})")
    return program.peak
