"""Decoding through the cache, compared with one forward pass over the whole sequence without a cache.

That pass is itself compared with transformers in tests/checkpoint/test_huggingface.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.cache import DraftMask, KVCache, within_window
from kangaroo_jax.model.config import ModelConfig, RopeScaling
from kangaroo_jax.model.families import read_config
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

LENGTH, CAPACITY = 14, 20
CONFIGS = {
    "gqa, biases": {"num_key_value_heads": 2, "qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "mha, llama3, tied": {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 8), "tie_word_embeddings": True},
}


SHAPE = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def make_target(config: ModelConfig) -> TargetModel:
    """A random float32 target with 3 layers, biases and norms included."""
    rng = np.random.default_rng(0)

    def random(x: jax.ShapeDtypeStruct) -> jax.Array:
        centre, spread = (1.0, 0.3) if x.ndim == 1 else (0.0, 0.4)  # norms and biases, matrices
        return jnp.asarray(rng.normal(centre, spread, x.shape), jnp.float32)

    return jax.tree.map(random, nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0))))


@functools.partial(jax.jit, static_argnames="exit_layer")
def whole(target: TargetModel, tokens: jax.Array, exit_layer: int) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = shallow_apply(target, tokens, positions, exit_layer=exit_layer)
    hidden, _ = deep_apply(target, hidden, positions, exit_layer=exit_layer)
    return lm_head(target, hidden)


@functools.partial(jax.jit, static_argnames="exit_layer")
def step(
    target: TargetModel, tokens: jax.Array, shallow: KVCache, deep: KVCache, exit_layer: int
) -> tuple[jax.Array, KVCache, KVCache]:
    """Logits of a block of tokens that follow what the caches hold."""
    positions = shallow.length[:, None] + jnp.arange(tokens.shape[1])
    hidden, shallow = shallow_apply(target, tokens, positions, shallow, exit_layer=exit_layer)
    hidden, deep = deep_apply(target, hidden, positions, deep, exit_layer=exit_layer)
    return lm_head(target, hidden), shallow, deep


@jax.jit
def masked(target: TargetModel, tokens: jax.Array, positions: jax.Array, cache: KVCache, mask: DraftMask) -> jax.Array:
    """Logits with all layers in one cache and a mask of our own."""
    layers = target.config.num_hidden_layers
    hidden, _ = shallow_apply(target, tokens, positions, cache, exit_layer=layers, mask=mask)
    hidden, _ = deep_apply(target, hidden, positions, exit_layer=layers)
    return lm_head(target, hidden)


def empty_caches(
    target: TargetModel, batch: int, exit_layer: int, backend: AttentionBackend
) -> tuple[KVCache, KVCache]:
    layers = target.config.num_hidden_layers
    make = functools.partial(
        KVCache.empty, target.config, batch=batch, capacity=CAPACITY, dtype=jnp.float32, backend=backend
    )
    return make(exit_layer), make(layers - exit_layer)


def rolled_back(cache: KVCache, length: list[int]) -> KVCache:
    return cache.replace(length=jnp.asarray(length, jnp.int32))


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.fixture(scope="module", params=CONFIGS)
def target(request: pytest.FixtureRequest) -> TargetModel:
    return make_target(ModelConfig(**SHAPE | CONFIGS[request.param]))


@pytest.fixture(scope="module")
def gqa_target() -> TargetModel:
    return make_target(ModelConfig(**SHAPE | CONFIGS["gqa, biases"]))


@pytest.fixture(
    scope="module", params=[CpuBackend(), DenseBackend(), DenseBackend(None, "tpu")], ids=["cpu", "dense", "tpu"]
)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return request.param


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 61, (2, LENGTH))


def test_logits_depend_on_order_and_on_every_earlier_token(target: TargetModel, tokens: np.ndarray) -> None:
    """What makes the comparisons below mean something: each earlier token moves the last logits, none the earlier."""
    before = whole(target, tokens, 1)
    for i in range(LENGTH):
        changed = tokens.copy()
        changed[:, i] = (changed[:, i] + 1) % 61
        difference = np.abs(np.asarray(whole(target, changed, 1) - before)).max(axis=(0, 2)) / np.abs(before).max()
        assert (difference[:i] == 0).all()
        assert (difference[i:] > 1e-4).all()


@pytest.mark.parametrize("exit_layer", [1, 3])
def test_the_split_does_not_change_the_logits(target: TargetModel, tokens: np.ndarray, exit_layer: int) -> None:
    assert_close(whole(target, tokens, exit_layer), whole(target, tokens, 2))


@pytest.mark.parametrize(
    "blocks", [[5, 3, 1, 2, 3], *(pytest.param(each, marks=pytest.mark.long) for each in ([14], [5] + [1] * 9))]
)
def test_blocks_through_the_cache_equal_the_whole(
    target: TargetModel, tokens: np.ndarray, backend: AttentionBackend, blocks: list[int]
) -> None:
    shallow, deep = empty_caches(target, 2, 1, backend)
    found, done = [], 0
    for width in blocks:
        logits, shallow, deep = step(target, tokens[:, done : done + width], shallow, deep, 1)
        found.append(logits)
        done += width
        assert shallow.length.tolist() == deep.length.tolist() == [done, done]
    assert_close(jnp.concatenate(found, axis=1), whole(target, tokens, 1))


def test_rollback_forgets_what_came_after(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    """Wrong tokens are written, rolled back, and overwritten by a shorter and by a longer block."""
    expected = whole(gqa_target, tokens, 1)
    shallow, deep = empty_caches(gqa_target, 2, 1, backend)
    _, shallow, deep = step(gqa_target, tokens[:, :5], shallow, deep, 1)
    wrong = (tokens[:, 5:8] + 7) % 61
    logits, shallow, deep = step(gqa_target, wrong, shallow, deep, 1)
    assert np.abs(np.asarray(logits - expected[:, 5:8])).max() > 0.01
    shallow, deep = rolled_back(shallow, [5, 5]), rolled_back(deep, [5, 5])
    logits, shallow, deep = step(gqa_target, tokens[:, 5:7], shallow, deep, 1)
    assert_close(logits, expected[:, 5:7])
    _, shallow, deep = step(gqa_target, wrong, shallow, deep, 1)
    shallow, deep = rolled_back(shallow, [7, 7]), rolled_back(deep, [7, 7])
    logits, shallow, deep = step(gqa_target, tokens[:, 7:12], shallow, deep, 1)
    assert_close(logits, expected[:, 7:12])


def test_ragged_sequences_in_a_batch_equal_each_alone(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    """Sequence 0 is 3 tokens behind sequence 1: its surplus prefill is rolled back, then both go on in blocks."""
    expected = np.asarray(whole(gqa_target, tokens, 1))
    shallow, deep = empty_caches(gqa_target, 2, 1, backend)
    _, shallow, deep = step(gqa_target, tokens[:, :5], shallow, deep, 1)
    starts = np.array([2, 5])
    shallow, deep = rolled_back(shallow, starts.tolist()), rolled_back(deep, starts.tolist())
    for width in (1, 2, 3):
        block = np.stack([tokens[i, start : start + width] for i, start in enumerate(starts)])
        logits, shallow, deep = step(gqa_target, block, shallow, deep, 1)
        for i, start in enumerate(starts):
            assert_close(logits[i], expected[i, start : start + width])
        starts = starts + width
        assert shallow.length.tolist() == starts.tolist()


def test_a_resized_cache_holds_the_same_entries(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    shallow, deep = empty_caches(gqa_target, 2, 1, backend)
    _, shallow, deep = step(gqa_target, tokens[:, :5], shallow, deep, 1)
    shallow, deep = shallow.resized(33), deep.resized(33)
    assert shallow.capacity == deep.capacity == 33
    logits, grown_shallow, grown_deep = step(gqa_target, tokens[:, 5:7], shallow, deep, 1)
    assert_close(logits, whole(gqa_target, tokens, 1)[:, 5:7])
    logits, _, _ = step(gqa_target, tokens[:, 7:9], grown_shallow.resized(9), grown_deep.resized(9), 1)
    assert_close(logits, whole(gqa_target, tokens, 1)[:, 7:9])


def test_a_row_of_another_cache_takes_the_place_of_one(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    """The second sequence's entries, from a smaller cache, over those of the first; and that row on its own."""
    shallow, deep = empty_caches(gqa_target, 2, 1, backend)
    _, shallow, deep = step(gqa_target, tokens[:, :5], shallow, deep, 1)
    row = jnp.int32(0)
    moved = [cache.with_rows(row[None], cache.row(jnp.int32(1)).resized(7)) for cache in (shallow, deep)]
    logits, _, _ = step(gqa_target, tokens[[1, 1], 5:9], *moved, 1)
    alone, _, _ = step(gqa_target, tokens[1:, 5:9], *(cache.row(row) for cache in moved), 1)
    for found in (logits[0], logits[1], alone[0]):
        assert_close(found, whole(gqa_target, tokens, 1)[1, 5:9])


def test_an_explicit_mask_replaces_the_causal_one(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    """Two continuations of one prefix side by side, each blind to the other, as in a tree of drafts."""
    prefix, first, second = tokens[:1, :5], tokens[:1, 5:7], (tokens[:1, 5:7] + 11) % 61
    shallow, _ = empty_caches(gqa_target, 1, 3, backend)
    _, shallow = shallow_apply(gqa_target, prefix, jnp.arange(5)[None], shallow, exit_layer=3)
    visible = np.zeros((1, 4, 4), bool)
    visible[0, 0, [0]] = visible[0, 1, [0, 1]] = visible[0, 2, [2]] = visible[0, 3, [2, 3]] = True
    mask = DraftMask.create(jnp.asarray([5]), jnp.asarray(visible), CAPACITY)
    both = np.concatenate([first, second], axis=1)
    positions = jnp.array([[5, 6, 5, 6]])
    logits = masked(gqa_target, both, positions, shallow, mask)[0]
    for branch, rows in ((first, slice(0, 2)), (second, slice(2, 4))):
        assert_close(logits[rows], whole(gqa_target, np.concatenate([prefix, branch], axis=1), 3)[0, 5:])


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma2", "granite", "olmo2"])
def test_windows_caps_scales_and_norms_are_those_of_complete_passes(
    model_type: str, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    """gemma2: windows of 4, soft caps; granite: another scale of scores; olmo2: norms of all queries and keys."""
    own = {
        "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 20},
        "granite": {"attention_multiplier": 0.2},
        "olmo2": {},
    }
    target = make_target(read_config(SHAPE | {"model_type": model_type, "num_key_value_heads": 2} | own[model_type]))
    assert (whole(target, (tokens + 1) % 61, 1) != whole(target, tokens, 1)).any()
    test_blocks_through_the_cache_equal_the_whole(target, tokens, backend, [5, 3, 1, 2, 3])
    test_rollback_forgets_what_came_after(target, tokens, backend)
    test_ragged_sequences_in_a_batch_equal_each_alone(target, tokens, backend)
    test_an_explicit_mask_replaces_the_causal_one(target, tokens, backend)


def test_a_window_is_counted_along_the_path_that_a_query_sees() -> None:
    """Places 3 and 4 hold two tokens of a tree at one position, 5 is a child of 3, 6 one of 4."""
    mask = np.zeros((1, 3, 8), bool)
    mask[0, 0, [0, 1, 2, 3, 5]] = mask[0, 1, [0, 1, 2, 4, 6]] = mask[0, 2, [0]] = True
    found = np.asarray(within_window(jnp.asarray(mask), 3))[0]
    assert [np.flatnonzero(row).tolist() for row in found] == [[2, 3, 5], [2, 4, 6], [0]]
    np.testing.assert_array_equal(within_window(jnp.asarray(mask), 8), mask)


def test_a_cache_of_other_layers_is_refused(
    gqa_target: TargetModel, tokens: np.ndarray, backend: AttentionBackend
) -> None:
    shallow, _ = empty_caches(gqa_target, 2, 2, backend)
    with pytest.raises(ValueError, match="the cache holds 2 layers, expected 3"):
        shallow_apply(gqa_target, tokens, jnp.zeros_like(tokens), shallow, exit_layer=3)
