"""The frozen target, split at the exit layer into its shallow and deep parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model.attention.scores import capped
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import family_of
from kangaroo_jax.model.layers import INIT, RMSNorm, apply_layers, attention_context
from kangaroo_jax.model.ops import dot, rows
from kangaroo_jax.model.quantized import QuantizedArray


class TargetModel(nnx.Module):
    """A decoder of any family (transformers' LlamaForCausalLM and others). Weights and static shape only."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
        compute_dtype: jnp.dtype | None = None,
    ):
        self.config = config
        self._compute_dtype = None if compute_dtype is None else jnp.dtype(compute_dtype)
        self.embed_tokens = nnx.Param(INIT(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        layer = family_of(config).decoder_layer
        self.layers = nnx.List([layer(config, i, rngs=rngs, dtype=dtype) for i in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config, dtype)
        # [vocab, hidden] like the embedding, so that tied and untied heads are one code path.
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nnx.Param(INIT(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Of the weights that are floats: all of them, or what `weights` leaves."""
        return self.norm.weight.dtype

    @property
    def weights(self) -> str:
        """What the matrices are stored as, one of `quantized.WEIGHTS`."""
        return "int8" if isinstance(self.embed_tokens[...], QuantizedArray) else "float"

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Of activations and caches: the weights' own, unless the model was made with another."""
        return self.dtype if self._compute_dtype is None else self._compute_dtype

    @property
    def arithmetic(self) -> str:
        """What its numbers depend on besides the weights' values: "bfloat16", "bfloat16, computed in float32", or
        "bfloat16, int8 weights"."""
        how = [str(self.dtype)]
        if self.compute_dtype != self.dtype:
            how.append(f"computed in {self.compute_dtype}")
        if self.weights == "int8":
            how.append("int8 weights")
        return ", ".join(how)


def shallow_apply(
    target: TargetModel,
    tokens: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    exit_layer: int,
    mask: Bool[Array, "batch time time"] | DraftMask | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """Embedding and layers [0, exit_layer): the shallow sub-network (paper, section 3.1).

    Args:
      target: the model.
      tokens: token ids.
      positions: their rotary positions.
      cache: the shallow layers' cache; new entries go to its positions length .. length + time - 1. None attends over
        the given tokens alone.
      exit_layer: l, static.
      mask: replaces the causal mask: what of the drafts a query may see, or without a cache True where it may look.

    Returns:
      The hidden state after layer exit_layer - 1, and the cache with the new entries counted in its length.
    """
    with jax.named_scope("shallow"):
        hidden = _embedded(target, tokens, cache)
        if target.config.embedding_multiplier != 1:
            hidden = hidden * jnp.asarray(target.config.embedding_multiplier, hidden.dtype)
        kinds = target.config.attention_kinds[:exit_layer]
        context = attention_context(kinds, positions, cache, mask, hidden.dtype)
        return apply_layers(target.layers[:exit_layer], hidden, context, cache)


def _embedded(
    target: TargetModel, tokens: Int[Array, "batch time"], cache: KVCache | None
) -> Float[Array, "batch time hidden"]:
    """The embedding's rows for `tokens`."""
    mesh = None if cache is None else getattr(cache.backend, "mesh", None)
    if tokens.size == 1 and mesh is not None and mesh.shape["model"] > 1:
        # XLA for GPU turns a lookup of one row into a slice, for which it gathers the split table, 262 MB for a 7B
        # model. For two rows each device looks up what it has, and the sum is sent. The barrier hides that both are the
        # same.
        both = jax.lax.optimization_barrier(jnp.concatenate([tokens, tokens]))
        return rows(target.embed_tokens[...], both, target.compute_dtype)[:1]
    return rows(target.embed_tokens[...], tokens, target.compute_dtype)


def deep_apply(
    target: TargetModel,
    hidden: Float[Array, "batch time hidden"],
    positions: Int[Array, "batch time"],
    cache: KVCache | None = None,
    *,
    exit_layer: int,
    mask: Bool[Array, "batch time time"] | DraftMask | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache | None]:
    """Layers [exit_layer, L) and the final norm, from `shallow_apply`'s hidden states.

    Arguments as for `shallow_apply`. Returns the normed hidden state that `lm_head` takes, and the cache.
    """
    with jax.named_scope("deep"):
        kinds = target.config.attention_kinds[exit_layer:]
        context = attention_context(kinds, positions, cache, mask, hidden.dtype)
        hidden, cache = apply_layers(target.layers[exit_layer:], hidden, context, cache)
        return target.norm(hidden), cache


def lm_head(target: TargetModel, hidden: Float[Array, "... hidden"]) -> Float[Array, "... vocab"]:
    """float32 logits of normed hidden states (the target's, or the adapter's)."""
    with jax.named_scope("head"):
        weight = target.embed_tokens if target.lm_head is None else target.lm_head
        return logits(target.config, hidden, weight[...])


def logits(
    config: ModelConfig, hidden: Float[Array, "... hidden"], weight: Float[Array, "vocab hidden"] | QuantizedArray
) -> Float[Array, "... vocab"]:
    """float32 logits of a target with `config`, by a head's rows. Accumulated in float32 and not rounded: in bfloat16,
    logits near 20 are 0.125 apart, and ties would decide."""
    found = dot("...d,vd->...v", hidden, weight, accumulate=jnp.float32)
    if config.logits_divisor != 1:
        found = found / config.logits_divisor
    return capped(found, config.logits_soft_cap)
