"""What each part of decoding costs, against the machine's limits, and the speed-up that follows.

    python -m kangaroo_jax.bench roofline                            the demo
    python -m kangaroo_jax.bench roofline --shape=llama7b            random weights of a known shape
    python -m kangaroo_jax.bench roofline --model=... --adapter=... --contexts=512,2048 --batch_sizes=1,8

Prints the measured limits, a table of the parts (plain step, shallow pass, draft step, verification by width, prefill;
of trees a level and the verification by budget), the speed-up by mean accept length that they imply, and complete
rounds, those of single sequences against the sum of their parts. With several contexts or batch sizes, a table of how
the times grow. Beside the times stands what the model of docs/preflight.md predicts from the limits that were measured
here, and how far that is off.
"""

from __future__ import annotations

import itertools

from absl import flags

from kangaroo_jax import TreeConfig, compilation_cache
from kangaroo_jax.bench import machine, parts, roofline_costs
from kangaroo_jax.bench.roofline_costs import Limits, MeasuredModel, PartCost
from kangaroo_jax.checkpoint.known_models import SHAPES
from kangaroo_jax.checkpoint.target import default_dtype
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.cli.speedup_table import print_speedups
from kangaroo_jax.engine.part_costs import PartTimes
from kangaroo_jax.errors import InputError

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_SHAPE = flags.DEFINE_enum("shape", None, sorted(SHAPES), "Random weights of this shape in place of a model.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", 2, "Shallow layers, for --shape or an adapter that records none.")
_DTYPE = shared_flags.define_dtype()
_CONTEXTS = flags.DEFINE_list("contexts", ["256"], "Tokens before the measured position; the table is of the first.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1"], "Sequences; the table is of the first.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", 6, "gamma of the rounds.")
_DRAFT_VOCABULARY = flags.DEFINE_integer("draft_vocabulary", 0, "Tokens in a draft vocabulary to measure as well.")
_WIDTHS = flags.DEFINE_list("widths", ["1", "2", "3", "5", "7", "9", "13", "16"], "Verification widths.")
_TREES = shared_flags.define_trees((TreeConfig().topk,), (16, 32, 64))


def main() -> None:
    contexts, batches, widths = (shared_flags.counts(flag) for flag in (_CONTEXTS, _BATCH_SIZES, _WIDTHS))
    shared_flags.check_positive(_MAX_DRAFT_LEN)
    gamma, levels = _MAX_DRAFT_LEN.value, max(2, _MAX_DRAFT_LEN.value)
    trees = [TreeConfig(topk, budget) for topk, budget in itertools.product(*_TREES.shapes())]
    compilation_cache.enable()
    model, name = _model()
    vocabulary = model.model.config.vocab_size
    if not 0 <= _DRAFT_VOCABULARY.value <= vocabulary:
        raise InputError(
            f"--draft_vocabulary: expected 0 to {vocabulary} (the vocabulary), found {_DRAFT_VOCABULARY.value}"
        )
    context = model.context(batches[0], contexts[0])
    tree_context = roofline_costs.with_room_for(context, trees, levels)  # names an impossible tree before the work
    print(machine.describe())
    print(
        f"{name}, {context.model.dtype}, exit layer {context.exit_layer} of {context.model.config.num_hidden_layers}, "
        f"batch {batches[0]}, context {contexts[0]}, caches of {context.capacity}"
    )
    limits = roofline_costs.measure_limits(context)
    table = _PartTable(limits)
    times = roofline_costs.measure_parts(context, widths, gamma, limits, table.add, _DRAFT_VOCABULARY.value)
    roofline_costs.measure_trees(tree_context, trees, levels, limits, table.add)
    _print_prefill(roofline_costs.measure_prefill(context), times, limits)
    if times.reduced_draft_step is not None:
        ratio = times.reduced_draft_step / times.draft_step
        print(f"draft step with a draft vocabulary: {ratio:.2f} of the time with the complete head")
    print(
        f"\na round of {gamma} drafts costs {times.round_cost(gamma):.2f} plain steps; speed-up by mean accept length:"
    )
    print_speedups(times, gamma)
    _print_rounds(context, times, gamma, limits)
    for cost in roofline_costs.measure_tree_rounds(tree_context, trees, levels, limits):
        shape = f"of {cost.drafts} levels, {cost.tree.drafted(cost.drafts)}"
        plain_steps = cost.seconds / times.plain_step
        print(
            f"{shape:24}{cost.seconds * 1e3:9.3f}{'':18}{_predicted(cost)}   {plain_steps:.2f} plain steps", flush=True
        )
    if len(contexts) * len(batches) > 1:
        _print_growth(model, list(itertools.product(batches, contexts)), gamma, limits)


def _model() -> tuple[MeasuredModel, str]:
    """What the flags name, and how to call it."""
    if _SHAPE.value:
        if _MODEL.value or _ADAPTER.value:
            raise InputError("--shape and --model were both given; give one")
        dtype = _DTYPE.value or default_dtype()
        measured = roofline_costs.model_of_shape(_SHAPE.value, _EXIT_LAYER.value, dtype)
        return measured, f"{_SHAPE.value} with random weights"
    target = load_target_of(_MODEL.value, _DTYPE.value)
    adapter = load_adapter_of(target, _ADAPTER.value)
    return roofline_costs.model_of_target(target, adapter, _EXIT_LAYER.value), _MODEL.value or "the demo"


class _PartTable:
    """Prints a line per part; ratios are to the first, the plain step, and to the machine's limits."""

    def __init__(self, limits: Limits):
        self._limits, self._plain = limits, None
        print(
            f"\nlimits for a working set of {limits.num_bytes / 1e6:.1f} MB: read {limits.read / 1e9:.1f} GB/s, "
            f"copy {limits.copy / 1e9:.1f} GB/s; matrix products {limits.products / 1e9:.0f} GFLOP/s, with a few rows "
            f"{limits.few_rows / 1e9:.0f}\n"
        )
        header = f"{'part':24}{'ms':>9}{'of plain':>10}{'MB read':>10}{'of plain':>10}"
        print(f"{header}{'GB/s':>8}{'of read':>9}{'of copy':>9}{_PREDICTED}")

    def add(self, cost: PartCost) -> None:
        plain = self._plain = self._plain or cost
        rate = cost.num_bytes / cost.seconds
        print(
            f"{cost.name:24}{cost.seconds * 1e3:9.3f}{cost.seconds / plain.seconds:10.3f}{cost.num_bytes / 1e6:10.1f}"
            f"{cost.num_bytes / plain.num_bytes:10.3f}{rate / 1e9:8.1f}{rate / self._limits.read:9.0%}"
            f"{rate / self._limits.copy:9.0%}{_predicted(cost)}",
            flush=True,
        )


def _print_prefill(cost: roofline_costs.PrefillCost, times: PartTimes, limits: Limits) -> None:
    rate = cost.operations / cost.seconds
    print(
        f"{f'prefill of {cost.length}':24}{cost.seconds * 1e3:9.3f}{cost.seconds / times.plain_step:10.3f}   "
        f"{rate / 1e9:.0f} GFLOP/s in the layers' products, {rate / limits.products:.0%} of the peak"
    )


_PREDICTED = f"{'predicted':>11}{'off':>6}"


def _predicted(cost: PartCost | roofline_costs.RoundCost) -> str:
    """Two columns: what preflight's model predicts in ms, and how far that is off."""
    return f"{cost.predicted * 1e3:11.3f}{cost.predicted / cost.seconds - 1:6.0%}"


def _print_rounds(context: parts.Context, times: PartTimes, max_draft_len: int, limits: Limits) -> None:
    print(f"\n{'round':24}{'ms':>9}{'parts ms':>10}{'over':>8}{_PREDICTED}")
    for cost in roofline_costs.measure_rounds(context, times, max_draft_len, limits):
        print(
            f"{f'of {cost.drafts} drafts':24}{cost.seconds * 1e3:9.3f}{cost.parts_seconds * 1e3:10.3f}"
            f"{cost.seconds / cost.parts_seconds - 1:8.0%}{_predicted(cost)}",
            flush=True,
        )


def _print_growth(model: MeasuredModel, settings: list[tuple[int, int]], max_draft_len: int, limits: Limits) -> None:
    print(
        f"\n{'batch':>6}{'context':>9}{'plain step ms':>15}{'off':>6}{'per token ms':>14}{'MB read':>9}{'GB/s':>7}"
        f"{f'round of {max_draft_len} ms':>16}{'off':>6}{'plain steps':>13}"
    )
    for row in roofline_costs.measure_growth(model, settings, max_draft_len, limits):
        plain, rounds = row.predicted_plain_step / row.plain_step - 1, row.predicted_round / row.round - 1
        print(
            f"{row.batch:6}{row.length:9}{row.plain_step * 1e3:15.3f}{plain:6.0%}"
            f"{row.plain_step / row.batch * 1e3:14.3f}{row.plain_bytes / 1e6:9.1f}"
            f"{row.plain_bytes / row.plain_step / 1e9:7.1f}{row.round * 1e3:16.3f}{rounds:6.0%}"
            f"{row.round / row.plain_step:13.2f}",
            flush=True,
        )
