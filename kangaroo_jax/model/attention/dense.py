"""The cache for accelerators and for several devices: every axis has a name of its own, so that each can be split."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.ops import precision

Entries = Float[Array, "batch kv_heads capacity head_dim"]
# Rows of a sequence that are scattered at once: those of a round. A prompt's piece is one long slice.
_FEW_ROWS = 512


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
        def put(buffer: Entries, new: Array) -> Entries:
            new = new.transpose(0, 2, 1, 3).astype(buffer.dtype)
            return self._locally(lambda *parts: _in_order(self._written(*parts, wraps)), (buffer, new), (start,))

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
        def moved(buffer: Entries, start: Array, sources: Array) -> Entries:
            if wraps:
                places = (start[:, None] + sources) % buffer.shape[2]
                entries = jnp.take_along_axis(buffer, places[:, None, :, None], axis=2)
            else:
                entries = jax.vmap(functools.partial(_taken, region=region))(buffer, start, sources)
            return self._written(buffer, entries, start, wraps)

        return tuple(self._locally(moved, (x,), (start, sources)) for x in (keys, values))

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

    def _written(self, buffer: Entries, new: Entries, start: Array, wraps: bool) -> Entries:
        batch, kv_heads, time, _ = new.shape
        # XLA for TPU writes slices of several sequences one after another, in a loop; it has a scatter of rows.
        if self.platform == "tpu" and (wraps or batch > 1) and kv_heads * time <= _FEW_ROWS:
            return _write_rows(buffer, new, start, wraps)
        return jax.vmap(_update_round if wraps else _update)(buffer, new, start)

    def _locally(self, function: Callable[..., Entries], buffers: Sequence[Entries], rows: Sequence[Array]) -> Entries:
        """A buffer that `function` makes of each device's part of `buffers`, and of what else its sequences have: a
        reshape, or the order of axes, of a split array would gather it."""
        if self.alone:
            # A function of its own: where a constraint gives a program's result, JAX leaves the order of all results to
            # XLA, then takes no donated buffer for it, and reads others as if they were in order.
            return self._placed(jax.jit(function)(*buffers, *rows))
        where = self.partition(buffers[0].shape)
        each = (where,) * len(buffers) + (PartitionSpec(where[0]),) * len(rows)
        return jax.shard_map(function, mesh=self.mesh, in_specs=each, out_specs=where)(*buffers, *rows)

    def _placed(self, buffer: Entries) -> Entries:
        """Split over the mesh."""
        if self.mesh is None:
            return buffer
        return jax.lax.with_sharding_constraint(buffer, NamedSharding(self.mesh, self.partition(buffer.shape)))


def _in_order(buffer: Entries) -> Entries:
    """With the axes in memory as they are written, as between programs. Left to choose, XLA takes another order within
    a loop, and copies all caches at its start and end (docs/dev/accelerators.md)."""
    return with_layout_constraint(buffer, Layout(tuple(range(buffer.ndim))))


def _write_rows(
    buffer: Entries, new: Float[Array, "batch kv_heads time head_dim"], start: Int[Array, " batch"], wraps: bool
) -> Entries:
    """As one scatter of rows."""
    batch, kv_heads, capacity, head_dim = buffer.shape
    time = new.shape[2]
    if wraps:
        places = (start[:, None] + jnp.arange(time)) % capacity
    else:
        places = jnp.minimum(start, capacity - time)[:, None] + jnp.arange(time)  # as `_update` does beyond the end
    first = capacity * jnp.arange(batch * kv_heads).reshape(batch, kv_heads, 1)
    rows = buffer.reshape(-1, head_dim)
    rows = rows.at[(first + places[:, None]).reshape(-1)].set(
        new.reshape(-1, head_dim), unique_indices=True, indices_are_sorted=not wraps, mode="promise_in_bounds"
    )
    return rows.reshape(buffer.shape)


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


def _taken(
    buffer: Float[Array, "kv_heads capacity head_dim"],
    start: Int[Array, ""],
    sources: Int[Array, " moved"],
    region: int,
) -> Float[Array, "kv_heads moved head_dim"]:
    return jnp.take(jax.lax.dynamic_slice_in_dim(buffer, start, region, axis=1), sources, axis=1)
