"""What each part of decoding costs, against the machine's limits and what preflight's model predicts from them, and the
speed-up that follows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int

from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.benchmark_prompts import held_out_tokens
from kangaroo_jax.bench.random_weights import random_weights
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, check_exit_layer
from kangaroo_jax.checkpoint.known_models import SHAPES
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, TreeConfig
from kangaroo_jax.engine.part_costs import PartTimes
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel
from kangaroo_jax.preflight import machines
from kangaroo_jax.preflight.prediction import Part, PartPredictor

_ROOM = 128  # positions in the caches beyond the context


@dataclasses.dataclass(frozen=True)
class MeasuredModel:
    """A target and an adapter, and a text that contexts are cut from.

    Attributes:
      model: the target's weights.
      adapter: the adapter's weights.
      exit_layer: number of shallow layers.
      text: token ids; repeated where a context is longer.
    """

    model: TargetModel
    adapter: Adapter
    exit_layer: int
    text: Int[np.ndarray, " text"]

    def context(self, batch: int, length: int) -> parts.Context:
        """`batch` sequences of `length` tokens before the measured position."""
        tokens = np.resize(self.text, (batch, length)).astype(np.int32)
        return parts.Context(self.model, self.adapter, self.exit_layer, tokens, parts.rounded_capacity(length + _ROOM))


def model_of_shape(shape: str, exit_layer: int, dtype: str) -> MeasuredModel:
    """Random weights of a shape in `SHAPES`.

    Raises:
      InputError: for an exit layer that is out of range, or weights that the device cannot hold.
    """
    check_exit_layer(exit_layer, SHAPES[shape])
    model, adapter = random_weights(shape, dtype)
    return MeasuredModel(model, adapter, exit_layer, np.arange(SHAPES[shape].vocab_size, dtype=np.int32))


def model_of_target(target: Target, adapter: TrainedAdapter, exit_layer: int) -> MeasuredModel:
    """A target on held-out text. `exit_layer` is for an adapter that does not record its own."""
    vocabulary = np.arange(target.config.vocab_size, dtype=np.int32)
    text = vocabulary if target.tokenizer is None else held_out_tokens(target)
    return MeasuredModel(target.model, adapter.model, adapter.exit_layer or exit_layer, text)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the machine can do.

    Attributes:
      num_bytes: the working set that bandwidths are for: what a plain step reads.
      read: bytes per second.
      copy: bytes per second, read and written together.
      products: floating-point operations per second of large matrix products.
      few_rows: the same of products of a few rows.
    """

    num_bytes: int
    read: float
    copy: float
    products: float
    few_rows: float


def measure_limits(context: parts.Context) -> Limits:
    """The limits for a context's working set and dtype."""
    num_bytes, dtype = context.bytes.plain_step, context.model.dtype
    return Limits(
        num_bytes,
        machine.read_bandwidth(num_bytes, dtype),
        machine.copy_bandwidth(num_bytes),
        machine.matmul_peak(dtype),
        machine.few_rows_peak(num_bytes, dtype),
    )


def predictor(context: parts.Context, limits: Limits) -> PartPredictor:
    """Preflight's model of the parts, with measured limits in place of a maker's, and nothing to start."""
    dtype = str(context.model.dtype)
    here = machines.Limits(limits.read, {dtype: limits.few_rows})
    return PartPredictor(here, dtype, context.bytes, context.operations, None)


@dataclasses.dataclass(frozen=True)
class PartCost:
    """One part: its name, its seconds, the bytes it reads, and the seconds that the model predicts."""

    name: str
    seconds: float
    num_bytes: int
    predicted: float


Report = Callable[[PartCost], None]


def measure_parts(
    context: parts.Context,
    widths: Sequence[int],
    max_draft_len: int,
    limits: Limits,
    report: Report,
    draft_vocabulary: int = 0,
) -> PartTimes:
    """Times the parts of single sequences.

    Args:
      context: what to measure.
      widths: of verification passes, besides that of a full round.
      max_draft_len: gamma.
      limits: of the machine.
      report: called with each part as soon as it is measured, the plain step first.
      draft_vocabulary: size of a draft vocabulary to measure a draft step with as well; 0 for none.
    """
    model = predictor(context, limits)
    plain = parts.plain_step_seconds(context)
    report(_cost(plain, model.plain_step()))
    shallow, draft_step = _shallow_and_draft_step(context, max_draft_len)
    report(_cost(shallow, model.shallow()))
    report(_cost(draft_step, model.draft_step()))
    reduced_step = None
    if draft_vocabulary:
        reduced = context.with_draft_vocabulary(draft_vocabulary)
        _, reduced_step = _shallow_and_draft_step(reduced, max_draft_len)
        report(_cost(reduced_step, predictor(reduced, limits).draft_step(), f"with {draft_vocabulary} tokens"))
    verification = {}
    for width in sorted({*widths, max_draft_len + 1}):
        verification[width] = parts.verification_seconds(context, width)
        report(_cost(verification[width], model.verification(width, compiled=True)))
    return PartTimes(plain, shallow, draft_step, reduced_step, verification)


def _cost(seconds: float, predicted: Part, name: str = "") -> PartCost:
    return PartCost(name or predicted.name, seconds, predicted.num_bytes, predicted.seconds)


def _shallow_and_draft_step(context: parts.Context, max_draft_len: int) -> tuple[float, float]:
    several = max(2, max_draft_len)
    one, all_drafts = parts.draft_seconds(context, 1), parts.draft_seconds(context, several)
    draft_step = (all_drafts - one) / (several - 1)
    return one - draft_step, draft_step


def measure_trees(
    context: parts.Context, trees: Sequence[TreeConfig], levels: int, limits: Limits, report: Report
) -> None:
    """Times one more level for each K, and the verification of each tree.

    Args:
      context: from `with_room_for`.
      trees: to measure.
      levels: depth of the trees, at least 2.
      limits: of the machine.
      report: called with each part as soon as it is measured.
    """
    model = predictor(context, limits)
    for topk in sorted({tree.topk for tree in trees}):
        one, deep = (parts.growth_seconds(context, topk, depth) for depth in (1, levels))
        report(_cost((deep - one) / (levels - 1), model.draft_step(topk), f"tree level of {topk}"))
    several = len({tree.topk for tree in trees}) > 1
    for tree in trees:
        seconds = parts.tree_verification_seconds(context, tree, levels)
        name = f"verification of tree {tree.drafted(levels)}" + (f", K {tree.topk}" if several else "")
        report(_cost(seconds, model.verification(1 + tree.drafted(levels), compiled=True), name))


@dataclasses.dataclass(frozen=True)
class PrefillCost:
    """Prefill of a context: its tokens per sequence, seconds, and the operations of its layers' matrix products."""

    length: int
    seconds: float
    operations: int


def measure_prefill(context: parts.Context) -> PrefillCost:
    """Times prefill."""
    batch, length = context.tokens.shape
    weights = sum(x.size for x in jax.tree.leaves(list(context.model.layers)) if x.ndim > 1)
    return PrefillCost(length, parts.prefill_seconds(context), 2 * batch * length * weights)


@dataclasses.dataclass(frozen=True)
class RoundCost:
    """A complete round that drafts `drafts` tokens, or levels of `tree`: its seconds, the sum of its parts' seconds
    (None for a tree), and the seconds that the model predicts."""

    drafts: int
    tree: TreeConfig | None
    seconds: float
    parts_seconds: float | None
    predicted: float


def measure_rounds(context: parts.Context, times: PartTimes, max_draft_len: int, limits: Limits) -> Iterator[RoundCost]:
    """Complete rounds of single sequences, of the draft lengths that fill a verification pass."""
    widths = parts.verification_widths(DraftConfig(None, max_draft_len))
    model = predictor(context, limits)
    for drafts in sorted({1, *(width - 1 for width in widths)}):
        seconds, predicted = parts.round_seconds(context, drafts), model.round_seconds(drafts)
        yield RoundCost(drafts, None, seconds, times.round_seconds(drafts), predicted)


def measure_tree_rounds(
    context: parts.Context, trees: Sequence[TreeConfig], levels: int, limits: Limits
) -> Iterator[RoundCost]:
    """Complete rounds of trees; `context` is from `with_room_for`."""
    model = predictor(context, limits)
    for tree in trees:
        seconds, predicted = parts.round_seconds(context, levels, tree), model.round_seconds(levels, tree)
        yield RoundCost(levels, tree, seconds, None, predicted)


def with_room_for(context: parts.Context, trees: Sequence[TreeConfig], levels: int) -> parts.Context:
    """The same, with caches that hold what rounds of these trees write beyond the context.

    Raises:
      InputError: for a tree that is too wide for the adapter, or too deep for its budget.
    """
    settings = [DraftConfig(None, levels, tree=tree) for tree in trees]
    positions = max((parts.positions_per_round(context.adapter, draft) for draft in settings), default=0)
    capacity = max(context.capacity, parts.rounded_capacity(context.tokens.shape[1] + positions))
    return dataclasses.replace(context, capacity=capacity)


@dataclasses.dataclass(frozen=True)
class Growth:
    """A plain step and a full round of `batch` sequences with `length` tokens each, and what the model predicts."""

    batch: int
    length: int
    plain_step: float
    plain_bytes: int
    round: float
    predicted_plain_step: float
    predicted_round: float


def measure_growth(
    model: MeasuredModel, settings: Sequence[tuple[int, int]], max_draft_len: int, limits: Limits
) -> Iterator[Growth]:
    """How the times grow with batch and context: a row per (batch, length)."""
    for batch, length in settings:
        context = model.context(batch, length)
        predicted = predictor(context, limits)
        yield Growth(
            batch,
            length,
            parts.plain_step_seconds(context),
            context.bytes.plain_step,
            parts.round_seconds(context, max_draft_len),
            predicted.plain_step().seconds,
            predicted.round_seconds(max_draft_len),
        )
