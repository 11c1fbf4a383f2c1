"""Attention without a cache, as training takes it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.ops import precision

_QUERIES_AT_ONCE = 256  # per sequence


def attend(
    query: Float[Array, "batch time kv_heads groups head_dim"],
    keys: Float[Array, "batch keys kv_heads head_dim"],
    values: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch time keys"],
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    chunk: int = _QUERIES_AT_ONCE,
) -> Float[Array, "batch time kv_heads groups head_dim"]:
    """Attention to `keys`: the scores of `chunk` queries exist at once, also in the backward pass, which computes them
    again. Batch and heads stay axes of their own, so that each can be split over devices. `scale` is head_dim**-0.5
    if None; `soft_cap` as for `AttentionBackend`."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    exact = precision(query.dtype)

    @jax.checkpoint
    def some(query: Array, mask: Array) -> Array:
        scores = jnp.einsum("btkgd,bskd->bkgts", query, keys, precision=exact, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], capped(scores * scale, soft_cap), jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        return jnp.einsum("bkgts,bskd->btkgd", weights, values, precision=exact)

    batch, time = query.shape[:2]
    if time <= chunk:
        return some(query, mask)
    count = -(-time // chunk)

    def split(x: Array) -> Array:  # [batch, time, ...] -> [count, batch, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    mixed = jax.lax.map(lambda part: some(*part), (split(query), split(mask)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * chunk, *query.shape[2:])[:, :time]
