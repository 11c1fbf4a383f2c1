"""What an attention backend is, and which one a target's devices take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend


class AttentionBackend(Protocol):
    """How keys and values of one layer lie in memory, and how queries attend to them.

    Hashable, and static in compiled programs. `keys` and `values` are the backend's own layout; everything else is
    [batch, time, kv_heads, ...]. Positions are places in the cache, counted from 0 for each sequence. Where it `wraps`,
    static, position p lies in place p mod the capacity.
    """

    def init_cache(
        self, batch: int, kv_heads: int, capacity: int, head_dim: int, dtype: jnp.dtype
    ) -> tuple[Array, Array]:
        """Keys and values of one layer, with room for `capacity` positions per sequence."""

    def capacity(self, values: Array) -> int:
        """Positions per sequence."""

    def write(
        self,
        keys: Array,
        values: Array,
        new_keys: Float[Array, "batch time kv_heads head_dim"],
        new_values: Float[Array, "batch time kv_heads head_dim"],
        start: Int[Array, " batch"],
        *,
        wraps: bool = False,
    ) -> tuple[Array, Array]:
        """Writes positions start .. start + time - 1 of each sequence. The caller keeps them within the capacity, or
        `time` where it wraps."""

    def attend(
        self,
        query: Float[Array, "batch time kv_heads groups head_dim"],
        keys: Array,
        values: Array,
        mask: Bool[Array, "batch time capacity"],
        *,
        scale: float,
        soft_cap: float | None = None,
    ) -> Float[Array, "batch time kv_heads groups head_dim"]:
        """Attention of each query to the positions that its mask names. Scores are multiplied by `scale`, and capped
        as `scores.capped` says."""

    def move(
        self,
        keys: Array,
        values: Array,
        start: Int[Array, " batch"],
        sources: Int[Array, "batch moved"],
        region: int,
        *,
        wraps: bool = False,
    ) -> tuple[Array, Array]:
        """Moves positions start + sources to start, start + 1, ... of each sequence; sources are below `region`."""

    def take(self, keys: Array, values: Array, places: Int[Array, "batch taken"]) -> tuple[Array, Array]:
        """What lies in `places` of each sequence, one after another."""

    def resize(self, keys: Array, values: Array, capacity: int) -> tuple[Array, Array]:
        """The same entries with room for `capacity` positions: more, or fewer."""

    def take_row(self, keys: Array, values: Array, row: Int[Array, ""], batch: int) -> tuple[Array, Array]:
        """One sequence of `batch`, as keys and values of a batch of one."""

    def put_rows(
        self,
        keys: Array,
        values: Array,
        new_keys: Array,
        new_values: Array,
        rows: Int[Array, " new"],
        batch: int,
    ) -> tuple[Array, Array]:
        """Writes the sequences of another cache, whose capacity is no larger, over the sequences `rows` of one of
        `batch`; no two rows are equal."""

    def partition(self, shape: Sequence[int]) -> PartitionSpec:
        """How keys or values of `shape` are split over the mesh's devices along the axes that divide. Of backends for
        several devices alone."""


def choose_backend(mesh: Mesh | None, devices: Sequence[jax.Device]) -> AttentionBackend:
    """The backend for a target on `devices`: `CpuBackend` on one CPU device, else `DenseBackend`."""
    platforms = {device.platform for device in devices}
    if mesh is None and platforms == {"cpu"}:
        return CpuBackend()
    return DenseBackend(mesh, *platforms)
