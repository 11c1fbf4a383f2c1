"""Key/value cache: fixed-size buffers per layer and one length per sequence."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.rotary import rotary_angles


@flax.struct.dataclass
class KVCache:
    """Keys and values of a run of layers.

    Rolling back is setting `length`: entries beyond it are masked, and overwritten by the next write. Each head's keys
    and values lie together, the keys transposed, so that both of attention's matrix products take them as they are
    (on CPU, a transposed operand makes a small product several times slower). Batch and heads are one axis (sequence
    0's heads, then sequence 1's) because that is how the products take them: given two, XLA on CPU fuses the update
    with the reshape between them and copies the whole buffer at every step.
    """

    keys: tuple[Float[Array, "batch*kv_heads head_dim capacity"], ...]
    values: tuple[Float[Array, "batch*kv_heads capacity head_dim"], ...]
    length: Int[Array, " batch"]  # valid entries per sequence
    cos: Float[Array, "capacity head_dim"]  # rotary angles by position; a sequence's positions are below capacity
    sin: Float[Array, "capacity head_dim"]

    @classmethod
    def empty(cls, config: ModelConfig, num_layers: int, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
        """A cache for `num_layers` layers with room for `capacity` positions per sequence."""
        rows, width = batch * config.num_key_value_heads, config.head_dim
        # Separate buffers, not one shared zero array: each is donated and updated in place.
        keys = tuple(jnp.zeros((rows, width, capacity), dtype) for _ in range(num_layers))
        values = tuple(jnp.zeros((rows, capacity, width), dtype) for _ in range(num_layers))
        return cls(keys, values, jnp.zeros((batch,), jnp.int32), *rotary_angles(config, jnp.arange(capacity), dtype))

    def moved(self, start: Int[Array, " batch"], sources: Int[Array, "batch moved"], region: int) -> KVCache:
        """With the entries at slots start + sources of each sequence moved to start, start + 1, ... (see `move`)."""
        return self.replace(
            keys=tuple(move(x, start, sources, region, axis=2) for x in self.keys),
            values=tuple(move(x, start, sources, region, axis=1) for x in self.values),
        )

    @property
    def capacity(self) -> int:
        return self.cos.shape[0]

    def grown(self, config: ModelConfig, capacity: int) -> KVCache:
        """The same entries in buffers with room for `capacity` positions."""
        none, more = (0, 0), (0, capacity - self.capacity)
        keys = tuple(jnp.pad(x, [none, none, more]) for x in self.keys)
        values = tuple(jnp.pad(x, [none, more, none]) for x in self.values)
        cos, sin = rotary_angles(config, jnp.arange(capacity), self.cos.dtype)
        return self.replace(keys=keys, values=values, cos=cos, sin=sin)


def write(
    buffer: Float[Array, "batch*kv_heads ..."],
    new: Float[Array, "batch*kv_heads ..."],
    start: Int[Array, " batch"],
    axis: int,
) -> Float[Array, "batch*kv_heads ..."]:
    """Writes `new` at slots start .. start + time - 1 of each sequence, slots being along `axis`: 2 for keys, 1 for
    values. The caller keeps that within capacity."""
    # One slice update per sequence is done in place inside loops; the scatter that vmap makes of it is not, on CPU.
    batch = start.shape[0]
    heads = buffer.shape[0] // batch
    for i in range(batch):
        place = [i * heads, 0, 0]
        place[axis] = start[i]
        buffer = jax.lax.dynamic_update_slice(buffer, new[i * heads : (i + 1) * heads], place)
    return buffer


def move(
    buffer: Float[Array, "batch*kv_heads ..."],
    start: Int[Array, " batch"],
    sources: Int[Array, "batch moved"],
    region: int,
    axis: int,
) -> Float[Array, "batch*kv_heads ..."]:
    """Moves the entries at slots start + sources to slots start, start + 1, ... of each sequence.

    Args:
      buffer: keys or values.
      start: of each sequence.
      sources: offsets, below `region`.
      region: slots from `start` on that are read, static.
      axis: of the slots, as for `write`.
    """
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


def causal_mask(start: Int[Array, " batch"], time: int, capacity: int) -> Bool[Array, "batch time capacity"]:
    """Query i, at slot start + i, sees slots 0 .. start + i."""
    slots = start[:, None] + jnp.arange(time)
    return jnp.arange(capacity) <= slots[:, :, None]


def draft_mask(
    start: Int[Array, " batch"], visible: Bool[Array, "batch time drafts"], capacity: int
) -> Bool[Array, "batch time capacity"]:
    """Query i sees all slots before `start`, and those of the slots start + j that visible[i, j] names."""
    offsets = jnp.arange(capacity) - start[:, None]
    inside = (offsets >= 0) & (offsets < visible.shape[-1])
    named = jnp.take_along_axis(visible, jnp.clip(offsets, 0, visible.shape[-1] - 1)[:, None], axis=2)
    return (offsets < 0)[:, None] | (inside[:, None] & named)
