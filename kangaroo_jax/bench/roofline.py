"""What each part of decoding costs, against the machine's limits, and the speed-up that follows.

    python -m kangaroo_jax.bench roofline                            the demo
    python -m kangaroo_jax.bench roofline --shape=llama7b            random weights of a known shape
    python -m kangaroo_jax.bench roofline --model=... --adapter=... --contexts=512,2048 --batch_sizes=1,8

Prints the measured limits, a table of the parts (plain step, shallow pass, draft step, verification by width, prefill;
of trees a level and the verification by budget), the speed-up by mean accept length that they imply, and whole rounds,
those of single sequences against the sum of their parts. With several contexts or batch sizes, a table of how the times
grow.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from kangaroo_jax import DraftConfig, TreeConfig, compilation_cache, demo, load_adapter, load_target
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.prompts import held_out_tokens
from kangaroo_jax.bench.shapes import random_weights
from kangaroo_jax.checkpoint.adapter import check_exit_layer
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.adapter import DraftVocabulary
from kangaroo_jax.shapes import SHAPES

_MODEL = flags.DEFINE_string("model", None, "Target; the demo if neither this nor --shape is given.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter of --model.")
_SHAPE = flags.DEFINE_enum("shape", None, sorted(SHAPES), "Random weights of this shape in place of a model.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", 2, "Shallow layers of --shape; an adapter says its own.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")
_CONTEXTS = flags.DEFINE_list("contexts", ["256"], "Tokens before the measured position; the first is looked into.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1"], "Sequences; the first is looked into.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", 6, "gamma of the rounds.")
_DRAFT_VOCABULARY = flags.DEFINE_integer("draft_vocabulary", 0, "Tokens in a draft vocabulary to measure as well.")
_WIDTHS = flags.DEFINE_list("widths", ["1", "2", "3", "5", "7", "9", "13", "16"], "Verification widths.")
_TREE_TOPK = flags.DEFINE_integer("tree_topk", TreeConfig().topk, "K of the trees.")
_TREE_BUDGETS = flags.DEFINE_list("tree_budgets", ["16", "32", "64"], "Budgets of trees; none if empty.")

Make = Callable[[int, int], parts.Context]

_ROOM = 128  # positions in the caches beyond the context


def main() -> None:
    contexts, batches, widths = (_counts(flag) for flag in (_CONTEXTS, _BATCH_SIZES, _WIDTHS))
    budgets = [] if _TREE_BUDGETS.value == [] else _counts(_TREE_BUDGETS)
    if _MAX_DRAFT_LEN.value < 1:
        raise InputError(f"--max_draft_len: expected at least 1, found {_MAX_DRAFT_LEN.value}")
    if _TREE_TOPK.value < 1:
        raise InputError(f"--tree_topk: expected at least 1, found {_TREE_TOPK.value}")
    trees = [TreeConfig(_TREE_TOPK.value, budget) for budget in budgets]
    compilation_cache.enable()
    make = _contexts()
    first = make(batches[0], contexts[0])
    if not 0 <= _DRAFT_VOCABULARY.value <= first.model.config.vocab_size:
        raise InputError(
            f"--draft_vocabulary: expected at most the vocabulary of {first.model.config.vocab_size}, "
            f"found {_DRAFT_VOCABULARY.value}"
        )
    with_room_for(first, trees, max(2, _MAX_DRAFT_LEN.value))  # trees that cannot be are named before the work begins
    print(machine.describe())
    print(
        f"{_name()}, {first.model.dtype}, exit layer {first.exit_layer} of {first.model.config.num_hidden_layers}, "
        f"batch {batches[0]}, context {contexts[0]}, caches of {first.capacity}"
    )
    report(first, widths, _MAX_DRAFT_LEN.value, trees)
    if len(contexts) * len(batches) > 1:
        print_growth(make, list(itertools.product(batches, contexts)), _MAX_DRAFT_LEN.value)


def _counts(flag: flags.FlagHolder[list[str]]) -> list[int]:
    if not flag.value or not all(value.isdecimal() and int(value) > 0 for value in flag.value):
        raise InputError(f"--{flag.name}: expected whole numbers above 0, found {','.join(flag.value)!r}")
    return [int(value) for value in flag.value]


def _name() -> str:
    return f"{_SHAPE.value} with random weights" if _SHAPE.value else _MODEL.value or "the demo"


def _contexts() -> Make:
    """(batch, context) -> what is measured: the flags' target with that many tokens before the measured position."""
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if _SHAPE.value:
        if _MODEL.value or _ADAPTER.value:
            raise InputError("--shape and --model were both given; give one")
        exit_layer, config = _EXIT_LAYER.value, SHAPES[_SHAPE.value]
        check_exit_layer(exit_layer, config)
        model, adapter = random_weights(_SHAPE.value, dtype)
        text = np.arange(config.vocab_size, dtype=np.int32)
    else:
        if (_MODEL.value is None) != (_ADAPTER.value is None):
            raise InputError("--model and --adapter belong together; give both, or neither for the demo")
        target = load_target(_MODEL.value or str(demo.MODEL), dtype)
        trained = load_adapter(_ADAPTER.value or str(demo.ADAPTER), target)
        model, adapter, exit_layer = target.model, trained.model, trained.exit_layer or _EXIT_LAYER.value
        vocabulary = np.arange(target.config.vocab_size, dtype=np.int32)
        text = vocabulary if target.tokenizer is None else held_out_tokens(target)

    def make(batch: int, context: int) -> parts.Context:
        tokens = np.resize(text, (batch, context)).astype(np.int32)
        capacity = 128 * math.ceil((context + _ROOM) / 128)
        return parts.Context(model, adapter, exit_layer, tokens, capacity)

    return make


def report(context: parts.Context, widths: list[int], max_draft_len: int, trees: Sequence[TreeConfig] = ()) -> None:
    """Limits, parts, implied speed-ups, and rounds against their parts. `trees` are of one K."""
    size, dtype, batch = context.bytes, context.model.dtype, len(context.tokens)
    reading, copying = machine.read_bandwidth(size.plain_step, dtype), machine.copy_bandwidth(size.plain_step)
    peak = machine.matmul_peak(dtype)
    print(
        f"\nlimits for a working set of {size.plain_step / 1e6:.1f} MB: read {reading / 1e9:.1f} GB/s, "
        f"copy {copying / 1e9:.1f} GB/s; matrix products {peak / 1e9:.0f} GFLOP/s\n"
    )
    print(f"{'part':24}{'ms':>9}{'of plain':>10}{'MB read':>10}{'of plain':>10}{'GB/s':>8}{'of read':>9}{'of copy':>9}")

    plain = parts.plain_step_seconds(context)

    def row(name: str, seconds: float, num_bytes: int) -> None:
        rate = num_bytes / seconds
        print(
            f"{name:24}{seconds * 1e3:9.3f}{seconds / plain:10.3f}{num_bytes / 1e6:10.1f}"
            f"{num_bytes / size.plain_step:10.3f}{rate / 1e9:8.1f}{rate / reading:9.0%}{rate / copying:9.0%}",
            flush=True,
        )

    row("plain step", plain, size.plain_step)
    one, several = parts.draft_seconds(context, 1), parts.draft_seconds(context, max(2, max_draft_len))
    draft_step = (several - one) / (max(2, max_draft_len) - 1)
    shallow = one - draft_step
    row("shallow pass", shallow, size.shallow)
    row("draft step", draft_step, size.draft_step)
    if _DRAFT_VOCABULARY.value:
        reduced = with_draft_vocabulary(context, _DRAFT_VOCABULARY.value)
        one, several = parts.draft_seconds(reduced, 1), parts.draft_seconds(reduced, max(2, max_draft_len))
        reduced_step = (several - one) / (max(2, max_draft_len) - 1)
        row(f"with {_DRAFT_VOCABULARY.value} tokens", reduced_step, reduced.bytes.draft_step)
        print(f"draft step with a draft vocabulary: {reduced_step / draft_step:.2f} of the whole head's")
    verification = {}
    for width in sorted({*widths, max_draft_len + 1}):
        verification[width] = parts.verification_seconds(context, width)
        row(f"verification of {width}", verification[width], size.verification)
    deeper = max(2, max_draft_len)
    of_trees = with_room_for(context, trees, deeper)
    if trees:
        topk = trees[0].topk
        one, several = (parts.growth_seconds(of_trees, topk, levels) for levels in (1, deeper))
        row(f"tree level of {topk}", (several - one) / (deeper - 1), of_trees.bytes.draft_step)
    for tree in trees:
        seconds = parts.tree_verification_seconds(of_trees, tree, deeper)
        row(f"verification of tree {tree.drafted(deeper)}", seconds, of_trees.bytes.verification)
    prefill, length = parts.prefill_seconds(context), context.tokens.shape[1]
    products = 2 * batch * length * sum(x.size for x in jax.tree.leaves(list(context.model.layers)) if x.ndim > 1)
    print(
        f"{f'prefill of {length}':24}{prefill * 1e3:9.3f}{prefill / plain:10.3f}   "
        f"{products / prefill / 1e9:.0f} GFLOP/s in the layers' products, {products / prefill / peak:.0%} of the peak"
    )

    cost = (max_draft_len * draft_step + shallow + verification[max_draft_len + 1]) / plain
    print(f"\na round of {max_draft_len} drafts costs {cost:.2f} plain steps; speed-up by mean accept length:")
    lengths = np.arange(2, 2 * max_draft_len + 3) / 2
    print("".join(f"{length:7.1f}" for length in lengths))
    print("".join(f"{length / cost:7.2f}" for length in lengths))

    print(f"\n{'round':24}{'ms':>9}{'parts ms':>10}{'over':>8}")
    for count in sorted({1, *(width - 1 for width in parts.verification_widths(DraftConfig(None, max_draft_len)))}):
        width = min(w for w in verification if w > count)
        whole = parts.round_seconds(context, count)
        total = count * draft_step + shallow + verification[width]
        print(f"{f'of {count} drafts':24}{whole * 1e3:9.3f}{total * 1e3:10.3f}{whole / total - 1:8.0%}", flush=True)
    for tree in trees:
        whole = parts.round_seconds(of_trees, deeper, tree)
        name = f"of {deeper} levels, {tree.drafted(deeper)}"
        print(f"{name:24}{whole * 1e3:9.3f}   {whole / plain:.2f} plain steps", flush=True)


def with_draft_vocabulary(context: parts.Context, size: int) -> parts.Context:
    """The same, drafting from `size` tokens only (any will do to time it)."""
    adapter = nnx.clone(context.adapter)
    adapter.draft_vocabulary = DraftVocabulary(context.model, jnp.arange(size))
    return dataclasses.replace(context, adapter=adapter)


def with_room_for(context: parts.Context, trees: Sequence[TreeConfig], levels: int) -> parts.Context:
    """The same, with caches that hold what rounds of these trees write beyond the context.

    Raises:
      InputError: for a tree that is too wide for the adapter, or too deep for its budget.
    """
    settings = [DraftConfig(None, levels, tree=tree) for tree in trees]
    slots = max((parts.positions_per_round(context.adapter, draft) for draft in settings), default=0)
    capacity = max(context.capacity, 128 * math.ceil((context.tokens.shape[1] + slots) / 128))
    return dataclasses.replace(context, capacity=capacity)


def print_growth(make: Make, settings: list[tuple[int, int]], max_draft_len: int) -> None:
    """How the times grow with batch and context."""
    print(
        f"\n{'batch':>6}{'context':>9}{'plain step ms':>15}{'per token ms':>14}{'MB read':>9}{'GB/s':>7}"
        f"{f'round of {max_draft_len} ms':>16}{'plain steps':>13}"
    )
    for batch, length in settings:
        context = make(batch, length)
        plain, whole = parts.plain_step_seconds(context), parts.round_seconds(context, max_draft_len)
        read = context.bytes.plain_step
        print(
            f"{batch:6}{length:9}{plain * 1e3:15.3f}{plain / batch * 1e3:14.3f}{read / 1e6:9.1f}"
            f"{read / plain / 1e9:7.1f}{whole * 1e3:16.3f}{whole / plain:13.2f}",
            flush=True,
        )
