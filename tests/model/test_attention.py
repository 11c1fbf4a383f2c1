"""Attention without a cache, a few queries at a time, against one product over everything. With a cache: values that
are not numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import processor
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.attention.uncached import attend
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.layers import Attention, attention_context
from tests.decode.models import CONFIG

BATCH, TIME, KV_HEADS, GROUPS, HEAD_DIM = 2, 11, 2, 3, 4


def _obvious(query, keys, values, mask):
    out = np.zeros(query.shape)
    for b, t, k, g in np.ndindex(query.shape[:4]):
        scores = keys[b, :, k] @ query[b, t, k, g] / HEAD_DIM**0.5
        weights = np.exp(scores - scores.max()) * mask[b, t]
        out[b, t, k, g] = weights @ values[b, :, k] / weights.sum()
    return out


def _inputs(time: int = TIME) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    query = rng.normal(size=(BATCH, time, KV_HEADS, GROUPS, HEAD_DIM)).astype(np.float32)
    keys, values = rng.normal(size=(2, BATCH, time, KV_HEADS, HEAD_DIM)).astype(np.float32)
    mask = np.tril(rng.random((BATCH, time, time)) < 0.7) | np.eye(time, dtype=bool)
    return query, keys, values, mask


def test_few_queries_at_a_time_change_neither_output_nor_gradient():
    query, keys, values, mask = _inputs()
    expected = _obvious(query, keys, values, mask)

    @functools.partial(jax.jit, static_argnames="chunk")
    def both(chunk):
        loss = lambda *arrays: jnp.sum(jnp.sin(attend(*arrays, mask, chunk=chunk)))  # noqa: E731
        return attend(query, keys, values, mask, chunk=chunk), jax.grad(loss, argnums=(0, 1, 2))(query, keys, values)

    whole, whole_gradients = both(chunk=TIME)
    for chunk in (4, 1):  # 4 leaves a rest of 3
        few, few_gradients = both(chunk=chunk)
        np.testing.assert_allclose(few, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(few, whole, rtol=1e-6, atol=1e-6)
        for found, reference in zip(few_gradients, whole_gradients, strict=True):
            np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)


def _piece(time: int, capacity: int, window: int | None, behind: int = 30) -> tuple[np.ndarray, ...]:
    """Queries of the last `time` positions but `behind`, keys and values of all, and what each query sees."""
    rng = np.random.default_rng(time)
    query = rng.normal(size=(BATCH, time, KV_HEADS, GROUPS, HEAD_DIM)).astype(np.float32) * 3
    keys, values = rng.normal(size=(2, BATCH, capacity, KV_HEADS, HEAD_DIM)).astype(np.float32)
    distance = (capacity - behind - time + np.arange(time))[:, None] - np.arange(capacity)
    mask = (distance >= 0) & (distance < (window or capacity))
    return query, keys, values, np.broadcast_to(mask, (BATCH, *mask.shape)).copy()


# Caches of one block and of three, the last of which begins within the one before; blocks of 64, 128 and 256 queries.
@pytest.mark.parametrize(("time", "capacity"), [(64, 128), (128, 640), (192, 640), (256, 300)])
@pytest.mark.parametrize("window", [None, 100])
def test_a_prompts_piece_attends_in_blocks_as_over_everything(time, capacity, window):
    query, keys, values, mask = _piece(time, capacity, window)
    mask[1] &= np.random.default_rng(1).random(mask[1].shape) < 0.5
    mask[1] |= np.eye(time, capacity, capacity - 30 - time, dtype=bool)
    backend = CpuBackend()
    empty = backend.init_cache(BATCH, KV_HEADS, capacity, HEAD_DIM, jnp.float32)
    written = backend.write(*empty, jnp.asarray(keys), jnp.asarray(values), jnp.zeros((BATCH,), jnp.int32))
    found = jax.jit(functools.partial(backend.attend, scale=HEAD_DIM**-0.5))(query, *written, mask)
    np.testing.assert_allclose(found, _obvious(query, keys, values, mask), rtol=1e-5, atol=1e-5)


def test_a_piece_reads_no_position_that_none_of_its_queries_sees():
    query, keys, values, mask = _piece(128, 1024, 100, behind=300)
    seen = mask.any(axis=(0, 1))
    first, last = seen.argmax() // 256 * 256, -(-(seen.nonzero()[0][-1] + 1) // 256) * 256
    assert 0 < first < last < 1024
    values[:, :first] = values[:, last:] = np.nan  # times a weight of 0, it would be NaN
    backend = CpuBackend()
    empty = backend.init_cache(BATCH, KV_HEADS, 1024, HEAD_DIM, jnp.float32)
    written = backend.write(*empty, jnp.asarray(keys), jnp.asarray(values), jnp.zeros((BATCH,), jnp.int32))
    assert np.isfinite(backend.attend(jnp.asarray(query), *written, jnp.asarray(mask), scale=1.0)).all()


def test_scores_of_all_queries_never_exist_at_once():
    query, keys, values, mask = _inputs(512)
    gradient = jax.jit(jax.grad(lambda query: attend(query, keys, values, mask, chunk=32).sum()))
    scores = BATCH * KV_HEADS * GROUPS * 512 * 512 * 4
    assert gradient.lower(query).compile().memory_analysis().temp_size_in_bytes < scores / 4


@pytest.mark.parametrize("prompt_end", [None, 3, 6])
@pytest.mark.parametrize("backend", [CpuBackend(), DenseBackend()], ids=["cpu", "dense"])
def test_a_value_that_overflows_is_noticed_where_it_may_matter(backend, prompt_end):
    """Position 3's value is infinite in float16, its input is not. It is NaN itself, and in a prompt so are those after
    it; others, which may be other drafts, are as if it were not there."""
    attention = Attention(CONFIG, CONFIG.attention_kinds[0], rngs=nnx.Rngs(0), dtype=jnp.float16)
    attention.qkv_proj[...] = attention.qkv_proj[...].at[:, :, -1].multiply(100)
    x = np.random.default_rng(0).normal(size=(1, 6, CONFIG.hidden_size)).astype(np.float16)
    x[:, 3] *= 10_000

    def output(x):
        cache = KVCache.empty(CONFIG, 1, 1, 8, jnp.float16, backend)
        if prompt_end is not None:
            cache = cache.replace(prompt_end=jnp.asarray([prompt_end]))
        context = attention_context(CONFIG.attention_kinds[:1], jnp.arange(6)[None], cache, None, jnp.float16)
        return np.asarray(attention(jnp.asarray(x), context, cache.keys[0], cache.values[0])[0][0], np.float32)

    numbers = np.isfinite(output(x)).all(axis=-1).tolist()
    assert np.isfinite(x).all()
    if prompt_end == 6:
        # In one product over all positions, infinity reaches those before it as well; the prompt fails either way.
        assert numbers[3:] == [False, False, False]
        return
    assert numbers == [True, True, True, False, True, True]
    harmless = x.copy()
    harmless[:, 3] = 0
    np.testing.assert_array_equal(output(x)[:3], output(harmless)[:3])


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize(("groups", "time"), [(1, 1), (4, 1), (2, 2), (1, 4), (5, 1), (2, 3)])
def test_a_batchs_few_queries_attend_by_sums_as_by_products(monkeypatch, groups, time, soft_cap):
    """Against products in float64; and up to four queries of a head are no products at all."""
    batch, kv_heads, head_dim, capacity = 3, 2, 8, 24
    rng = np.random.default_rng(0)
    query = rng.standard_normal((batch, time, kv_heads, groups, head_dim))
    keys, values = (rng.standard_normal((batch, kv_heads, capacity, head_dim)) for _ in range(2))
    lengths = np.asarray([5, 24 - time, 11])[:, None] + np.arange(time)
    mask = np.arange(capacity) <= lengths[:, :, None]
    scores = np.einsum("btkgd,bksd->bkgts", query, keys) * 0.3
    scores = scores if soft_cap is None else soft_cap * np.tanh(scores / soft_cap)
    weights = np.exp(np.where(mask[:, None, None], scores, -np.inf))
    expected = np.einsum("bkgts,bksd->btkgd", weights / weights.sum(-1, keepdims=True), values)

    merged = (batch * kv_heads, capacity, head_dim)
    arrays = [query, keys.reshape(merged).swapaxes(1, 2), values.reshape(merged)]
    query, keys, values = (jnp.asarray(x, jnp.float32) for x in arrays)
    for summed in (True, False):
        monkeypatch.setattr(processor, "vectors_are_avx2", lambda summed=summed: summed)
        attend = functools.partial(CpuBackend().attend, scale=0.3, soft_cap=soft_cap)
        np.testing.assert_allclose(attend(query, keys, values, jnp.asarray(mask)), expected, atol=2e-6)
        products = str(jax.make_jaxpr(attend)(query, keys, values, jnp.asarray(mask))).count("dot_general")
        assert products == (0 if summed and groups * time <= 4 else 2)
