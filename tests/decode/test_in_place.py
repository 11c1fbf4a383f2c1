"""The loop must not copy the cache at every step. Truth: the program that XLA compiled, searched for copies of a
buffer of the cache's shape. (How long a step takes at two cache sizes is measured by bench/, not here.)"""

import functools
import re

import jax
import numpy as np
import pytest

from kangaroo_jax.config import TreeConfig
from kangaroo_jax.decode.autoregressive import plain_round
from kangaroo_jax.decode.generate import kangaroo_round
from kangaroo_jax.decode.host_loop import advance_rounds
from kangaroo_jax.decode.prefill import empty_slots, prefill, prefill_into
from tests.decode.models import CONFIG, tiny_adapter, tiny_target

CAPACITY = 1000
_TREE = TreeConfig(3, 8)
EOS = np.full(4, -1, np.int32)


def compiled_text(one_round, adapter, exit_layer, donate, batch=1):
    model = tiny_target().model
    start = functools.partial(prefill, exit_layer=exit_layer, capacity=CAPACITY, room=128)
    one = np.ones((batch,), np.int32)
    state = jax.eval_shape(start, model, adapter, np.zeros((batch, 64), np.int32), one, one, EOS)
    program = jax.jit(functools.partial(advance_rounds, one_round), donate_argnums=(2,) if donate else ())
    return program.lower(model, adapter, state, np.int32(9), EOS, np.float32(0.5)).compile().as_text()


def cache_copies(text, batch=1):
    rows, width = batch * CONFIG.num_key_value_heads, CONFIG.head_dim
    shape = rf"f32\[{rows},(?:{width},{CAPACITY}|{CAPACITY},{width})\]"  # keys, values
    assert re.search(shape + r"\S* (dynamic-update-slice|fusion)\(", text), "the cache is not in the program"
    return re.findall(rf"= {shape}\S* copy\(", text)


@pytest.mark.parametrize(
    ("widths", "batch", "tree"),
    [
        ((7,), 1, None),
        ((2, 4, 7), 1, None),
        ((7,), 2, None),
        ((4, 9), 1, _TREE),
        ((9,), 2, _TREE),
    ],
)
def test_kangaroo_rounds_do_not_copy_the_cache(widths, batch, tree):
    one_round = functools.partial(kangaroo_round, exit_layer=2, max_draft_len=6, widths=widths, tree=tree)
    assert cache_copies(compiled_text(one_round, tiny_adapter(2).model, 2, donate=True, batch=batch), batch) == []


def test_plain_steps_do_not_copy_the_cache():
    assert cache_copies(compiled_text(plain_round, None, 1, donate=True)) == []


def test_the_search_finds_copies():
    # Without donation the caller keeps its buffers, so there must be copies.
    assert cache_copies(compiled_text(plain_round, None, 1, donate=False))


@pytest.mark.parametrize("donate", [True, False])
def test_a_prompt_is_put_into_its_slot_without_copying_the_cache(donate):
    model, adapter, one = tiny_target().model, tiny_adapter(2).model, np.ones((1,), np.int32)
    state = empty_slots(model, adapter, None, 4, exit_layer=2, capacity=CAPACITY, room=128)
    insert = jax.jit(functools.partial(prefill_into, exit_layer=2), donate_argnums=(2,) if donate else ())
    program = insert.lower(model, adapter, state, np.int32(1), np.zeros((1, 64), np.int32), one, one, EOS, None)
    copies = cache_copies(program.compile().as_text(), batch=4)
    assert bool(copies) is not donate  # without donation there must be copies, and the search finds them
