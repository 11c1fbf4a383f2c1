"""Key/value cache: fixed-size buffers per layer and one length per sequence; which of its entries a query sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    A layer with a window needs the last positions alone. Its buffer may be a ring: position p lies in slot p mod the
    ring's capacity, where it takes the place of an older one. No slot says which position it holds; that follows from
    where a query is (`held_positions`), so an entry that was rolled back is never seen. None that is needed has been
    overwritten where the ring has room for the window and for all that a round writes before it is settled
    (`Shapes.rings`).
    """

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    length: Int[Array, " batch"]  # valid positions of each sequence
    backend: AttentionBackend = flax.struct.field(pytree_node=False)
    capacity: int = flax.struct.field(pytree_node=False)  # positions that a sequence has room for
    rings: tuple[int | None, ...] = flax.struct.field(pytree_node=False)  # as `empty`, of each layer
    prompt_end: Int[Array, " batch"] | None = None  # where each prompt's piece ends; None where none is prefilled
    numbers_only: bool = flax.struct.field(pytree_node=False, default=False)  # of prompts too

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        num_layers: int,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backend: AttentionBackend,
        rings: Sequence[int | None] = (),
    ) -> KVCache:
        """A cache for `num_layers` layers with room for `capacity` positions per sequence.

        `rings`: for each layer the most positions that its buffer holds, where that is a ring; None, or no `rings`, for
        all positions. One of more positions than the capacity is none."""
        rings = tuple(rings) or (None,) * num_layers
        # Separate buffers, not one shared zero array: each is donated and updated in place.
        layers = [
            backend.init_cache(batch, config.num_key_value_heads, _places(ring, capacity), config.head_dim, dtype)
            for ring in rings
        ]
        keys, values = (tuple(pair[i] for pair in layers) for i in range(2))
        return cls(keys, values, jnp.zeros((batch,), jnp.int32), backend, capacity, rings)

    def moved(self, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], region: int) -> KVCache:
        """With positions start + sources of each sequence moved to start, start + 1, ...; sources are below `region`,
        static."""

        def move(keys: Array, values: Array, ring: int | None) -> tuple[Array, Array]:
            wraps = _places(ring, self.capacity) < self.capacity
            return self.backend.move(keys, values, start, sources, region, wraps=wraps)

        return self._mapped(move)

    def resized(self, capacity: int) -> KVCache:
        """The same entries with room for `capacity` positions. Lengths stay as they are, which the caller keeps within
        it."""

        def resize(keys: Array, values: Array, ring: int | None) -> tuple[Array, Array]:
            # Positions that fit in the smaller of both lie in their own slots: a ring that has wrapped keeps its size.
            return self.backend.resize(keys, values, _places(ring, capacity))

        return self._mapped(resize).replace(capacity=capacity)

    def layers(self) -> list[KVCache]:
        """Each layer's, as a cache of its own; `of_layers` makes one of them again."""
        each = zip(self.keys, self.values, self.rings, strict=True)
        return [self.replace(keys=(keys,), values=(values,), rings=(ring,)) for keys, values, ring in each]

    @classmethod
    def of_layers(cls, layers: Sequence[KVCache]) -> KVCache:
        keys, values, rings = ([getattr(x, name)[0] for x in layers] for name in ("keys", "values", "rings"))
        return layers[0].replace(keys=tuple(keys), values=tuple(values), rings=tuple(rings))

    def row(self, row: Int[Array, ""]) -> KVCache:
        """One sequence, as a cache of its own."""
        batch = len(self.length)
        taken = self._mapped(lambda keys, values, _: self.backend.take_row(keys, values, row, batch))
        return taken.replace(length=jax.lax.dynamic_slice_in_dim(self.length, row, 1))

    def with_rows(self, rows: Int[Array, " new"], new: KVCache) -> KVCache:
        """With the sequences of `new` in place of the sequences `rows`; those whose row is beyond the batch are dropped
        (`DenseBackend` alone). What lies beyond the capacity of `new`, which is no larger, stays: it is masked, and
        overwritten later."""
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

    def _mapped(self, change: Callable[[Array, Array, int | None], tuple[Array, Array]]) -> KVCache:
        keys, values = zip(*map(change, self.keys, self.values, self.rings), strict=True)
        return self.replace(keys=keys, values=values)


def _places(ring: int | None, capacity: int) -> int:
    """Positions that a layer's buffer holds."""
    return capacity if ring is None else min(ring, capacity)


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


@flax.struct.dataclass
class DraftMask:
    """What each query sees where drafts are not one sequence: query i all positions before `start`, and of those from
    `start` on, start + j where visible[i, j]."""

    start: Int[Array, " batch"]
    visible: Bool[Array, "batch time drafts"]
    all_places: Bool[Array, "batch time capacity"]  # the same, of a buffer that holds all positions

    @classmethod
    def create(cls, start: Int[Array, " batch"], visible: Bool[Array, "batch time drafts"], capacity: int) -> DraftMask:
        """For caches with room for `capacity` positions."""
        offsets = jnp.arange(capacity) - start[:, None]
        return cls(start, visible, (offsets < 0)[:, None] | _named(visible, offsets))

    def windowed(self, places: int, window: int) -> Bool[Array, "batch time places"]:
        """The same, of a buffer that may be a ring, and of each query's path the last `window` positions."""
        visible = within_window(self.visible, window)
        held = held_positions(self.start + visible.shape[-1] - 1, places)
        offsets = held - self.start[:, None]
        before = window - jnp.sum(visible, axis=-1, dtype=jnp.int32)[:, :, None]  # of the path's positions
        committed = ((held >= 0) & (offsets < 0))[:, None] & (offsets[:, None] >= -before)
        return committed | _named(visible, offsets)


def _named(
    visible: Bool[Array, "batch time drafts"], offsets: Int[Array, "batch places"]
) -> Bool[Array, "batch time places"]:
    """What `visible` says of each offset; of others, False."""
    inside = (offsets >= 0) & (offsets < visible.shape[-1])
    named = jnp.take_along_axis(visible, jnp.clip(offsets, 0, visible.shape[-1] - 1)[:, None], axis=2)
    return inside[:, None] & named


def causal_mask(start: Int[Array, " batch"], time: int, capacity: int) -> Bool[Array, "batch time capacity"]:
    """Query i, at position start + i, sees positions 0 .. start + i."""
    positions = start[:, None] + jnp.arange(time)
    return jnp.arange(capacity) <= positions[:, :, None]


def windowed_mask(
    start: Int[Array, " batch"], time: int, capacity: int, window: int
) -> Bool[Array, "batch time capacity"]:
    """The same of a buffer that may be a ring, and of each query's last `window` positions."""
    positions = (start[:, None] + jnp.arange(time))[:, :, None]
    held = held_positions(start + time - 1, capacity)[:, None]
    return (held >= 0) & (held <= positions) & (held > positions - window)


def piece_mask(start: Int[Array, " batch"], time: int, capacity: int, window: int) -> Bool[Array, "batch time places"]:
    """What a prompt's piece from `start` on sees of a ring as it was before, and of the piece itself, behind it."""
    offsets = jnp.arange(time)
    held = held_positions(start - 1, capacity)[:, None]
    before = (held >= 0) & (held > (start[:, None] + offsets - window)[:, :, None])
    apart = offsets[:, None] - offsets
    within = (apart >= 0) & (apart < window)
    return jnp.concatenate([before, jnp.broadcast_to(within, (len(start), time, time))], axis=-1)


def places_after_piece(
    start: Int[Array, " batch"], end: Int[Array, " batch"], capacity: int
) -> Int[Array, "batch capacity"]:
    """Of a ring and a piece behind it, what the ring holds after the piece, whose tokens end before `end`."""
    held = held_positions(end - 1, capacity)
    return jnp.where(held >= start[:, None], capacity + held - start[:, None], jnp.arange(capacity))


def held_positions(last: Int[Array, " batch"], capacity: int) -> Int[Array, "batch capacity"]:
    """The position that each slot of a ring holds, of those up to `last`; negative where it holds none. Where a later
    one has taken its place, it is one that no query from the round's first on may see (`Shapes.rings`)."""
    return last[:, None] - (last[:, None] - jnp.arange(capacity)) % capacity


def within_window(mask: Bool[Array, "batch time places"], window: int) -> Bool[Array, "batch time places"]:
    """Of what each query sees, the last `window` positions.

    A place is not a position: several tokens of a tree have one. But what a query sees is a path of tokens, one at each
    position up to its own, in this order. So the positions are counted along the path.
    """
    if mask.shape[-1] <= window:
        return mask
    count = jnp.cumsum(mask, axis=-1, dtype=jnp.int32)
    return mask & (count > count[:, :, -1:] - window)
