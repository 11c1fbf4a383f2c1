"""The adapter: the only trained part of the draft model (paper, section 3.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.config import ModelConfig
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.layers import Attention, AttentionContext, RMSNorm, apply_layers, attention_context


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


class Adapter(nnx.Module):
    """RMSNorm, attention with a residual, RMSNorm. Its output goes through the target's LM head.

    `config` is the target's: hidden size, heads and rotary settings are the same.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.layers = nnx.List([AdapterLayer(config, rngs=rngs, dtype=dtype)])
        self.norm = RMSNorm(config, dtype)


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
