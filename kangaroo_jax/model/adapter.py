"""The adapter: the only trained part of the draft model (paper, section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.layers import Attention, AttentionContext, RMSNorm, apply_layers, attention_context
from kangaroo_jax.model.target import TargetModel, lm_head, logits


class AdapterLayer(nnx.Module):
    """A decoder layer without the MLP: norm, attention, residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), context, keys, values)
        return x + mixed, keys, values


class DraftVocabulary(nnx.Module):
    """The tokens that drafts are made of, where they are not the whole vocabulary, and the LM head's rows for them.

    A draft step reads the whole head; for a large vocabulary most of that is rows of rare tokens. Verification is over
    the whole vocabulary in any case, so the output does not depend on what can be drafted.
    """

    def __init__(self, target: TargetModel, token_ids: Int[Array, " drafted"]):
        head = target.embed_tokens if target.lm_head is None else target.lm_head
        self.token_ids = nnx.Param(token_ids)
        self.weight = nnx.Param(head[...][token_ids])


class Adapter(nnx.Module):
    """RMSNorm, attention with a residual, RMSNorm. Its output goes through the target's LM head.

    `config` is the target's: hidden size, heads and rotary settings are the same.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.layers = nnx.List([AdapterLayer(config, rngs=rngs, dtype=dtype)])
        self.norm = RMSNorm(config, dtype)
        # Not trained: set where an adapter is loaded with one.
        self.draft_vocabulary: DraftVocabulary | None = nnx.data(None)

    def token_ids(self, index: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The tokens at places of `draft_head`'s last axis."""
        return index if self.draft_vocabulary is None else self.draft_vocabulary.token_ids[...][index]


def abstract_adapter(config: ModelConfig, dtype: jnp.dtype) -> Adapter:
    """The adapter of a target with `config`, with shapes in place of weights."""
    return nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0), dtype=dtype))


def adapter_apply(
    adapter: Adapter,
    hidden: Float[Array, "batch time hidden"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    mask: Bool[Array, "batch time keys"] | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """The adapter over the shallow hidden states of `time` positions.

    Mirrors the authors' AdapterModel: one decoder layer without MLP, then a norm. Arguments as for `shallow_apply`.

    Returns:
      Normed hidden states for `lm_head`, and the cache with the new entries counted in its length.
    """
    with jax.named_scope("adapter"):
        context = attention_context(adapter.config, positions, cache, mask, hidden.dtype)
        hidden, cache = apply_layers(adapter.layers, hidden, context, cache)
        return adapter.norm(hidden), cache


def draft_head(
    target: TargetModel, adapter: Adapter, adapted: Float[Array, "... hidden"]
) -> Float[Array, "... drafted"]:
    """float32 logits of the tokens that can be drafted (`Adapter.token_ids` names them), from `adapter_apply`'s hidden
    states: of the whole vocabulary, unless the adapter has a draft vocabulary."""
    if adapter.draft_vocabulary is None:
        return lm_head(target, adapted)
    with jax.named_scope("draft_head"):
        return logits(adapted, adapter.draft_vocabulary.weight[...])
