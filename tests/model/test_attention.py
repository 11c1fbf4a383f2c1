"""Attention without a cache, a few queries at a time, against one product over everything."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kangaroo_jax.model.attention.uncached import attend

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
