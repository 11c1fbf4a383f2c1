"""Packing against a slow search for the best row, and packed examples against each of them alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.data.packing import best_fit, pack
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter, adapter_apply
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply
from kangaroo_jax.train.objective import adapter_loss


def sharegpt_like(count):
    """Lengths as of ShareGPT: most conversations of some hundred tokens, many of several thousand."""
    return np.clip(np.random.default_rng(0).lognormal(6.9, 1.2, count), 20, 60_000).astype(np.int64)


def pack_all(lengths, sequence_length):
    starts = np.cumsum(lengths) - lengths
    counted = np.stack([starts, starts + lengths], axis=1)
    return pack(np.arange(len(lengths)), lengths, starts, counted, sequence_length)


@pytest.mark.parametrize("capacity", [5, 64, 97])
def test_each_piece_is_in_the_fullest_row_that_had_room(capacity):
    lengths = np.random.default_rng(capacity).integers(1, capacity + 1, 300)
    rows = best_fit(lengths, capacity)
    left = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rooms = [room for room in left if room >= lengths[piece]]
        row = rows[piece]
        if rooms:
            assert left[row] == min(rooms)
        else:
            assert row == len(left)
            left.append(capacity)
        left[row] -= lengths[piece]
    assert min(left) >= 0


def test_under_a_tenth_of_the_positions_is_padding():
    lengths = sharegpt_like(20_000)
    packing = pack_all(lengths, 2048)
    assert packing.padding(2048) < 0.1
    assert int(packing.lengths.sum()) == int(lengths.sum())
    alone = 1 - lengths.clip(max=2048).mean() / 2048
    assert alone > 0.3  # else there would be little to pack


def test_every_token_is_in_one_place_and_what_teaches_nothing_is_left_out():
    lengths = np.array([3, 25, 10, 41, 1])
    starts = np.cumsum(lengths) - lengths
    # Nothing counts in record 0, in the second piece of record 1 and in the last two of record 3.
    counted = starts[[1, 1, 2, 3, 4]][:, None] + np.array([[2, 10], [20, 25], [0, 10], [19, 21], [0, 1]])
    packing = pack(np.arange(5), lengths, starts, counted, 10)
    pieces = sorted(zip(packing.records.tolist(), packing.offsets.tolist(), packing.lengths.tolist(), strict=True))
    assert pieces == [(1, 0, 10), (1, 20, 5), (2, 0, 10), (3, 10, 10), (3, 20, 10), (4, 0, 1)]
    rows = [packing.lengths[a:b].sum() for a, b in zip(packing.row_starts[:-1], packing.row_starts[1:], strict=True)]
    assert sorted(rows) == [6, 10, 10, 10, 10]


@pytest.fixture(scope="module")
def models():
    config = ModelConfig(
        model_type="llama",
        vocab_size=41,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
    )

    @jax.jit
    def made():
        both = Adapter(config, rngs=nnx.Rngs(1)), TargetModel(config, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, both)  # far from uniform logits

    return made()


def alone(adapter, target, tokens, weights):
    """Mean loss and expected acceptance with whole logits of examples that have a row each, from its first position:
    what follows an example is not seen by it."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    shallow, _ = shallow_apply(target, tokens, positions, exit_layer=1)
    teacher, _ = deep_apply(target, shallow, positions, exit_layer=1)
    draft, _ = adapter_apply(adapter, shallow, positions)
    p, logq = jax.nn.softmax(lm_head(target, teacher)), jax.nn.log_softmax(lm_head(target, draft))
    acceptance = jnp.sum(jnp.minimum(p, jnp.exp(logq)).sum(-1) * weights) / weights.sum()
    return -jnp.sum(jnp.sum(p * logq, -1) * weights) / weights.sum(), acceptance


def test_packed_examples_do_not_see_each_other(models):
    adapter, target = models
    rng = np.random.default_rng(0)
    rows = [(4, 7, 3), (9, 5)]  # lengths of the examples in each row of 16; the rest is padding
    batch = {name: np.zeros((2, 16), np.int32) for name in ("tokens", "segment_ids", "positions")}
    batch["loss_mask"] = np.zeros((2, 16), np.float32)
    examples, example_weights = np.zeros((5, 16), np.int32), np.zeros((5, 16), np.float32)
    count = 0
    for row, lengths in enumerate(rows):
        at = 0
        for segment, length in enumerate(lengths, 1):
            tokens, weights = rng.integers(0, 41, length), (rng.random(length) < 0.7).astype(np.float32)
            examples[count, :length], example_weights[count, :length] = tokens, weights
            count += 1
            part = (row, slice(at, at + length))
            for name, value in zip(batch, (tokens, segment, np.arange(length), weights), strict=True):
                batch[name][part] = value
            at += length
    batch["tokens"][:, 14:] = 7  # whatever padding holds

    def packed(adapter, target, batch):
        arrays = (batch[name] for name in ("tokens", "loss_mask", "segment_ids", "positions"))
        return adapter_loss(adapter, target, *arrays, exit_layer=1, chunk=8)

    packed = jax.jit(jax.value_and_grad(packed, has_aux=True))
    (loss, metrics), gradient = packed(adapter, target, batch)
    reference = jax.jit(jax.value_and_grad(alone, has_aux=True))
    (expected, acceptance), expected_gradient = reference(adapter, target, examples, example_weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["expected_acceptance"], acceptance, rtol=1e-5)
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())
    (merged, _), _ = packed(adapter, target, batch | {"segment_ids": np.ones((2, 16), np.int32)})
    assert abs(float(merged) - float(expected)) > 1e-3  # the test can tell
