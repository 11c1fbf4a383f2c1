"""Key/value cache: fixed-size buffers per layer and one length per sequence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int, PyTree

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of a run of layers, each pair in the layout of `backend`.

    Rolling back is setting `length`: entries beyond it are masked, and overwritten by the next write. A masked value is
    multiplied by 0, and 0 * NaN is NaN, so values that are not numbers must not stay where others look past them: they
    are zeros in the cache, but for those of a prompt while it is prefilled, which its later tokens have to see.
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, " batch"]  # valid positions of each sequence
    backend: AttentionBackend = flax.struct.field(pytree_node=False)
    prompt_end: Int[Array, " batch"] | None = None  # where each prompt ends; None where none is prefilled

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        num_layers: int,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backend: AttentionBackend,
    ) -> KVCache:
        """A cache for `num_layers` layers with room for `capacity` positions per sequence."""
        # Separate buffers, not one shared zero array: each is donated and updated in place.
        layers = [
            backend.init_cache(batch, config.num_key_value_heads, capacity, config.head_dim, dtype)
            for _ in range(num_layers)
        ]
        keys, values = (tuple(pair[i] for pair in layers) for i in range(2))
        return cls(keys, values, jnp.zeros((batch,), jnp.int32), backend)

    @property
    def capacity(self) -> int:
        return self.backend.capacity(self.values[0])

    def moved(self, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], region: int) -> KVCache:
        """With positions start + sources of each sequence moved to start, start + 1, ...; sources are below `region`,
        static."""
        return self._mapped(lambda keys, values: self.backend.move(keys, values, start, sources, region))

    def resized(self, capacity: int) -> KVCache:
        """The same entries with room for `capacity` positions. Lengths stay as they are, which the caller keeps within
        it."""
        return self._mapped(lambda keys, values: self.backend.resize(keys, values, capacity))

    def row(self, row: Int[Array, ""]) -> KVCache:
        """One sequence, as a cache of its own."""
        batch = len(self.length)
        taken = self._mapped(lambda keys, values: self.backend.take_row(keys, values, row, batch))
        return taken.replace(length=jax.lax.dynamic_slice_in_dim(self.length, row, 1))

    def with_rows(self, rows: Int[Array, " new"], new: KVCache) -> KVCache:
        """With the sequences of `new` in place of the sequences `rows`; those whose row is beyond the batch are dropped
        (`DenseBackend` alone). What lies beyond the capacity of `new` stays: it is masked, and overwritten later."""
        pairs = [
            self.backend.put_rows(*old, *fresh, rows, len(self.length))
            for old, fresh in zip(
                zip(self.keys, self.values, strict=True), zip(new.keys, new.values, strict=True), strict=True
            )
        ]
        keys, values = zip(*pairs, strict=True)
        length = self.length.at[rows].set(new.length, mode="drop")
        return self.replace(keys=keys, values=values, length=length)

    def with_numbers_only(self) -> KVCache:
        """With zeros in place of values that are not numbers."""
        return self.replace(values=tuple(jnp.where(jnp.isfinite(x), x, 0) for x in self.values))

    def _mapped(self, change: Callable[[Array, Array], tuple[Array, Array]]) -> KVCache:
        keys, values = zip(*map(change, self.keys, self.values), strict=True)
        return self.replace(keys=keys, values=values)


def batch_shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """Where the arrays of a batch lie: split over the mesh's `data` axis along their first axis, caches also as their
    backend says.

    Args:
      tree: of arrays (or their shapes) with the batch first, and of `KVCache`s; the batch is a multiple of `data`.
      mesh: with axes `data` and `model`.
    """

    def place(x: Any) -> Any:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        if not isinstance(x, KVCache):
            return rows
        entries = NamedSharding(mesh, x.backend.partition(x.keys[0].shape))
        return x.replace(keys=(entries,) * len(x.keys), values=(entries,) * len(x.values), length=rows)

    return jax.tree.map(place, tree, is_leaf=lambda x: isinstance(x, KVCache))


def causal_mask(start: Int[Array, " batch"], time: int, capacity: int) -> Bool[Array, "batch time capacity"]:
    """Query i, at position start + i, sees positions 0 .. start + i."""
    positions = start[:, None] + jnp.arange(time)
    return jnp.arange(capacity) <= positions[:, :, None]


def within_window(mask: Bool[Array, "batch time places"], window: int) -> Bool[Array, "batch time places"]:
    """Of what each query sees, the last `window` positions.

    A place is not a position: several tokens of a tree have one. But what a query sees is a path of tokens, one at each
    position up to its own, in this order. So the positions are counted along the path.
    """
    if mask.shape[-1] <= window:
        return mask
    count = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return mask & (count > count[:, :, -1:] - window)


def draft_mask(
    start: Int[Array, " batch"], visible: Bool[Array, "batch time drafts"], capacity: int
) -> Bool[Array, "batch time capacity"]:
    """Query i sees all positions before `start`, and those of the positions start + j that visible[i, j] names."""
    offsets = jnp.arange(capacity) - start[:, None]
    inside = (offsets >= 0) & (offsets < visible.shape[-1])
    named = jnp.take_along_axis(visible, jnp.clip(offsets, 0, visible.shape[-1] - 1)[:, None], axis=2)
    return (offsets < 0)[:, None] | (inside[:, None] & named)
