"""The cache for accelerators and for several devices: every axis has a name of its own, so that each can be split."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.ops import precision

Entries = Float[Array, "batch kv_heads capacity head_dim"]


@dataclasses.dataclass(frozen=True)
class DenseBackend:
    """Accelerators, or several devices: sequences are split over the mesh's `data` axis, heads over `model`. Methods as
    `AttentionBackend` describes them.

    Attributes:
      mesh: that the target is split over; None on one device.
      platform: of the devices, for example "tpu"; None where it does not matter.
    """

    mesh: Mesh | None = None
    platform: str | None = None

    @property
    def alone(self) -> bool:
        """Whether it is one device."""
        return self.mesh is None or self.mesh.size == 1

    def init_cache(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
    ) -> tuple[Entries, Entries]:
        shape = (batch, kv_heads, capacity, head_dim)
        return self._placed(jnp.zeros(shape, dtype)), self._placed(jnp.zeros(shape, dtype))

    def capacity(self, values: Entries) -> int:
        return values.shape[2]

    def write(
        self,
        keys: Entries,
        values: Entries,
        new_keys: Array,
        new_values: Array,
        start: Int[Array, " batch"],
        *,
        wraps: bool = False,
    ) -> tuple[Entries, Entries]:
        update = _update_round if wraps else _update

        def put(buffer: Array, new: Array) -> Array:
            new = new.transpose(0, 2, 1, 3).astype(buffer.dtype)
            return self._in_order(self._placed(jax.vmap(update)(buffer, new, start)))

        return put(keys, new_keys), put(values, new_values)

    def attend(
        self,
        query: Array,
        keys: Entries,
        values: Entries,
        mask: Bool[Array, "batch time capacity"],
        *,
        scale: float,
        soft_cap: float | None = None,
    ) -> Float[Array, "batch time kv_heads groups head_dim"]:
        if soft_cap is not None:
            return _attend_capped(query, keys, values, mask, scale, soft_cap)
        batch, time, kv_heads, groups, head_dim = query.shape
        # float32 is float32 on every platform, as in `ops.dot`.
        with jax.default_matmul_precision("highest" if query.dtype == jnp.float32 else "default"):
            mixed = jax.nn.dot_product_attention(
                query.reshape(batch, time, kv_heads * groups, head_dim),
                keys.transpose(0, 2, 1, 3),
                values.transpose(0, 2, 1, 3),
                mask=mask[:, None],
                scale=scale,
            )
        return mixed.reshape(query.shape)

    def move(
        self,
        keys: Entries,
        values: Entries,
        start: Int[Array, " batch"],
        sources: Int[Array, "batch moved"],
        region: int,
        *,
        wraps: bool = False,
    ) -> tuple[Entries, Entries]:
        def one(buffer: Array, start: Array, sources: Array) -> Array:
            if wraps:
                return _update_round(buffer, jnp.take(buffer, (start + sources) % buffer.shape[1], axis=1), start)
            entries = jax.lax.dynamic_slice_in_dim(buffer, start, region, axis=1)
            return _update(buffer, jnp.take(entries, sources, axis=1), start)

        return tuple(self._placed(jax.vmap(one)(x, start, sources)) for x in (keys, values))

    def take(self, keys: Entries, values: Entries, places: Int[Array, "batch taken"]) -> tuple[Entries, Entries]:
        return tuple(self._placed(jnp.take_along_axis(x, places[:, None, :, None], axis=2)) for x in (keys, values))

    def resize(self, keys: Entries, values: Entries, capacity: int) -> tuple[Entries, Entries]:
        more = ((0, 0), (0, 0), (0, max(0, capacity - self.capacity(values))), (0, 0))
        return tuple(self._placed(jnp.pad(x[:, :, :capacity], more)) for x in (keys, values))

    def take_row(self, keys: Entries, values: Entries, row: Int[Array, ""], batch: int) -> tuple[Entries, Entries]:
        return tuple(jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (keys, values))

    def put_rows(
        self,
        keys: Entries,
        values: Entries,
        new_keys: Entries,
        new_values: Entries,
        rows: Int[Array, " new"],
        batch: int,
    ) -> tuple[Entries, Entries]:
        # One scatter for all rows: an update for each would be thousands of kernels for a large batch.
        return tuple(
            self._placed(x.at[rows, :, : new.shape[2]].set(new, mode="drop"))
            for x, new in ((keys, new_keys), (values, new_values))
        )

    def partition(self, shape: Sequence[int]) -> PartitionSpec:
        batch, kv_heads = shape[:2]
        return PartitionSpec(
            "data" if batch % self.mesh.shape["data"] == 0 else None,
            "model" if kv_heads % self.mesh.shape["model"] == 0 else None,
        )

    def _in_order(self, buffer: Entries) -> Entries:
        """With the axes in memory as they are written, as between programs. Left to choose, XLA takes another order
        within a loop, and copies all caches at its start and end (docs/dev/accelerators.md)."""

        def fix(part: Entries) -> Entries:
            return with_layout_constraint(part, Layout(tuple(range(part.ndim))))

        if self.alone:
            # A function of its own: where a constraint gives a program's result, JAX leaves the order of all results to
            # XLA, then takes no donated buffer for it, and reads others as if they were in order.
            return jax.jit(fix)(buffer)
        where = self.partition(buffer.shape)  # a constraint on a split array would gather it
        return jax.shard_map(fix, mesh=self.mesh, in_specs=where, out_specs=where)(buffer)

    def _placed(self, buffer: Entries) -> Entries:
        """Split over the mesh."""
        if self.mesh is None:
            return buffer
        return jax.lax.with_sharding_constraint(buffer, NamedSharding(self.mesh, self.partition(buffer.shape)))


def _attend_capped(
    query: Float[Array, "batch time kv_heads groups head_dim"],
    keys: Entries,
    values: Entries,
    mask: Bool[Array, "batch time capacity"],
    scale: float,
    soft_cap: float,
) -> Float[Array, "batch time kv_heads groups head_dim"]:
    """`jax.nn.dot_product_attention`, which has no soft cap."""
    exact = precision(query.dtype)
    scores = jnp.einsum("btkgd,bksd->bkgts", query, keys, precision=exact, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], capped(scores * scale, soft_cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bksd->btkgd", weights, values, precision=exact)


def _update(
    buffer: Float[Array, "kv_heads capacity head_dim"],
    new: Float[Array, "kv_heads time head_dim"],
    start: Int[Array, ""],
) -> Float[Array, "kv_heads capacity head_dim"]:
    return jax.lax.dynamic_update_slice(buffer, new, (0, start, 0))


def _update_round(
    buffer: Float[Array, "kv_heads capacity head_dim"],
    new: Float[Array, "kv_heads time head_dim"],
    start: Int[Array, ""],
) -> Float[Array, "kv_heads capacity head_dim"]:
    places = (start + jnp.arange(new.shape[1])) % buffer.shape[1]
    return buffer.at[:, places].set(new, unique_indices=True)
