"""Key/value cache: fixed-size buffers per layer and one length per sequence."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of a run of layers.

    Rolling back is setting `length`: entries beyond it are masked, and overwritten by the next write. Buffers are
    [heads, time, head_dim] so that attention reads each head's keys in one contiguous run. Batch and heads are one
    axis (sequence 0's heads, then sequence 1's) because that is how the matrix product takes them: given two, XLA on
    CPU fuses the update with the reshape between them and copies the whole buffer at every step.
    """

    keys: tuple[Float[Array, "batch*kv_heads capacity head_dim"], ...]
    values: tuple[Float[Array, "batch*kv_heads capacity head_dim"], ...]
    length: Int[Array, " batch"]  # valid entries per sequence

    @classmethod
    def empty(cls, config: ModelConfig, num_layers: int, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
        """A cache for `num_layers` layers with room for `capacity` positions per sequence."""
        shape = (batch * config.num_key_value_heads, capacity, config.head_dim)
        # Separate buffers, not one shared zero array: each is donated and updated in place.
        keys, values = (tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)) for _ in range(2))
        return cls(keys, values, jnp.zeros((batch,), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1] if self.keys else 0

    def grown(self, capacity: int) -> KVCache:
        """The same entries in buffers with room for `capacity` positions."""
        pad = [(0, 0), (0, capacity - self.capacity), (0, 0)]
        keys, values = (tuple(jnp.pad(x, pad) for x in side) for side in (self.keys, self.values))
        return self.replace(keys=keys, values=values)


def write(
    buffer: Float[Array, "batch*kv_heads capacity head_dim"],
    new: Float[Array, "batch*kv_heads time head_dim"],
    start: Int[Array, " batch"],
) -> Float[Array, "batch*kv_heads capacity head_dim"]:
    """Writes `new` at slots start .. start + time - 1 of each sequence. The caller keeps that within capacity."""
    # One slice update per sequence is done in place inside loops; the scatter that vmap makes of it is not, on CPU.
    batch = start.shape[0]
    heads = buffer.shape[0] // batch
    for i in range(batch):
        rows = new[i * heads : (i + 1) * heads]
        buffer = jax.lax.dynamic_update_slice(buffer, rows, (i * heads, start[i], 0))
    return buffer


def causal_mask(start: Int[Array, " batch"], time: int, capacity: int) -> Bool[Array, "batch time capacity"]:
    """Query i, at slot start + i, sees slots 0 .. start + i."""
    slots = start[:, None] + jnp.arange(time)
    return jnp.arange(capacity) <= slots[:, :, None]
