"""The draft phase of a round: one token at a time, until gamma tokens or an unsure one (the second early exit)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from kangaroo_jax.decode.pick import pick_token
from kangaroo_jax.decode.sampling import DRAFT, Sampling
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel, shallow_apply


def draft_sequence(
    target: TargetModel,
    draft_model: DraftModel,
    state: DecodeState,
    threshold: Float[Array, ""] | None,
    sampling: Sampling | None,
    *,
    exit_layer: int,
    max_draft_len: int,
    drafting: Bool[Array, " batch"] | None = None,
    drafted_before: Int[Array, " batch"] | None = None,
    worth_another: Callable[[Int[Array, ""], Float[Array, "batch drafts"]], Bool[Array, " batch"]] | None = None,
) -> Draft:
    """Drafts 1 to `max_draft_len` tokens per sequence (paper, section 3.2), greedily or sampled.

    A token whose top-1 draft probability is below `threshold` is kept, and is the sequence's last. Sampling does not
    change what is compared with `threshold`: the top-1 probability before temperature, top-k and top-p, so that a
    threshold means what it means in greedy decoding, and it depends on the tokens before the drafted one alone, as
    exact sampling needs. A sequence that has stopped idles, its lengths unchanged, until the slowest of the batch
    stops. K drafted tokens cost K passes of adapter and LM head and K + 1 of the shallow layers.

    Args:
      target: the model.
      draft_model: trained for `exit_layer`.
      state: between rounds.
      threshold: eta; None with `worth_another`.
      sampling: the state's; None where every sequence is greedy.
      exit_layer: l, static.
      max_draft_len: gamma, static.
      drafting: sequences that draft here; another that goes on idles, and writes behind x_n and what it has drafted
        before. None: all that go on.
      drafted_before: how many tokens the draft of each sequence that does not draft here has already, which the caches
        hold; with `drafting`.
      worth_another: in place of `threshold`: from k and the confidences of the first k + 1 tokens, whether a sequence
        drafts another one.

    Returns:
      The draft, with caches that include every drafted position. Of a sequence that had a draft before, only its length
      has a meaning.
    """
    batch = len(state.token)
    start = state.shallow.length  # n, the position of x_n

    def shallow_step(tokens: Int[Array, " batch"], cache: KVCache, active: Bool[Array, " batch"]):
        hidden, new = shallow_apply(target, tokens[:, None], cache.length[:, None], cache, exit_layer=exit_layer)
        return hidden, new.replace(length=jnp.where(active, new.length, cache.length))

    def spread(probs: Float[Array, "batch drafted"]) -> Float[Array, "batch 1 vocab"]:
        """Over the full vocabulary: 0 for tokens that cannot be drafted."""
        if probs.shape[1] == target.config.vocab_size:
            return probs[:, None]
        tokens = draft_model.token_ids(jnp.arange(probs.shape[1]))
        return jnp.zeros((batch, target.config.vocab_size)).at[:, tokens].set(probs)[:, None]

    def add_token(
        k: Int[Array, ""], active: Bool[Array, " batch"], drafted: Draft, carry: PyTree, logits: Float[Array, "batch v"]
    ):
        """Takes the next token from the draft model's logits, and runs the shallow layers on it."""
        top = jnp.max(logits, axis=-1)
        # The top-1 probability: softmax at the maximum.
        confidence = 1.0 / jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        index, probs = pick_token(logits, sampling, start + 1 + k, DRAFT)
        tokens = draft_model.token_ids(index)
        hidden, shallow = shallow_step(tokens, drafted.shallow, active)
        confidences = jax.lax.dynamic_update_slice(drafted.confidence, confidence[:, None], (0, k))
        goes_on = confidence >= threshold if worth_another is None else worth_another(k, confidences)
        drafted = Draft(
            tokens=jax.lax.dynamic_update_slice(drafted.tokens, tokens[:, None], (0, k)),
            confidence=confidences,
            probs=None if probs is None else jax.lax.dynamic_update_slice(drafted.probs, spread(probs), (0, k, 0)),
            length=drafted.length + active,
            hidden=jax.lax.dynamic_update_slice(drafted.hidden, hidden, (0, k + 1, 0)),
            shallow=shallow,
            carry=carry,
        )
        return k + 1, active & goes_on, drafted

    def one_more(loop):
        k, active, drafted = loop
        hidden = jax.lax.dynamic_slice_in_dim(drafted.hidden, k, 1, axis=1)
        # A sequence that has stopped writes where the next round writes again.
        place = start + drafted.length
        tokens = jax.lax.dynamic_slice_in_dim(drafted.tokens, k - 1, 1, axis=1)
        carry, logits = draft_model.step(target, drafted.carry, tokens, hidden, place)
        return add_token(k, active, drafted, carry, logits[:, 0])

    with jax.named_scope("draft"):
        active, length = ~state.finished, jnp.zeros((batch,), jnp.int32)
        if drafting is not None:
            active, length = active & drafting, drafted_before
        hidden, shallow = shallow_step(state.token, state.shallow, active)
        if drafting is not None:
            idles = ~state.finished & ~drafting
            shallow = shallow.replace(length=jnp.where(idles, start + 1 + drafted_before, shallow.length))
        carry, logits = draft_model.begin(target, state.draft, state.token, hidden, start)
        vocabulary = None if sampling is None else target.config.vocab_size
        drafted = Draft.empty(max_draft_len, length, hidden, shallow, carry, vocabulary)
        loop = add_token(jnp.int32(0), active, drafted, carry, logits)
        _, _, drafted = jax.lax.while_loop(lambda loop: (loop[0] < max_draft_len) & jnp.any(loop[1]), one_more, loop)
    return drafted


def draft_nothing(target: TargetModel, state: DecodeState, sampling: Sampling | None, *, exit_layer: int) -> Draft:
    """Plain decoding's draft: x_n through the shallow layers. Arguments as for `draft_sequence`."""
    start, batch = state.shallow.length, len(state.token)
    hidden, shallow = shallow_apply(target, state.token[:, None], start[:, None], state.shallow, exit_layer=exit_layer)
    return Draft(
        tokens=jnp.zeros((batch, 0), jnp.int32),
        confidence=jnp.zeros((batch, 0)),
        length=jnp.zeros((batch,), jnp.int32),
        hidden=hidden,
        shallow=shallow,
        carry=None,
        probs=None if sampling is None else jnp.zeros((batch, 0, target.config.vocab_size)),
    )
