"""The draft phase of a round that looks up first, and drafts with the draft model where nothing was found."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from kangaroo_jax.config import LookupConfig
from kangaroo_jax.decode.draft import draft_nothing, draft_sequence
from kangaroo_jax.decode.lookup import drafts_what_was_found, look_up
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel, shallow_apply


def draft_with_lookup(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    threshold: Float[Array, ""],
    sampling: Sampling | None,
    *,
    exit_layer: int,
    max_draft_len: int,
    lookup: LookupConfig,
) -> Draft:
    """Drafts what each sequence's own text says, and with the draft model for those whose text says nothing.

    What was looked up takes one pass of the shallow layers over all of it, and the draft model takes it in without its
    head. Where every sequence that goes on has found something, no draft step is taken; where none has, no such pass.

    Args:
      target: the model.
      draft_model: trained for `exit_layer`; None: nothing is drafted where nothing was found.
      state: between rounds, with its history.
      threshold: eta.
      sampling: the state's; None where every sequence is greedy.
      exit_layer: l, static.
      max_draft_len: gamma, static; 0 without a draft model.
      lookup: static.

    Returns:
      The draft, with caches that include every drafted position.
    """
    with jax.named_scope("look_up"):
        found, count = look_up(state.history, state.token, state.shallow.length, lookup)
        looked_up = ~state.finished & drafts_what_was_found(count)
        count = jnp.where(looked_up, count, 0)
        hidden, shallow, carry = take_in(target, draft_model, state, found, looked_up, exit_layer)

    def draft_others(loop: tuple[Bool[Array, ""], Draft]) -> tuple[Bool[Array, ""], Draft]:
        before = state.replace(shallow=loop[1].shallow, draft=loop[1].carry)
        if draft_model is None:
            drafted = draft_nothing(target, before, sampling, exit_layer=exit_layer).replace(length=count)
        else:
            static = {"exit_layer": exit_layer, "max_draft_len": max_draft_len}
            others = {"drafting": ~looked_up, "drafted_before": count}
            drafted = draft_sequence(target, draft_model, before, threshold, sampling, **static, **others)
        return jnp.bool_(False), drafted

    vocabulary = target.config.vocab_size
    drawn = None if sampling is None else vocabulary
    nothing = Draft.empty(max_draft_len, count, jnp.zeros_like(hidden[:, :1]), shallow, carry, drawn)
    others = jnp.any(~state.finished & ~looked_up)
    _, drafted = jax.lax.while_loop(lambda loop: loop[0], draft_others, (others, nothing))
    return with_found(drafted, looked_up, found, hidden, vocabulary)


def with_found(
    drafted: Draft,
    looked_up: Bool[Array, " batch"],
    found: Int[Array, "batch drafts"],
    hidden: Float[Array, "batch drafts+1 hidden"],
    vocabulary: int,
) -> Draft:
    """A draft with what was found, and the shallow layers' hidden states of it, for the sequences that looked it up."""
    return drafted.replace(
        tokens=_choose(looked_up, found, drafted.tokens),
        confidence=_choose(looked_up, jnp.ones(found.shape), drafted.confidence),
        hidden=_choose(looked_up, hidden, drafted.hidden),
        probs=None if drafted.probs is None else _choose(looked_up, certain(found, vocabulary), drafted.probs),
        looked_up=looked_up,
    )


def take_in(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    found: Int[Array, "batch drafts"],
    looked_up: Bool[Array, " batch"],
    exit_layer: int,
) -> tuple[Float[Array, "batch drafts+1 hidden"], KVCache, PyTree | None]:
    """x_n and what was found through the shallow layers, and into the state of the draft model, if any; nothing where
    no sequence drafts it. Of the other sequences, what is written is overwritten later. Lengths are as before."""
    nodes = jnp.concatenate([state.token[:, None], found], axis=1)
    start = state.shallow.length

    def run(loop: tuple[Bool[Array, ""], Array, KVCache, PyTree]) -> tuple[Bool[Array, ""], Array, KVCache, PyTree]:
        _, _, shallow, carry = loop
        positions = start[:, None] + jnp.arange(nodes.shape[1])
        hidden, shallow = shallow_apply(target, nodes, positions, shallow, exit_layer=exit_layer)
        if draft_model is not None:
            carry = draft_model.observe(carry, nodes, hidden, start)
        return jnp.bool_(False), hidden, shallow.replace(length=start), carry

    # A loop of one turn at most, in place of a conditional, through whose branches XLA for CPU copies the caches.
    hidden = jnp.zeros((*nodes.shape, target.config.hidden_size), target.compute_dtype)
    loop = (jnp.any(looked_up), hidden, state.shallow, state.draft)
    return jax.lax.while_loop(lambda loop: loop[0], run, loop)[1:]


def certain(tokens: Int[Array, "batch drafts"], vocabulary: int) -> Float[Array, "batch drafts vocab"]:
    """The distributions that looked-up tokens are drawn from: each is certain."""
    return jax.nn.one_hot(tokens, vocabulary)


def _choose(rows: Bool[Array, " batch"], one: Array, other: Array) -> Array:
    """Row by row one or the other; both are padded to the longer's second axis."""
    length = max(one.shape[1], other.shape[1])
    one, other = (jnp.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2))) for x in (one, other))
    return jnp.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)
