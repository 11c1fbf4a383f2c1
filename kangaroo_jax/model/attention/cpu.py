"""The cache as XLA for CPU takes it: batch and heads are one axis, keys are transposed.

Each choice was measured on CPUs to matter: given two axes, XLA fuses the update with the reshape between them and
copies the complete buffer at every step; a transposed operand makes a small product several times slower; a scatter,
which `vmap` makes of several updates, is not done in place.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.ops import precision

Keys = Float[Array, "batch*kv_heads head_dim capacity"]
Values = Float[Array, "batch*kv_heads capacity head_dim"]


@dataclasses.dataclass(frozen=True)
class CpuBackend:
    """One CPU device. Methods as `AttentionBackend` describes them."""

    def init_cache(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
    ) -> tuple[Keys, Values]:
        rows = batch * kv_heads
        return jnp.zeros((rows, head_dim, capacity), dtype), jnp.zeros((rows, capacity, head_dim), dtype)

    def capacity(self, values: Values) -> int:
        return values.shape[1]

    def write(
        self, keys: Keys, values: Values, new_keys: Array, new_values: Array, start: Int[Array, " batch"]
    ) -> tuple[Keys, Values]:
        batch, time, kv_heads, head_dim = new_keys.shape
        new_keys = new_keys.transpose(0, 2, 3, 1).reshape(batch * kv_heads, head_dim, time)
        new_values = new_values.transpose(0, 2, 1, 3).reshape(batch * kv_heads, time, head_dim)
        for i in range(batch):
            rows = slice(i * kv_heads, (i + 1) * kv_heads)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[rows], (rows.start, 0, start[i]))
            values = jax.lax.dynamic_update_slice(values, new_values[rows], (rows.start, start[i], 0))
        return keys, values

    def attend(
        self,
        query: Array,
        keys: Keys,
        values: Values,
        mask: Bool[Array, "batch time capacity"],
        *,
        scale: float,
        soft_cap: float | None = None,
    ) -> Float[Array, "batch time kv_heads groups head_dim"]:
        batch, time, kv_heads, groups, head_dim = query.shape
        merged = batch * kv_heads
        dtype = query.dtype
        query = query.transpose(0, 2, 3, 1, 4).reshape(merged, groups * time, head_dim)
        scores = jnp.einsum("nqd,nds->nqs", query, keys, precision=precision(dtype), preferred_element_type=jnp.float32)
        scores = capped(scores.reshape(batch, kv_heads, groups, time, -1) * scale, soft_cap)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype).reshape(merged, groups * time, -1)
        mixed = jnp.einsum("nqs,nsd->nqd", weights, values, precision=precision(dtype))
        return mixed.reshape(batch, kv_heads, groups, time, head_dim).transpose(0, 3, 1, 2, 4)

    def move(
        self, keys: Keys, values: Values, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], region: int
    ) -> tuple[Keys, Values]:
        return _move(keys, start, sources, region, axis=2), _move(values, start, sources, region, axis=1)

    def resize(self, keys: Keys, values: Values, capacity: int) -> tuple[Keys, Values]:
        more = (0, max(0, capacity - self.capacity(values)))
        keys = jnp.pad(keys[:, :, :capacity], ((0, 0), (0, 0), more))
        return keys, jnp.pad(values[:, :capacity], ((0, 0), more, (0, 0)))

    def take_row(self, keys: Keys, values: Values, row: Int[Array, ""], batch: int) -> tuple[Keys, Values]:
        heads = keys.shape[0] // batch
        return tuple(jax.lax.dynamic_slice_in_dim(x, row * heads, heads) for x in (keys, values))

    def put_rows(
        self,
        keys: Keys,
        values: Values,
        new_keys: Keys,
        new_values: Values,
        rows: Int[Array, " new"],
        batch: int,
    ) -> tuple[Keys, Values]:
        heads = keys.shape[0] // batch
        for i in range(len(rows)):
            source = slice(i * heads, (i + 1) * heads)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[source], (rows[i] * heads, 0, 0))
            values = jax.lax.dynamic_update_slice(values, new_values[source], (rows[i] * heads, 0, 0))
        return keys, values


def _move(
    buffer: Array, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], region: int, axis: int
) -> Array:
    batch = len(sources)
    heads = buffer.shape[0] // batch
    for i in range(batch):
        place = [i * heads, 0, 0]
        place[axis] = start[i]
        shape = [heads, *buffer.shape[1:]]
        shape[axis] = region
        # Read before it is overwritten: the barrier keeps the reading out of the update's fusion, for which XLA would
        # have to copy the buffer.
        entries = jax.lax.optimization_barrier(jax.lax.dynamic_slice(buffer, place, shape))
        buffer = jax.lax.dynamic_update_slice(buffer, jnp.take(entries, sources[i], axis=axis), place)
    return buffer
