"""The verification phase of a round: one forward pass of the deep layers, and what it commits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.decode.decide import Costs, learn
from kangaroo_jax.decode.pick import NO_TOKEN, Verdict, pick_verified
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import Chunk, DecodeState, Draft, DraftRecord
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.drafts.draft_model import Committed, DraftModel
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head

Deep = Float[Array, "batch drafts+1 hidden"]


def verify(
    target: TargetModel,
    deep: KVCache,
    draft: Draft,
    sampling: Sampling | None,
    *,
    exit_layer: int,
    widths: tuple[int, ...],
) -> tuple[Verdict, Deep, KVCache]:
    """The target's judgement of the draft, from one pass over all its tokens (paper, section 3.2).

    Args:
      target: the model.
      deep: the deep layers' cache, holding positions before the draft's first.
      draft: the draft; `draft.hidden` is where the pass starts.
      sampling: of each sequence; None where every sequence is greedy.
      exit_layer: l, static.
      widths: how many tokens a pass may hold, ascending, ending with x_n and the most drafted tokens; the smallest
        that holds the longest draft of the batch is run. One width where compute is free beside reading the weights,
        several where it is not.

    Returns:
      The verdict, the normed deep hidden states of x_n and the drafted tokens, and the cache with its length as before.
    """

    def run(width: int, done: Bool[Array, ""], cache: KVCache) -> tuple[Verdict, Deep, KVCache]:
        # `done` is False here, but XLA does not know that of what the loops below change. Without it, XLA computes what
        # follows from these alone (rotary angles, masks, the first norm) before the loops, for all widths.
        hidden, length = jnp.where(done, 0, draft.hidden[:, :width]), cache.length + done
        if draft.tree is None:
            depths, mask = jnp.arange(width), None
        else:
            depths = jnp.pad(draft.tree.depths, ((0, 0), (1, 0)))[:, :width]
            mask = DraftMask.create(length, draft.tree.ancestors()[:, :width, :width], cache.capacity)
        positions, cache = length[:, None] + depths, cache.replace(length=length)
        normed, cache = deep_apply(target, hidden, positions, cache, exit_layer=exit_layer, mask=mask)
        verdict = pick_verified(lm_head(target, normed), draft, sampling, positions + 1)
        normed = jnp.pad(normed, ((0, 0), (0, draft.hidden.shape[1] - width), (0, 0)))
        return verdict, normed, cache.replace(length=deep.length)

    with jax.named_scope("verify"):
        if len(widths) == 1:
            return run(widths[0], jnp.bool_(False), deep)
        choice = jnp.searchsorted(jnp.asarray(widths), jnp.max(draft.length) + 1)
        loop = (jnp.bool_(False), Verdict.empty(draft), jnp.zeros_like(draft.hidden), deep)
        # Loops of one turn at most, in place of a lax.switch: XLA for CPU copies the complete cache through a
        # conditional's branches, and updates it in place in a loop.
        for i, width in enumerate(widths):
            loop = jax.lax.while_loop(
                lambda loop, i=i: (choice == i) & ~loop[0],
                lambda loop, width=width: (jnp.bool_(True), *run(width, loop[0], loop[3])),
                loop,
            )
        return loop[1:]


def commit(
    state: DecodeState,
    chunk: Chunk,
    draft_model: DraftModel | None,
    draft: Draft,
    verdict: Verdict,
    deep_hidden: Deep,
    deep: KVCache,
    costs: Costs | None = None,
) -> tuple[DecodeState, Chunk]:
    """Commits the accepted drafts and the target's next token, cut after the first EOS, at the sequence's last allowed
    token, and before a place where the target has none (`NO_TOKEN`), which ends the sequence.

    Rejected positions are rolled back by setting the caches' lengths; of a tree, the accepted path is moved to where a
    sequence would lie.

    Args:
      state: before the round.
      chunk: what earlier rounds of the run committed.
      draft_model: None in plain decoding.
      draft: the round's draft.
      verdict: from `verify`, as are the next two.
      deep_hidden: deep hidden states of x_n and the drafted tokens.
      deep: the deep layers' cache.
      costs: of rounds, where sequences decide how far to draft, and learn from this one.
    """
    with jax.named_scope("commit"):
        target_tokens = verdict.tokens
        index = jnp.arange(target_tokens.shape[1])
        count = jnp.minimum(verdict.accepted + 1, state.max_output - state.num_output)
        is_eos = jnp.any(target_tokens[:, :, None] == state.eos_token_ids[:, None], axis=-1)
        ends = is_eos & (index < count[:, None])
        count = jnp.where(jnp.any(ends, axis=1), 1 + jnp.argmax(ends, axis=1).astype(jnp.int32), count)
        count = jnp.where(state.finished, 0, count)
        # Nothing is accepted beyond a place without a token, so it can only be the last one.
        failed = jnp.any((target_tokens == NO_TOKEN) & (index < count[:, None]), axis=1)
        count -= failed

        num_output = state.num_output + count
        finished = state.finished | failed | jnp.any(ends, axis=1) | (num_output >= state.max_output)
        last = jnp.maximum(count - 1, 0)[:, None]
        token = jnp.where(state.finished, state.token, jnp.take_along_axis(target_tokens, last, axis=1)[:, 0])

        start, shallow, tree = state.deep.length, draft.shallow, draft.tree
        path, step_positions, num_step_positions = jnp.broadcast_to(index, target_tokens.shape), None, 0
        if tree is not None:
            path = verdict.path
            drafted = jnp.maximum(path[:, 1:] - 1, 0)
            # What is moved beyond the path's end is masked and overwritten like any rejected draft.
            shallow = shallow.moved(start + 1, drafted, draft.tokens.shape[1])
            deep = deep.moved(start + 1, drafted, draft.tokens.shape[1])
            step_positions = jnp.take_along_axis(tree.step_positions, drafted, axis=1)
            num_step_positions = tree.num_step_positions
        after = None
        if draft_model is not None:
            committed = Committed(start, count, path, draft.hidden, deep_hidden, step_positions, num_step_positions)
            after = draft_model.after_verify(state.draft, draft.carry, committed)
        history = state.history
        if history is not None:
            # x_n and what follows it, but for the last token committed. What lies beyond is overwritten later.
            history = history.written(jnp.concatenate([state.token[:, None], target_tokens[:, :-1]], axis=1), start)
        lookup_lengths = chunk.lookup_lengths
        if lookup_lengths is not None:
            found = jnp.where(draft.looked_up, draft.length, 0)
            lookup_lengths = _write_rows(lookup_lengths, found[:, None], chunk.num_rounds)
        pace = state.pace
        if pace is not None:
            judged = {"length": draft.length, "looked_up": draft.looked_up, "confidence": draft.confidence}
            pace = learn(draft.pace, costs, **judged, accepted=verdict.accepted, count=count)
        state = state.replace(
            token=token,
            shallow=shallow.replace(length=start + count),
            deep=deep.replace(length=start + count),
            draft=after,
            num_output=num_output,
            finished=finished,
            history=history,
            pace=pace,
        )
        ran = count > 0
        chunk = Chunk(
            tokens=_write_rows(chunk.tokens, target_tokens, chunk.num_tokens),
            num_tokens=chunk.num_tokens + count,
            accept_lengths=_write_rows(chunk.accept_lengths, count[:, None], chunk.num_rounds),
            draft_lengths=_write_rows(chunk.draft_lengths, draft.steps[:, None], chunk.num_rounds),
            num_rounds=chunk.num_rounds + ran,
            finished=finished,
            failed=chunk.failed | failed,
            drafts=None if chunk.drafts is None else _record(chunk.drafts, chunk.num_rounds, draft, verdict),
            lookup_lengths=lookup_lengths,
        )
        return state, chunk


def _record(record: DraftRecord, place: Int[Array, " batch"], draft: Draft, verdict: Verdict) -> DraftRecord:
    """Adds a round's draft to a record. Where a sequence had finished, it lies beyond its rounds."""
    drafts = jnp.arange(draft.tokens.shape[1])
    if draft.tree is None:
        parents = jnp.broadcast_to(drafts - 1, draft.tokens.shape)
        accepted = drafts < verdict.accepted[:, None]
    else:
        parents = draft.tree.parents - 1
        accepted = jnp.any(verdict.path[:, :, None] == drafts + 1, axis=1)
    rows = jnp.arange(len(place))
    return DraftRecord(
        tokens=record.tokens.at[rows, place].set(draft.tokens, mode="drop"),
        parents=record.parents.at[rows, place].set(parents, mode="drop"),
        confidence=record.confidence.at[rows, place].set(draft.confidence, mode="drop"),
        accepted=record.accepted.at[rows, place].set(accepted, mode="drop"),
        counts=record.counts.at[rows, place].set(draft.length, mode="drop"),
    )


def _write_rows(
    buffer: Int[Array, "batch room"], rows: Int[Array, "batch width"], start: Int[Array, " batch"]
) -> Int[Array, "batch room"]:
    """Writes each row at its own start."""
    offset = jnp.arange(buffer.shape[1]) - start[:, None]
    new = jnp.take_along_axis(rows, jnp.clip(offset, 0, rows.shape[1] - 1), axis=1)
    return jnp.where((offset >= 0) & (offset < rows.shape[1]), new, buffer)
