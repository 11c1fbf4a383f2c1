"""The verification phase of a round: one forward pass of the deep layers, and what it commits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kangaroo_jax.decode.pick import Verdict, pick_verified
from kangaroo_jax.decode.sampling import Sampler
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.model.cache import KVCache, draft_mask
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head


def verify(
    target: TargetModel,
    deep: KVCache,
    draft: Draft,
    sampler: Sampler | None,
    *,
    exit_layer: int,
    widths: tuple[int, ...],
) -> tuple[Verdict, KVCache]:
    """The target's judgement of the draft, from one pass over all its tokens (paper, section 3.2).

    Args:
      target: the model.
      deep: the deep layers' cache, holding positions before the draft's first.
      draft: the draft; `draft.hidden` is where the pass starts.
      sampler: None for greedy decoding.
      exit_layer: l, static.
      widths: how many tokens a pass may hold, ascending, ending with x_n and the most drafted tokens; the smallest
        that holds the longest draft of the batch is run. One width where compute is free beside reading the weights,
        several where it is not.

    Returns:
      The verdict, and the cache with lengths not yet settled.
    """

    def run(width: int, cache: KVCache) -> tuple[Verdict, KVCache]:
        if draft.tree is None:
            depths, mask = jnp.arange(width), None
        else:
            depths = jnp.pad(draft.tree.depths, ((0, 0), (1, 0)))[:, :width]
            mask = draft_mask(cache.length, draft.tree.ancestors()[:, :width, :width], cache.capacity)
        positions = cache.length[:, None] + depths
        normed, cache = deep_apply(target, draft.hidden[:, :width], positions, cache, exit_layer=exit_layer, mask=mask)
        verdict = pick_verified(lm_head(target, normed), draft, sampler, positions + 1)
        return verdict, cache.replace(length=deep.length)

    with jax.named_scope("verify"):
        if len(widths) == 1:
            return run(widths[0], deep)
        choice = jnp.searchsorted(jnp.asarray(widths), jnp.max(draft.length) + 1)
        carry = (jnp.bool_(False), Verdict.empty(draft), deep)
        # Loops of one turn or none, in place of a lax.switch: XLA copies the whole cache through a conditional's
        # branches, and updates it in place in a loop.
        for i, width in enumerate(widths):
            carry = jax.lax.while_loop(
                lambda carry, i=i: (choice == i) & ~carry[0],
                lambda carry, width=width: (jnp.bool_(True), *run(width, carry[2])),
                carry,
            )
        return carry[1:]


def commit(
    state: DecodeState,
    draft: Draft,
    deep: KVCache,
    verdict: Verdict,
    eos_token_ids: Int[Array, " eos"],
) -> DecodeState:
    """Commits the accepted drafts and the target's next token, cut after the first EOS and at the sequence's last
    allowed token.

    Rejected positions are rolled back by setting the caches' lengths; of a tree, the accepted path is moved to where a
    sequence would lie.

    Args:
      state: before the round.
      draft: the round's draft.
      deep: the deep layers' cache from `verify`.
      verdict: from `verify`.
      eos_token_ids: tokens that end a sequence; may be empty.
    """
    with jax.named_scope("commit"):
        target_tokens = verdict.tokens
        index = jnp.arange(target_tokens.shape[1])
        count = jnp.minimum(verdict.accepted + 1, state.max_output - state.num_output)
        ends = jnp.any(target_tokens[:, :, None] == eos_token_ids, axis=-1) & (index < count[:, None])
        count = jnp.where(jnp.any(ends, axis=1), 1 + jnp.argmax(ends, axis=1).astype(jnp.int32), count)
        count = jnp.where(state.finished, 0, count)

        num_output = state.num_output + count
        finished = state.finished | jnp.any(ends, axis=1) | (num_output >= state.max_output)
        last = jnp.maximum(count - 1, 0)[:, None]
        idle = state.finished
        token = jnp.where(idle, state.token, jnp.take_along_axis(target_tokens, last, axis=1)[:, 0])
        node = last if verdict.path is None else jnp.take_along_axis(verdict.path, last, axis=1)
        hidden = jnp.take_along_axis(draft.hidden, node[:, :, None], axis=1)
        shallow, adapter = draft.shallow, draft.adapter
        if draft.tree is not None:
            shallow, deep, adapter = _compacted(state.deep.length + 1, draft, verdict.path[:, 1:] - 1, deep)
        length = state.deep.length + count
        return state.replace(
            token=token,
            shallow_hidden=jnp.where(idle[:, None, None], state.shallow_hidden, hidden),
            shallow=shallow.replace(length=length),
            deep=deep.replace(length=length),
            adapter=None if adapter is None else adapter.replace(length=length - 1),
            output=_write_rows(state.output, target_tokens, state.num_output),
            num_output=num_output,
            finished=finished,
            stats=state.stats.replace(
                accept_lengths=_write_rows(state.stats.accept_lengths, count[:, None], state.stats.rounds),
                draft_lengths=_write_rows(state.stats.draft_lengths, draft.steps[:, None], state.stats.rounds),
                rounds=state.stats.rounds + ~idle,
            ),
        )


def _compacted(
    start: Int[Array, " batch"], draft: Draft, path: Int[Array, "batch gamma"], deep: KVCache
) -> tuple[KVCache, KVCache, KVCache]:
    """The shallow, deep and adapter caches with the accepted path's entries one after another from `start` on.

    Only the slots of one round are read and written. What is moved beyond the path's end is masked and overwritten
    like any rejected draft.

    Args:
      start: slot of the first drafted token.
      draft: the round's draft.
      path: drafted tokens on the accepted path, padded.
      deep: the deep layers' cache.
    """
    path = jnp.maximum(path, 0)
    slots = jnp.take_along_axis(draft.tree.adapter_slots, path, axis=1)
    return (
        draft.shallow.moved(start, path, draft.tokens.shape[1]),
        deep.moved(start, path, draft.tokens.shape[1]),
        draft.adapter.moved(start, slots, draft.tree.num_adapter_slots),
    )


def _write_rows(
    buffer: Int[Array, "batch room"], rows: Int[Array, "batch width"], start: Int[Array, " batch"]
) -> Int[Array, "batch room"]:
    """Writes each row at its own start. Buffers have room for a whole round beyond the last token."""
    for i in range(buffer.shape[0]):
        buffer = jax.lax.dynamic_update_slice(buffer, rows[i : i + 1], (i, start[i]))
    return buffer
