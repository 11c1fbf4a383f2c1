"""The draft phase of a round for which each sequence decides what it drafts: nothing, what it looked up, or with the
draft model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from kangaroo_jax.config import LookupConfig
from kangaroo_jax.decode.decide import Costs, Pace, decide, worth_another
from kangaroo_jax.decode.draft import draft_nothing, draft_sequence
from kangaroo_jax.decode.draft_lookup import take_in, with_found
from kangaroo_jax.decode.lookup import look_up
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel


def draft_decided(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    costs: Costs,
    sampling: Sampling | None,
    *,
    exit_layer: int,
    max_draft_len: int,
    lookup: LookupConfig | None,
    kept: int,
    max_commit: int,
) -> Draft:
    """Drafts what each sequence decides. A round in which none drafts is one pass of the shallow layers over x_n, and
    runs nothing of the draft model.

    The draft model does not see what it does not draft. It catches up when a sequence drafts again, or when more would
    be missing than it keeps: rarely, one pass over a few positions without its head.

    Args:
      target: the model.
      draft_model: trained for `exit_layer`; None: nothing is drafted but what is looked up.
      state: between rounds, with its pace, and its history where anything is looked up.
      costs: of rounds.
      sampling: the state's; None where every sequence is greedy.
      exit_layer: l, static.
      max_draft_len: gamma, static; 0 without a draft model.
      lookup: static; None: nothing is looked up.
      kept: how many positions the draft model may not have seen, static.
      max_commit: the most tokens that a round commits, static.

    Returns:
      The draft, with caches that include every drafted position.
    """
    batch, vocabulary, going_on = len(state.token), target.config.vocab_size, ~state.finished
    hidden, shallow = jnp.zeros((batch, 1, target.config.hidden_size), target.compute_dtype), state.shallow
    count, pace = jnp.zeros((batch,), jnp.int32), state.pace
    with jax.named_scope("decide"):
        if lookup is not None:
            found, count = look_up(state.history, state.token, shallow.length, lookup)
            pace = pace.looked(count > 0, going_on)
        choice = decide(pace, costs, count > 0, going_on, may_draft=draft_model is not None)
        count = jnp.where(choice.looks_up, count, 0)
    if lookup is not None:
        hidden, shallow, _ = take_in(target, None, state, found, choice.looks_up, exit_layer)
    carry = state.draft
    if draft_model is not None:
        needed = choice.drafts & (pace.behind > 1) | going_on & (pace.behind + max_commit > kept)
        carry, pace = _catch_up(draft_model, state.replace(pace=pace), jnp.any(needed))
    before = state.replace(shallow=shallow, draft=carry, pace=pace)
    drawn = None if sampling is None else vocabulary
    drafted = Draft.empty(max_draft_len, count, jnp.zeros_like(hidden[:, :1]), shallow, carry, drawn)

    def alone(loop: tuple[Bool[Array, ""], Draft]) -> tuple[Bool[Array, ""], Draft]:
        nothing = draft_nothing(target, before.replace(shallow=loop[1].shallow), None, exit_layer=exit_layer)
        return jnp.bool_(False), loop[1].replace(
            hidden=loop[1].hidden.at[:, :1].set(nothing.hidden), shallow=nothing.shallow
        )

    def draft(loop: tuple[Bool[Array, ""], Draft]) -> tuple[Bool[Array, ""], Draft]:
        return jnp.bool_(False), draft_sequence(
            target,
            draft_model,
            before.replace(shallow=loop[1].shallow.replace(length=state.shallow.length), draft=loop[1].carry),
            None,
            None if sampling is None else sampling.of_round(state.shallow.length),
            exit_layer=exit_layer,
            max_draft_len=max_draft_len,
            drafting=choice.drafts,
            drafted_before=count,
            worth_another=worth_another(pace, costs, choice.rate),
        )

    # Loops of one turn at most, in place of conditionals, through whose branches XLA for CPU copies the caches.
    drafts = jnp.any(choice.drafts)
    others = jnp.any(going_on & ~choice.looks_up) & ~drafts
    _, drafted = jax.lax.while_loop(lambda loop: loop[0], alone, (others, drafted))
    if draft_model is not None:
        _, drafted = jax.lax.while_loop(lambda loop: loop[0], draft, (drafts, drafted))
    if lookup is not None:
        drafted = with_found(drafted, choice.looks_up, found, hidden, vocabulary)
    return drafted.replace(pace=pace)


def _catch_up(draft_model: DraftModel, state: DecodeState, needed: Bool[Array, ""]) -> tuple[PyTree, Pace]:
    def run(loop: tuple[Bool[Array, ""], PyTree, Array]) -> tuple[Bool[Array, ""], PyTree, Array]:
        _, carry, behind = loop
        return jnp.bool_(False), draft_model.catch_up(carry, state.shallow.length, behind), jnp.zeros_like(behind)

    with jax.named_scope("catch_up"):
        _, carry, behind = jax.lax.while_loop(lambda loop: loop[0], run, (needed, state.draft, state.pace.behind))
        return carry, state.pace.replace(behind=behind)
