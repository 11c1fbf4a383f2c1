"""The draft model that remembers: the paper's adapter, with the target's own newest hidden state added to its output.

Each verification computes the normed last hidden state of every token it commits, from which the target chose the next
one. The paper throws them away. Here the newest of them goes into every draft step of the next round, through a product
for each depth: the first drafted token is one token behind what that state was for, the second two tokens.

The adapter's keys and values do not depend on it, so its cache is the paper's, in sequences and in trees. And a
position in training can be taken at any depth of a draft, whatever the depths of the positions it attends to.
"""

from __future__ import annotations

from typing import ClassVar

import flax.struct
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.draft_model import Committed
from kangaroo_jax.model.drafts.kangaroo import (
    Adapter,
    AdapterState,
    adapter_layers_apply,
    adapter_output,
    draft_head,
    from_last,
)
from kangaroo_jax.model.layers import INIT, RMSNorm
from kangaroo_jax.model.ops import dot
from kangaroo_jax.model.target import TargetModel


class Memory(nnx.Module):
    """What a deep hidden state adds to the adapter's output at each depth: norm, product."""

    def __init__(self, config: ModelConfig, depths: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.norm = RMSNorm(config, dtype)
        shape = (config.hidden_size, depths, config.hidden_size)
        self.memory_proj = nnx.Param(INIT(rngs.params(), shape, dtype))

    def __call__(self, deep: Float[Array, "batch 1 hidden"]) -> Float[Array, "batch depths hidden"]:
        """At all depths, from 1."""
        return dot("bk,kdn->bdn", self.norm(deep[:, 0]), self.memory_proj[...])

    def at(
        self, deep: Float[Array, "batch time hidden"], depths: Int[Array, "batch time"]
    ) -> Float[Array, "batch time hidden"]:
        """At a depth for each state; 0 adds nothing, and deeper ones what the last depth does."""
        normed, depths = self.norm(deep), jnp.minimum(depths, self.memory_proj.shape[1])

        def chosen(depth: int) -> Float[Array, "batch time hidden"]:
            of_depth = jnp.where((depths == depth)[:, :, None], normed, 0)
            return dot("...k,kn->...n", of_depth, self.memory_proj[:, depth - 1])

        return sum(chosen(depth) for depth in range(1, self.memory_proj.shape[1] + 1))


@flax.struct.dataclass
class MemoryState:
    """Between rounds; and within one, when `known` and `depth` have a meaning."""

    adapter: AdapterState
    newest: Float[Array, "batch 1 hidden"]  # the newest known deep state, of position n - 1
    known: Float[Array, "batch depths hidden"]  # what it adds at each depth
    depth: Int[Array, " batch"]  # draft steps taken in the round


class MemoryAdapter(Adapter):
    """RMSNorm, attention with a residual, the residual of the newest deep state, an MLP if asked for, RMSNorm. A
    `DraftModel`."""

    kind: ClassVar[str] = "memory"
    depths: ClassVar[int] = 4  # deeper tokens, which few rounds reach, are drafted as the last of these

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        num_layers: int = 1,
        mlp_size: int = 0,
    ):
        super().__init__(config, rngs=rngs, dtype=dtype, num_layers=num_layers, mlp_size=mlp_size)
        self.memory = Memory(config, self.depths, rngs=rngs, dtype=dtype)

    @property
    def once_a_round(self) -> Memory:
        return self.memory

    def init(
        self,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backend: AttentionBackend,
        kept: int = 1,
        ring: int | None = None,
    ) -> MemoryState:
        state = super().init(batch, capacity, dtype, backend, kept, ring)
        newest, known = (jnp.zeros((batch, count, self.config.hidden_size), dtype) for count in (1, self.depths))
        return MemoryState(state, newest, known, jnp.zeros((batch,), jnp.int32))

    def after_prefill(
        self,
        state: MemoryState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        deep: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> MemoryState:
        newest = jnp.take_along_axis(deep, (lengths - 1)[:, None, None], axis=1)
        adapter = super().after_prefill(state.adapter, tokens, shallow, deep, start, lengths)
        return state.replace(adapter=adapter, newest=newest)

    def catch_up(self, state: MemoryState, start: Int[Array, " batch"], behind: Int[Array, " batch"]) -> MemoryState:
        return state.replace(adapter=super().catch_up(state.adapter, start, behind))

    def begin(
        self,
        target: TargetModel,
        state: MemoryState,
        token: Int[Array, " batch"],
        shallow: Float[Array, "batch 1 hidden"],
        start: Int[Array, " batch"],
    ) -> tuple[MemoryState, Float[Array, "batch drafted"]]:
        del token
        hidden, positions, cache = from_last(state.adapter, shallow, start)
        # Here and not after verification: a round that drafts nothing does without it.
        known = self.memory(state.newest)
        adapted, cache = memory_apply(self, hidden, known[:, :1], positions, cache)
        adapter, depth = state.adapter.replace(cache=cache), jnp.ones_like(state.depth)
        carry = state.replace(adapter=adapter, known=known, depth=depth)
        return carry, draft_head(target, self, adapted[:, -1])

    def observe(
        self,
        state: MemoryState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
    ) -> MemoryState:
        return state.replace(adapter=super().observe(state.adapter, tokens, shallow, start))

    def step(
        self,
        target: TargetModel,
        carry: MemoryState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        positions: Int[Array, "batch time"] | None = None,
        mask: DraftMask | None = None,
    ) -> tuple[MemoryState, Float[Array, "batch time drafted"]]:
        del tokens
        if positions is None:
            positions = start[:, None] + jnp.arange(shallow.shape[1])
        cache = carry.adapter.cache.replace(length=start)
        depth = jnp.minimum(carry.depth, self.depths - 1)
        known = jnp.take_along_axis(carry.known, depth[:, None, None], axis=1)
        adapted, cache = memory_apply(self, shallow, known, positions, cache, mask=mask)
        carry = carry.replace(adapter=carry.adapter.replace(cache=cache), depth=carry.depth + 1)
        return carry, draft_head(target, self, adapted)

    def at_depths(
        self,
        shallow: Float[Array, "batch time hidden"],
        deep: Float[Array, "batch time hidden"],
        positions: Int[Array, "batch time"],
        mask: Bool[Array, "batch time time"],
        depths: Int[Array, "batch time"] | None,
    ) -> Float[Array, "batch time hidden"]:
        # The token that is drafted at depth d from position t is the d-th of a round whose newest known deep state is
        # that of position t - d. As deep as a position is in its example; its first has none before it, and is never
        # drafted from: decoding begins behind a prompt of one token or more.
        depths = jnp.minimum(depths, positions)
        newest = jnp.maximum(jnp.arange(positions.shape[1]) - depths, 0)
        known = self.memory.at(jnp.take_along_axis(deep, newest[:, :, None], axis=1), depths)
        return memory_apply(self, shallow, known, positions, mask=mask)[0]

    def after_verify(self, state: MemoryState, carry: MemoryState, committed: Committed) -> MemoryState:
        adapter = super().after_verify(state.adapter, carry.adapter, committed)
        newest = jnp.where((committed.count == 0)[:, None, None], state.newest, committed.newest(committed.deep))
        return carry.replace(adapter=adapter, newest=newest)


def memory_apply(
    adapter: MemoryAdapter,
    hidden: Float[Array, "batch time hidden"],
    known: Float[Array, "batch known hidden"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    mask: Bool[Array, "batch time time"] | DraftMask | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """`adapter_apply` with `known`, what `Memory` makes of the newest known deep state, added after the attention."""
    mixed, cache = adapter_layers_apply(adapter, hidden, positions, cache, mask=mask)
    return adapter_output(adapter, mixed + known), cache
