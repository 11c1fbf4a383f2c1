"""The loop must not copy the cache at every step, nor compute again what all layers share. Truth: the program that XLA
compiled, searched for copies of a buffer of the cache's shape, and for cosines. (How long a step takes at two cache
sizes is measured by bench/, not here.)"""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.config import LookupConfig, RoundCosts, TreeConfig
from kangaroo_jax.decode.decide import Costs
from kangaroo_jax.decode.prefill import Admission, empty_slots, prefill_and_admit
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel
from tests.decode.models import CONFIG, tiny_adapter, tiny_target

CAPACITY, RING = 1000, 137
_TREE = TreeConfig(3, 8)
EOS = np.full(4, -1, np.int32)


def compiled_text(shape, adapter, donate, batch=1, costs=None, model=None, rings=()):
    model = model or tiny_target().model
    empty = functools.partial(
        empty_slots,
        batch=batch,
        max_eos=4,
        exit_layer=shape.exit_layer,
        capacity=CAPACITY,
        backend=CpuBackend(),
        looks_up=shape.lookup is not None,
        kept=shape.kept,
        rings=rings,
    )
    state = jax.eval_shape(empty, model, adapter)
    rounds = functools.partial(run_rounds, shape=shape, sampled=False, tokens=32)
    program = jax.jit(rounds, donate_argnums=(2,) if donate else ())
    return program.lower(model, adapter, state, np.ones(batch, bool), np.float32(0.5), 0, 32, costs).compile().as_text()


def cache_copies(text, batch=1, capacity=CAPACITY):
    rows, width = batch * CONFIG.num_key_value_heads, CONFIG.head_dim
    shape = rf"f32\[{rows},(?:{width},{capacity}|{capacity},{width})\]"  # keys, values
    assert re.search(shape + r"\S* (dynamic-update-slice|fusion)\(", text), "the cache is not in the program"
    return re.findall(rf"= {shape}\S* copy\(", text)


@pytest.mark.parametrize(
    ("widths", "batch", "tree", "kind"),
    [
        pytest.param((7,), 1, None, "kangaroo", marks=pytest.mark.long),
        ((2, 4, 7), 1, None, "kangaroo"),
        pytest.param((7,), 2, None, "kangaroo", marks=pytest.mark.long),
        pytest.param((4, 9), 1, _TREE, "kangaroo", marks=pytest.mark.long),
        pytest.param((9,), 2, _TREE, "kangaroo", marks=pytest.mark.long),
        pytest.param((2, 4, 7), 1, None, "memory", marks=pytest.mark.long),
        pytest.param((4, 9), 2, _TREE, "memory", marks=pytest.mark.long),
    ],
)
def test_rounds_with_a_draft_model_do_not_copy_the_cache(widths, batch, tree, kind):
    shape = RoundShape(2, 6, tree, widths)
    adapter = tiny_adapter(2, kind=kind).model
    assert cache_copies(compiled_text(shape, adapter, donate=True, batch=batch), batch) == []


@pytest.mark.long
@pytest.mark.parametrize("batch", [1, 2])
def test_rounds_that_look_up_do_not_copy_the_cache(batch):
    lookup = LookupConfig(8)
    shape = RoundShape(2, 6, None, (4, 7, 9), lookup)
    assert cache_copies(compiled_text(shape, tiny_adapter(2).model, donate=True, batch=batch), batch) == []
    assert cache_copies(compiled_text(RoundShape.plain(lookup), None, donate=True, batch=batch), batch) == []


@pytest.mark.long
@pytest.mark.parametrize(
    ("batch", "lookup", "kind"),
    [
        (1, None, "kangaroo"),
        (2, None, "memory"),
        (1, LookupConfig(8), "memory"),
        (2, LookupConfig(8), "kangaroo"),
        (16, None, "kangaroo"),
    ],
)
def test_rounds_that_are_decided_do_not_copy_the_cache(batch, lookup, kind):
    shape = RoundShape(2, 6, None, (1, 4, 7 if lookup is None else 9), lookup, kept=25)
    costs = Costs.of(RoundCosts(1, 0.1, ((1, 1.0),), 0.1), 0.7, batch, 6, lookup)
    text = compiled_text(shape, tiny_adapter(2, kind=kind).model, donate=True, batch=batch, costs=costs)
    # The draft model's own caches have room for more positions, so that it can catch up.
    assert cache_copies(text, batch) == cache_copies(text, batch, CAPACITY + 32) == []


@pytest.mark.long
@pytest.mark.parametrize(("tree", "batch"), [(None, 1), (_TREE, 2)])
def test_rounds_do_not_copy_rings(tree, batch):
    config = dataclasses.replace(CONFIG, windows=(100, None, 100, None))
    model, adapter = TargetModel(config, rngs=nnx.Rngs(0)), Adapter(config, rngs=nnx.Rngs(1))
    shape, rings = RoundShape(2, 6, tree, (4, 7 if tree is None else 9)), (RING, None, RING, None)
    text = compiled_text(shape, adapter, donate=True, batch=batch, model=model, rings=rings)
    assert cache_copies(text, batch) == cache_copies(text, batch, RING) == []


def test_plain_steps_do_not_copy_the_cache():
    text = compiled_text(RoundShape.plain(), None, donate=True)
    assert cache_copies(text) == []
    # The layers below and above the exit layer; not each layer.
    assert len(re.findall(r" cosine\(", text)) == 2, "rotary angles are computed more than once in a pass"


def test_the_search_finds_copies():
    # Without donation the caller keeps its buffers, so there must be copies.
    assert cache_copies(compiled_text(RoundShape.plain(), None, donate=False))


@pytest.mark.parametrize("donate", [True, False])
def test_a_prompt_is_put_into_its_slot_without_copying_the_cache(donate):
    model, adapter, one = tiny_target().model, tiny_adapter(2).model, np.ones((1,), np.int32)
    static = {"exit_layer": 2, "backend": CpuBackend()}
    state = empty_slots(model, adapter, 4, 4, capacity=CAPACITY, **static)
    insert = jax.jit(
        functools.partial(prefill_and_admit, sampled=False, **static), donate_argnums=(2,) if donate else ()
    )
    admission = Admission(one, EOS[None], Sampling.greedy(1))
    program = insert.lower(model, adapter, state, None, np.zeros((1, 64), np.int32), one - 1, one, one, admission)
    copies = cache_copies(program.compile().as_text(), batch=4)
    assert bool(copies) is not donate  # without donation there must be copies, and the search finds them


@pytest.mark.long
def test_half_precision_is_written_as_it_is():
    """XLA for CPU computes with bfloat16 in float32, also where it only moves it: a loop over the complete cache for
    each sequence's position."""
    model = jax.tree.map(lambda x: x.astype("bfloat16"), tiny_target().model)
    text = compiled_text(RoundShape.plain(), None, donate=True, batch=3, model=model)
    rows, width = 3 * CONFIG.num_key_value_heads, CONFIG.head_dim
    found = re.findall(rf"= (\w+)\[{rows},(?:{width},{CAPACITY}|{CAPACITY},{width})\]\S* dynamic-update-slice\(", text)
    assert set(found) == {"u16"}
