"""Attention without a cache, a few queries at a time, against one product over everything. With a cache: values that
are not numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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
