"""The paper's draft model: an adapter of one attention and two norms on the shallow layers (section 3.1). An adapter
may also have several such layers of norm and attention before its last norm, and an MLP after them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.draft_model import Committed
from kangaroo_jax.model.layers import (
    MLP,
    Attention,
    AttentionContext,
    RMSNorm,
    added,
    apply_layers,
    attention_context,
)
from kangaroo_jax.model.target import TargetModel, lm_head, logits

_ROOM = 32  # the caches of a draft model that may have to catch up are larger by this many positions, or a multiple


class AdapterLayer(nnx.Module):
    """A decoder layer without the MLP: norm, attention, residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, config.attention_kinds[0], rngs=rngs, dtype=dtype)
        self.residual_multiplier = config.residual_multiplier

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), context, keys, values)
        return added(self.residual_multiplier, x, mixed), keys, values


class AdapterMLP(nnx.Module):
    """The other half of a decoder layer, of any width: norm, MLP, residual."""

    def __init__(self, config: ModelConfig, size: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.norm = RMSNorm(config, dtype)
        self.mlp = MLP(dataclasses.replace(config, intermediate_size=size), rngs=rngs, dtype=dtype)

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        return x + self.mlp(self.norm(x))


class DraftVocabulary(nnx.Module):
    """The tokens that drafts are made of, where they are not the whole vocabulary, and the LM head's rows for them.

    A draft step reads the whole head; for a large vocabulary most of that is rows of rare tokens. Verification is over
    the whole vocabulary in any case, so the output does not depend on what can be drafted.
    """

    def __init__(self, target: TargetModel, token_ids: Int[Array, " drafted"]):
        head = target.embed_tokens if target.lm_head is None else target.lm_head
        self.token_ids = nnx.Param(token_ids)
        self.weight = nnx.Param(head[...][token_ids])


@flax.struct.dataclass
class AdapterState:
    """Between rounds. The adapter's cache may lack position n - 1: after a fully accepted draft the adapter has not
    seen it. So it counts n - 1 positions, and the next round's first step sees position n - 1 (again) together with
    n. Where rounds may draft nothing, it may lack more, up to as many as `last` holds."""

    cache: KVCache  # length n - 1
    last: Float[Array, "batch kept hidden"]  # shallow hidden states at positions n - kept .. n - 1


class Adapter(nnx.Module):
    """RMSNorm, attention with a residual, RMSNorm. Its output goes through the target's LM head. A `DraftModel`.

    `config` is the target's: hidden size and heads are the same, and its attention is of the kind of the target's first
    layer (rotary settings, window). The paper's has one layer, and no MLP (`mlp_size` 0).
    """

    kind: ClassVar[str] = "kangaroo"
    depths: ClassVar[int] = 1  # how many places in a draft it tells apart

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        num_layers: int = 1,
        mlp_size: int = 0,
    ):
        self.config = config
        self.layers = nnx.List([AdapterLayer(config, rngs=rngs, dtype=dtype) for _ in range(num_layers)])
        self.mlp = nnx.data(AdapterMLP(config, mlp_size, rngs=rngs, dtype=dtype) if mlp_size else None)
        self.norm = RMSNorm(config, dtype)
        # Not trained: set where an adapter is loaded with one.
        self.draft_vocabulary: DraftVocabulary | None = nnx.data(None)

    @property
    def once_a_round(self) -> Any:
        """Parameters that are read once a round, as it begins to draft, and not in each draft step."""
        return ()

    def token_ids(self, index: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        return index if self.draft_vocabulary is None else self.draft_vocabulary.token_ids[...][index]

    def num_tokens(self, vocab_size: int) -> int:
        return vocab_size if self.draft_vocabulary is None else self.draft_vocabulary.token_ids.shape[0]

    def init(
        self,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backend: AttentionBackend,
        kept: int = 1,
        ring: int | None = None,
    ) -> AdapterState:
        layers = len(self.layers)
        if kept > 1:  # catching up writes so many positions, of which those at the end have no meaning
            room = -(-kept // _ROOM) * _ROOM
            capacity, ring = capacity + room, None if ring is None else ring + room
        cache = KVCache.empty(self.config, layers, batch, capacity, dtype, backend, (ring,) * layers)
        cache = cache.replace(numbers_only=True)
        return AdapterState(cache, jnp.zeros((batch, kept, self.config.hidden_size), dtype))

    def after_prefill(
        self,
        state: AdapterState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        deep: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> AdapterState:
        del tokens, deep
        positions = start[:, None] + jnp.arange(shallow.shape[1])
        cache = state.cache.replace(length=start, prompt_end=start + lengths)
        _, cache = adapter_apply(self, shallow, positions, cache)
        # Of a piece with fewer tokens than are kept, those before it are not needed: they have been seen.
        kept = state.last.shape[1]
        places = jnp.maximum(lengths[:, None] + jnp.arange(-kept, 0), 0)
        last = jnp.take_along_axis(shallow, places[:, :, None], axis=1)
        return AdapterState(cache.replace(length=start + lengths - 1, prompt_end=None), last)

    def catch_up(self, state: AdapterState, start: Int[Array, " batch"], behind: Int[Array, " batch"]) -> AdapterState:
        # The positions that are missing come first, so that nothing before them is written.
        kept = state.last.shape[1]
        places = jnp.minimum((kept - behind)[:, None] + jnp.arange(kept), kept - 1)
        hidden = jnp.take_along_axis(state.last, places[:, :, None], axis=1)
        first = start - behind
        positions = first[:, None] + jnp.arange(kept)
        _, cache = adapter_apply(self, hidden, positions, state.cache.replace(length=first))
        return state.replace(cache=cache)

    def begin(
        self,
        target: TargetModel,
        state: AdapterState,
        token: Int[Array, " batch"],
        shallow: Float[Array, "batch 1 hidden"],
        start: Int[Array, " batch"],
    ) -> tuple[AdapterState, Float[Array, "batch drafted"]]:
        del token
        adapted, cache = adapter_apply(self, *from_last(state, shallow, start))
        return state.replace(cache=cache), draft_head(target, self, adapted[:, -1])

    def observe(
        self,
        state: AdapterState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
    ) -> AdapterState:
        del tokens
        # Not the last token, from which no draft step would have been taken either.
        _, cache = adapter_apply(self, *from_last(state, shallow[:, :-1], start))
        return state.replace(cache=cache)

    def step(
        self,
        target: TargetModel,
        carry: AdapterState,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        positions: Int[Array, "batch time"] | None = None,
        mask: DraftMask | None = None,
    ) -> tuple[AdapterState, Float[Array, "batch time drafted"]]:
        del tokens
        if positions is None:
            positions = start[:, None] + jnp.arange(shallow.shape[1])
        adapted, cache = adapter_apply(self, shallow, positions, carry.cache.replace(length=start), mask=mask)
        return carry.replace(cache=cache), draft_head(target, self, adapted)

    def at_depths(
        self,
        shallow: Float[Array, "batch time hidden"],
        deep: Float[Array, "batch time hidden"],
        positions: Int[Array, "batch time"],
        mask: Bool[Array, "batch time time"],
        depths: Int[Array, "batch time"] | None,
    ) -> Float[Array, "batch time hidden"]:
        """For training: what the draft step at each position gives to the head, where it drafts the token `depths` of
        its round, from 1. `mask` keeps examples separate, whose `positions` begin at 0."""
        del deep, depths
        return adapter_apply(self, shallow, positions, mask=mask)[0]

    def after_verify(self, state: AdapterState, carry: AdapterState, committed: Committed) -> AdapterState:
        cache = carry.cache
        if committed.step_positions is not None:
            # No draft step was taken from a token of the last level. What is moved for it has no meaning, but has to be
            # numbers: the answer may end here, and what its slot holds reaches the next one, multiplied by zero.
            sources = jnp.minimum(committed.step_positions, committed.num_step_positions - 1)
            cache = cache.moved(committed.start + 1, sources, committed.num_step_positions)
        # Of the kept ones and those on the path, one after another, the last ones up to what was committed.
        kept = state.last.shape[1]
        places = committed.count[:, None] + jnp.arange(kept)
        nodes = jnp.take_along_axis(committed.path, jnp.maximum(places - kept, 0), axis=1)
        new = jnp.take_along_axis(committed.shallow, nodes[:, :, None], axis=1)
        old = jnp.take_along_axis(state.last, jnp.minimum(places, kept - 1)[:, :, None], axis=1)
        last = jnp.where((places >= kept)[:, :, None], new, old)
        return AdapterState(cache.replace(length=committed.start + committed.count - 1), last)


def from_last(
    state: AdapterState, shallow: Float[Array, "batch time hidden"], start: Int[Array, " batch"]
) -> tuple[Float[Array, "batch time+1 hidden"], Int[Array, "batch time+1"], KVCache]:
    """Arguments of `adapter_apply` for position n - 1 and those from n = `start` on. One position more costs no extra
    pass over the weights; where n - 1 has been seen, the same entry is written again."""
    hidden = jnp.concatenate([state.last[:, -1:], shallow], axis=1)
    positions = start[:, None] + jnp.arange(-1, shallow.shape[1])
    return hidden, positions, state.cache.replace(length=start - 1)


def adapter_apply(
    adapter: Adapter,
    hidden: Float[Array, "batch time hidden"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    mask: Bool[Array, "batch time time"] | DraftMask | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """The adapter over the shallow hidden states of `time` positions.

    Mirrors the authors' AdapterModel: one decoder layer without MLP (or several, or with one), then a norm. Arguments
    as for `shallow_apply`.

    Returns:
      Normed hidden states for `lm_head`, and the cache with the new entries counted in its length.
    """
    hidden, cache = adapter_layers_apply(adapter, hidden, positions, cache, mask=mask)
    return adapter_output(adapter, hidden), cache


def adapter_layers_apply(
    adapter: Adapter,
    hidden: Float[Array, "batch time hidden"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    mask: Bool[Array, "batch time time"] | DraftMask | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """The part of `adapter_apply` that sees other positions: all but `adapter_output`."""
    with jax.named_scope("adapter"):
        kinds = adapter.config.attention_kinds[:1] * len(adapter.layers)
        context = attention_context(kinds, positions, cache, mask, hidden.dtype)
        return apply_layers(adapter.layers, hidden, context, cache)


def adapter_output(adapter: Adapter, hidden: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
    """The rest of `adapter_apply`: the MLP, if the adapter has one, and the last norm."""
    with jax.named_scope("adapter"):
        return adapter.norm(hidden if adapter.mlp is None else adapter.mlp(hidden))


def draft_head(
    target: TargetModel, adapter: Adapter, adapted: Float[Array, "... hidden"]
) -> Float[Array, "... drafted"]:
    """float32 logits of the tokens that can be drafted (`Adapter.token_ids` names them), from `adapter_apply`'s hidden
    states: of the whole vocabulary, unless the adapter has a draft vocabulary."""
    if adapter.draft_vocabulary is None:
        return lm_head(target, adapted)
    with jax.named_scope("draft_head"):
        return logits(target.config, adapted, adapter.draft_vocabulary.weight[...])
