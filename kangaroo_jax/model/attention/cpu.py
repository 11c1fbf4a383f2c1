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

from kangaroo_jax import processor
from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.ops import precision

Keys = Float[Array, "batch*kv_heads head_dim capacity"]
Values = Float[Array, "batch*kv_heads capacity head_dim"]

# A prompt's piece attends with so many queries at a time (the first number that divides its width; widths are multiples
# of the last), to so many positions at a time.
_QUERIES = (256, 128, 64)
_POSITIONS = 256
# In a batch, so many queries of a head at most are multiplied with its keys and values as sums, not as products.
_SUMMED = 4


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
        self,
        keys: Keys,
        values: Values,
        new_keys: Array,
        new_values: Array,
        start: Int[Array, " batch"],
        *,
        wraps: bool = False,
    ) -> tuple[Keys, Values]:
        (batch, time, kv_heads, head_dim), dtype = new_keys.shape, keys.dtype
        new_keys = new_keys.transpose(0, 2, 3, 1).reshape(batch * kv_heads, head_dim, time)
        new_values = new_values.transpose(0, 2, 1, 3).reshape(batch * kv_heads, time, head_dim)
        keys, values, new_keys, new_values = map(_bits, (keys, values, new_keys, new_values))
        for i in range(batch):
            rows = slice(i * kv_heads, (i + 1) * kv_heads)
            if wraps:
                keys = _write_round(keys, new_keys[rows], rows.start, start[i], axis=2)
                values = _write_round(values, new_values[rows], rows.start, start[i], axis=1)
            else:
                keys = jax.lax.dynamic_update_slice(keys, new_keys[rows], (rows.start, 0, start[i]))
                values = jax.lax.dynamic_update_slice(values, new_values[rows], (rows.start, start[i], 0))
        return _floats(keys, dtype), _floats(values, dtype)

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
        if time % _QUERIES[-1] == 0:
            return _attend_in_blocks(query, keys, values, mask, scale, soft_cap)
        merged = batch * kv_heads
        dtype = query.dtype
        query = query.transpose(0, 2, 3, 1, 4).reshape(merged, groups * time, head_dim)
        # Half to nine tenths of the time of a library's small products. (docs/dev/performance.md)
        few = batch > 1 and groups * time <= _SUMMED
        summed = few and dtype == jnp.float32 and processor.vectors_are_avx2()
        if summed:
            scores = jnp.sum(query[..., None] * keys[:, None], axis=2)
        else:
            scores = jnp.einsum(
                "nqd,nds->nqs", query, keys, precision=precision(dtype), preferred_element_type=jnp.float32
            )
        scores = capped(scores.reshape(batch, kv_heads, groups, time, -1) * scale, soft_cap)
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype).reshape(merged, groups * time, -1)
        if summed:
            mixed = jnp.sum(weights[..., None] * values[:, None], axis=2)
        else:
            mixed = jnp.einsum("nqs,nsd->nqd", weights, values, precision=precision(dtype))
        return mixed.reshape(batch, kv_heads, groups, time, head_dim).transpose(0, 3, 1, 2, 4)

    def move(
        self,
        keys: Keys,
        values: Values,
        start: Int[Array, " batch"],
        sources: Int[Array, "batch moved"],
        region: int,
        *,
        wraps: bool = False,
    ) -> tuple[Keys, Values]:
        if wraps:
            return _move_round(keys, start, sources, axis=2), _move_round(values, start, sources, axis=1)
        return _move(keys, start, sources, region, axis=2), _move(values, start, sources, region, axis=1)

    def take(self, keys: Keys, values: Values, places: Int[Array, "batch taken"]) -> tuple[Keys, Values]:
        places = jnp.repeat(places, len(keys) // len(places), axis=0)
        return tuple(
            jnp.take_along_axis(x, at, axis=axis)
            for x, at, axis in ((keys, places[:, None], 2), (values, places[:, :, None], 1))
        )

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
        heads, dtype = keys.shape[0] // batch, keys.dtype
        keys, values, new_keys, new_values = map(_bits, (keys, values, new_keys, new_values))
        for i in range(len(rows)):
            source = slice(i * heads, (i + 1) * heads)
            keys = jax.lax.dynamic_update_slice(keys, new_keys[source], (rows[i] * heads, 0, 0))
            values = jax.lax.dynamic_update_slice(values, new_values[source], (rows[i] * heads, 0, 0))
        return _floats(keys, dtype), _floats(values, dtype)


def _bits(x: Array) -> Array:
    """Floats of two bytes as integers. XLA for CPU converts such floats to float32 also where they are only moved, and
    makes one loop over the complete buffer of all sequences' updates, in place of one write for each."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype) if dtype.itemsize == 2 else x


def _attend_in_blocks(
    query: Float[Array, "batch time kv_heads groups head_dim"],
    keys: Keys,
    values: Values,
    mask: Bool[Array, "batch time capacity"],
    scale: float,
    soft_cap: float | None,
) -> Float[Array, "batch time kv_heads groups head_dim"]:
    """Attention of a prompt's piece: the scores of some queries and positions at a time, which stay in the cache, from
    the first to the last positions that any of these queries sees. (Online softmax: Milakov and Gimelshein, arXiv
    1805.02867; in blocks: FlashAttention, arXiv 2205.14135.) docs/dev/performance.md has what it brings.
    """
    batch, time, kv_heads, groups, head_dim = query.shape
    merged, capacity, dtype = batch * kv_heads, values.shape[1], query.dtype
    size = next(size for size in _QUERIES if time % size == 0)
    width = min(_POSITIONS, capacity)
    exact, least = precision(dtype), jnp.finfo(jnp.float32).min

    def some(block: tuple[Array, Array, Array, Array]) -> Array:
        query, mask, first, last = block

        def add(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            highest, total, mixed = sums
            start = jnp.minimum(i * width, capacity - width)  # the last block may begin within the one before
            seen = jax.lax.dynamic_slice_in_dim(mask, start, width, axis=2) & (start + jnp.arange(width) >= i * width)
            part = jax.lax.dynamic_slice_in_dim(keys, start, width, axis=2)
            scores = jnp.einsum("nqd,nds->nqs", query, part, precision=exact, preferred_element_type=jnp.float32)
            scores = capped(scores.reshape(batch, kv_heads, groups, size, width) * scale, soft_cap)
            scores = jnp.where(seen[:, None, None], scores, least).reshape(merged, groups * size, width)
            # Where nothing was seen yet, `highest` is `least`: the first score that counts takes back what was added.
            new = jnp.maximum(highest, scores.max(axis=-1))
            weights, kept = jnp.exp(scores - new[..., None]), jnp.exp(highest - new)
            part = jax.lax.dynamic_slice_in_dim(values, start, width, axis=1)
            more = jnp.einsum(
                "nqs,nsd->nqd", weights.astype(dtype), part, precision=exact, preferred_element_type=jnp.float32
            )
            return new, total * kept + weights.sum(axis=-1), mixed * kept[..., None] + more

        rows = (merged, groups * size)
        sums = jnp.full(rows, least), jnp.zeros(rows), jnp.zeros((*rows, head_dim))
        _, total, mixed = jax.lax.fori_loop(first, last, add, sums)
        return (mixed / jnp.where(total == 0, 1, total)[..., None]).astype(dtype)  # 0: queries of padding

    query = query.reshape(batch, -1, size, kv_heads, groups, head_dim).transpose(1, 0, 3, 4, 2, 5)
    mask = mask.reshape(batch, -1, size, capacity).swapaxes(0, 1)
    places = jnp.arange(capacity)
    seen = mask.any(axis=(1, 2))
    first = jnp.where(seen, places, capacity).min(axis=1) // width
    last = jnp.where(seen, places, -1).max(axis=1) // width + 1
    mixed = jax.lax.map(some, (query.reshape(-1, merged, groups * size, head_dim), mask, first, last))
    mixed = mixed.reshape(-1, batch, kv_heads, groups, size, head_dim).transpose(1, 0, 4, 2, 3, 5)
    return mixed.reshape(batch, time, kv_heads, groups, head_dim)


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
        entries = jax.lax.dynamic_slice(buffer, place, shape)
        buffer = jax.lax.dynamic_update_slice(buffer, jnp.take(entries, sources[i], axis=axis), place)
    return buffer


def _write_round(buffer: Array, new: Array, row: int, start: Int[Array, ""], axis: int) -> Array:
    """Writes `new` from row `row` and position `start` on, round the buffer's end: as two updates in place, of which
    each leaves what the other writes."""
    capacity, time = buffer.shape[axis], new.shape[axis]
    first = start % capacity
    place = [row, 0, 0]
    if time == 1:
        place[axis] = first
        return jax.lax.dynamic_update_slice(buffer, new, place)
    beyond = jnp.maximum(first - (capacity - time), 0)  # how many go to the buffer's beginning
    offsets = jnp.arange(time)
    new = jnp.take(new, (offsets - beyond) % time, axis=axis)
    offsets = jnp.expand_dims(offsets, [other for other in range(3) if other != axis])
    for place[axis], written in ((first - beyond, offsets >= beyond), (0, offsets < beyond)):
        old = jax.lax.dynamic_slice(buffer, place, new.shape)
        buffer = jax.lax.dynamic_update_slice(buffer, jnp.where(written, new, old), place)
    return buffer


def _move_round(buffer: Array, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], axis: int) -> Array:
    """`_move` in a ring."""
    batch = len(sources)
    heads = buffer.shape[0] // batch
    for i in range(batch):
        rows = jnp.arange(i * heads, (i + 1) * heads)[:, None]
        places = (start[i] + sources[i]) % buffer.shape[axis]
        if axis == 1:
            entries = buffer[rows, places]
        else:
            entries = buffer[rows[:, :, None], jnp.arange(buffer.shape[1])[:, None], places]
        buffer = _write_round(buffer, entries, i * heads, start[i], axis)
    return buffer
