"""What the measured parts read, and that a turn of each does the work in its name: positions of the caches written."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import TreeConfig
from kangaroo_jax.bench import parts, roofline_costs
from kangaroo_jax.engine.part_costs import PartCounts
from kangaroo_jax.model.drafts.memory import MemoryAdapter
from kangaroo_jax.program import matmul_operations
from tests.bench.models import CONFIG, EXIT_LAYER, small_adapter, small_target

CAPACITY, LENGTH = 128, 20  # no other axis of a cache is as long as CAPACITY
TREE = TreeConfig(topk=3, budget=7)


@pytest.fixture(scope="module")
def context():
    tokens = np.arange(LENGTH, dtype=np.int32)[None] % CONFIG.vocab_size
    return parts.Context(small_target().model, small_adapter().model, EXIT_LAYER, tokens, CAPACITY)


def test_bytes_are_those_of_the_shapes(context):
    hidden, heads, kv, width = 32, 4, 2, 8
    attention = hidden * (heads + 2 * kv) * width + heads * width * hidden
    layer = attention + 3 * hidden * 48 + 2 * hidden
    cache = 2 * kv * width * CAPACITY
    head = 100 * hidden
    assert context.bytes == PartCounts(
        plain_step=4 * (2 * (layer + cache) + head),
        shallow=4 * (layer + cache),
        draft_step=4 * (layer + cache + attention + 2 * hidden + cache + head),
        verification=4 * (layer + cache + head),
        head=4 * head,
        adapter=4 * (attention + 2 * hidden + cache),
    )


def test_operations_are_those_of_the_traced_parts(context):
    """Each of a turn's products, counted in its jaxpr. Drafting counts two draft steps (the first token's, and one turn
    of the loop) and one more pass of the shallow layers; its first step processes two positions."""
    model, adapter, found = context.model, context.adapter, context.operations

    def traced(part):
        return matmul_operations(jax.jit(part.turn).trace(model, adapter, part.start).jaxpr.jaxpr)

    assert found.plain_step == traced(parts.plain_step(context))
    assert 5 * found.verification == traced(parts.verification(context, 5))
    again = found.draft_step - found.shallow - found.head  # the position before, in the adapter alone
    assert 2 * found.draft_step + found.shallow + again == traced(parts.draft_phase(context, 3))


def test_predictions_with_measured_limits_are_those_counted_by_hand(context):
    """At 1000 bytes and, with a few rows, 2000 operations per second."""
    limits = roofline_costs.Limits(0, read=1000.0, copy=1.0, products=1.0, few_rows=2000.0)
    found = roofline_costs.predictor(context, limits)
    attention, mlp, head, cache = 32 * 64 + 32 * 32, 3 * 32 * 48, 100 * 32, 2 * 2 * 8 * CAPACITY
    read = 4 * (attention + mlp + 2 * 32 + cache)  # of a layer; two queries share each key, and each value
    work = 2 * (attention + mlp) + 2 * 2 * cache
    assert found.plain_step().seconds == max((2 * read + 4 * head) / 1000, (2 * work + 2 * head) / 2000)
    assert found.shallow().seconds == max(read / 1000, work / 2000)
    verified = {width: max((read + 4 * head) / 1000, width * (work + 2 * head) / 2000) for width in (2, 7)}
    assert verified[7] == 7 * (work + 2 * head) / 2000 > verified[2]
    assert {n: found.verification(n, compiled=True).seconds for n in verified} == verified
    drafted = read + 4 * (attention + 2 * 32 + cache + head), work + 2 * attention + 2 * 2 * cache + 2 * head
    step = {rows: max(drafted[0] / 1000, rows * drafted[1] / 2000) for rows in (1, 3)}
    assert found.round_seconds(6) == pytest.approx(6 * step[1] + found.shallow().seconds + verified[7])
    tree = step[1] + step[3] + found.shallow(6).seconds + found.verification(7, compiled=True).seconds
    assert found.round_seconds(2, TreeConfig(3, 6)) == pytest.approx(tree)


def test_a_draft_vocabulary_replaces_the_head_of_a_draft_step(context):
    reduced = context.with_draft_vocabulary(16)
    rows, ids = 4 * 16 * 32, 4 * 16
    assert reduced.bytes.draft_step == context.bytes.draft_step - 4 * 100 * 32 + rows + ids
    assert reduced.bytes.verification == context.bytes.verification


# Part -> positions that one turn writes in the shallow layers' caches, and in the deep layers'.
WORK = {
    "plain step": (parts.plain_step, (), 1, 1),
    "draft of 1": (parts.draft_phase, (1,), 2, 0),
    "draft of 5": (parts.draft_phase, (5,), 6, 0),
    "verification of 3": (parts.verification, (3,), 0, 3),
    "round of 5": (parts.complete_round, (5,), 6, 6),
    "look-up of 5": (parts.lookup_round, (5,), 6, 6),
    "tree growth to 1 level": (parts.tree_growth, (3, 1), 1, 0),
    "tree growth to 4 levels": (parts.tree_growth, (3, 4), 1 + 3 * 3, 0),
    "verification of a tree": (parts.tree_verification, (TREE, 3), None, 1 + 7),
    "round of a tree": (parts.complete_round, (3, TREE), None, 1 + 7),
}


LONG = ("draft of 1", "tree growth to 1 level", "round of a tree")


@pytest.mark.parametrize("name", [pytest.param(x, marks=pytest.mark.long if x in LONG else ()) for x in WORK])
def test_a_turn_does_the_work_of_its_part_and_sets_the_lengths_back(context, name):
    make, arguments, shallow, deep = WORK[name]
    part = make(context, *arguments)
    before, after = part.start, jax.jit(part.turn)(context.model, context.adapter, part.start)
    if isinstance(before, tuple):
        before, after = before[0], after[0]
    # The accepted path of a tree is moved, in the shallow caches too.
    assert shallow is None or positions_written(before.shallow, after.shallow) == shallow
    assert positions_written(before.deep, after.deep) == deep
    for cache in ("shallow", "deep"):
        assert getattr(after, cache).length.tolist() == getattr(before, cache).length.tolist()
    assert after.num_output.tolist() == before.num_output.tolist()
    assert after.finished.tolist() == before.finished.tolist()


def test_each_turn_of_a_look_up_finds_its_tokens(context):
    part = parts.lookup_round(context, 5)
    turn = jax.jit(part.turn)
    after = turn(context.model, context.adapter, turn(context.model, context.adapter, part.start))
    assert after.token.tolist() == part.start.token.tolist()  # else the text's last token may not stand in it before


@pytest.mark.long
def test_parts_of_a_draft_model_with_a_state_of_its_own(context):
    adapter = MemoryAdapter(CONFIG, rngs=nnx.Rngs(1))
    remembering = dataclasses.replace(context, adapter=adapter)
    for make, arguments, _, _ in WORK.values():
        part = make(remembering, *arguments)
        jax.eval_shape(part.turn, remembering.model, adapter, part.start)


def positions_written(before, after) -> int:
    written = np.zeros(CAPACITY, bool)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        if CAPACITY in old.shape:
            axis = old.shape.index(CAPACITY)
            written |= np.any(np.moveaxis(np.asarray(old != new), axis, 0).reshape(CAPACITY, -1), axis=1)
    return int(written.sum())


def test_seconds_are_the_median_of_a_loops_time_over_its_turns(monkeypatch):
    """On a clock that says how long each loop took; the call that compiles is not timed."""
    took = iter([5.0, 1.0, 2.0, 6.0, 4.0, 7.0, 3.0])
    clock, running = [0.0], [False]

    def perf_counter():
        if running[0]:
            clock[0] += next(took) * parts._TURNS
        running[0] = not running[0]
        return clock[0]

    monkeypatch.setattr(parts, "time", types.SimpleNamespace(perf_counter=perf_counter))
    part = parts.Part(jax.numpy.zeros(()), lambda model, adapter, state: state + model)
    context = parts.Context(1.0, None, 1, np.zeros((1, 1), np.int32), CAPACITY)
    assert parts.seconds_of(part, context) == 4.0
