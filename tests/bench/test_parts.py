"""What the roofline counts and times, against counts from the shapes and against each other."""

import numpy as np
import pytest

from kangaroo_jax import TreeConfig
from kangaroo_jax.bench import parts
from tests.decode.models import CONFIG, tiny_adapter, tiny_target

CAPACITY, EXIT_LAYER = 128, 2


@pytest.fixture(scope="module")
def context():
    tokens = np.arange(20, dtype=np.int32)[None] % CONFIG.vocab_size
    return parts.Context(tiny_target().model, tiny_adapter(EXIT_LAYER).model, EXIT_LAYER, tokens, CAPACITY, room=16)


def test_bytes_are_those_of_the_shapes(context):
    hidden, heads, kv, width = 32, 4, 2, 8
    attention = hidden * (heads + 2 * kv) * width + heads * width * hidden
    layer = attention + 3 * hidden * 48 + 2 * hidden
    cache = 2 * kv * width * CAPACITY
    head = 48 * hidden
    assert context.bytes == parts.Bytes(
        plain_step=4 * (5 * (layer + cache) + head),
        shallow=4 * 2 * (layer + cache),
        draft_step=4 * (2 * (layer + cache) + attention + 2 * hidden + cache + head),
        verification=4 * (3 * (layer + cache) + head),
    )


def test_every_part_takes_time_and_more_drafts_take_more(context):
    assert parts.plain_step_seconds(context) > 0
    assert parts.verification_seconds(context, 3) > 0
    assert parts.prefill_seconds(context) > 0
    assert parts.draft_seconds(context, 8) > parts.draft_seconds(context, 1) > 0
    assert parts.round_seconds(context, 8) > parts.draft_seconds(context, 1)


def test_every_part_of_a_tree_takes_time_and_larger_trees_take_more(context):
    assert parts.growth_seconds(context, 4, 8) > parts.growth_seconds(context, 4, 1) > 0
    small, large = (parts.tree_verification_seconds(context, TreeConfig(4, budget), 5) for budget in (4, 60))
    assert large > small > 0
