"""The draft phase of a round: one token at a time, until gamma tokens or an unsure one (the second early exit)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.decode.pick import pick_token
from kangaroo_jax.decode.sampling import DRAFT
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.model.adapter import Adapter, adapter_apply, draft_head
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.target import TargetModel, shallow_apply


def draft(
    target: TargetModel,
    adapter: Adapter,
    state: DecodeState,
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    max_draft_len: int,
) -> Draft:
    """Drafts 1 to `max_draft_len` tokens per sequence (paper, section 3.2), greedily or sampled.

    A token whose top-1 draft probability is below `threshold` is kept, and is the sequence's last. Sampling does not
    change what is compared with `threshold`: the top-1 probability before temperature, top-k and top-p, so that a
    threshold means what it means in greedy decoding, and it depends on the tokens before the drafted one alone, as
    exact sampling needs. A sequence that
    has stopped idles, its lengths unchanged, until the slowest of the batch stops. K drafted tokens cost K passes of
    adapter and LM head and K + 1 of the shallow layers.

    Args:
      target: the model.
      adapter: trained for `exit_layer`.
      state: between rounds; the adapter's cache is one position behind the shallow one.
      threshold: eta.
      exit_layer: l, static.
      max_draft_len: gamma, static.

    Returns:
      The draft, with caches that include every drafted position.
    """
    batch, _, width = state.shallow_hidden.shape

    def shallow_step(tokens: Int[Array, " batch"], cache: KVCache, active: Bool[Array, " batch"]):
        hidden, new = shallow_apply(target, tokens[:, None], cache.length[:, None], cache, exit_layer=exit_layer)
        return hidden, new.replace(length=jnp.where(active, new.length, cache.length))

    def spread(probs: Float[Array, "batch drafted"]) -> Float[Array, "batch 1 vocab"]:
        """Over the whole vocabulary: 0 for tokens that cannot be drafted."""
        if adapter.draft_vocabulary is None:
            return probs[:, None]
        whole = jnp.zeros((batch, target.config.vocab_size))
        return whole.at[:, adapter.draft_vocabulary.token_ids[...]].set(probs)[:, None]

    def draft_step(carry, hidden: Float[Array, "batch time hidden"]):
        """One more token, from shallow hidden states that end at the last known position."""
        k, active, drafted = carry
        cache = drafted.adapter
        positions = cache.length[:, None] + jnp.arange(hidden.shape[1])
        adapted, new = adapter_apply(adapter, hidden, positions, cache)
        logits = draft_head(target, adapter, adapted[:, -1])
        top = jnp.max(logits, axis=-1)
        # The top-1 probability: softmax at the maximum.
        confidence = 1.0 / jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        index, probs = pick_token(logits, state.sampler, state.shallow.length + 1 + k, DRAFT)
        tokens = adapter.token_ids(index)
        next_hidden, shallow = shallow_step(tokens, drafted.shallow, active)
        drafted = Draft(
            tokens=jax.lax.dynamic_update_slice(drafted.tokens, tokens[:, None], (0, k)),
            confidence=jax.lax.dynamic_update_slice(drafted.confidence, confidence[:, None], (0, k)),
            probs=None if probs is None else jax.lax.dynamic_update_slice(drafted.probs, spread(probs), (0, k, 0)),
            length=drafted.length + active,
            hidden=jax.lax.dynamic_update_slice(drafted.hidden, next_hidden, (0, k + 1, 0)),
            shallow=shallow,
            adapter=new.replace(length=jnp.where(active, new.length, cache.length)),
        )
        return k + 1, active & (confidence >= threshold), drafted

    with jax.named_scope("draft"):
        active = ~state.finished
        hidden, shallow = shallow_step(state.token, state.shallow, active)
        drafted = Draft(
            tokens=jnp.zeros((batch, max_draft_len), jnp.int32),
            confidence=jnp.zeros((batch, max_draft_len)),
            length=jnp.zeros((batch,), jnp.int32),
            hidden=jnp.zeros((batch, max_draft_len + 1, width), hidden.dtype).at[:, :1].set(hidden),
            shallow=shallow,
            adapter=state.adapter,
            probs=None if state.sampler is None else jnp.zeros((batch, max_draft_len, target.config.vocab_size)),
        )
        # After a fully accepted draft the adapter has not seen position n - 1. Feeding it together with n costs no
        # extra pass over the weights, and where it has been seen the same entry is written again.
        carry = draft_step((0, active, drafted), jnp.concatenate([state.shallow_hidden, hidden], axis=1))
        _, _, drafted = jax.lax.while_loop(
            lambda carry: (carry[0] < max_draft_len) & jnp.any(carry[1]),
            lambda carry: draft_step(carry, jax.lax.dynamic_slice_in_dim(carry[2].hidden, carry[0], 1, axis=1)),
            carry,
        )
    return drafted
