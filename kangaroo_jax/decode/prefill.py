"""Prompts into the caches, and each one's first token."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kangaroo_jax.decode.decide import Pace
from kangaroo_jax.decode.lookup import History
from kangaroo_jax.decode.pick import NO_TOKEN, pick_token
from kangaroo_jax.decode.sampling import TARGET, Sampling
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

Rows = TypeVar("Rows", Array, KVCache, History)  # what a state has of each sequence


@flax.struct.dataclass
class Prompts:
    """The caches of prompts on their way into a running batch."""

    shallow: KVCache
    deep: KVCache
    draft: PyTree | None  # the draft model's state
    history: History | None = None  # their tokens; None where nothing is looked up


@flax.struct.dataclass
class Admission:
    """What requests ask for, a row each."""

    max_output: Int[Array, " rows"]  # at least 1
    eos_token_ids: Int[Array, "rows eos"]  # padded with -1
    sampling: Sampling


def empty_prompts(
    target: TargetModel,
    draft_model: DraftModel | None,
    rows: int,
    *,
    exit_layer: int,
    capacity: int,
    backend: AttentionBackend,
    looks_up: bool = False,
    kept: int = 0,
    rings: tuple[int | None, ...] = (),
) -> Prompts:
    """Caches of `rows` prompts with room for `capacity` positions each; also of their tokens, where rounds look up.
    `kept`: positions that the draft model may not have seen (`RoundShape.kept`). `rings`: of the target's layers, as
    for `KVCache.empty`; the draft model's are as the first."""
    config, dtype = target.config, target.compute_dtype
    rings = rings or (None,) * config.num_hidden_layers
    shallow, deep = (
        KVCache.empty(config, len(part), rows, capacity, dtype, backend, part)
        for part in (rings[:exit_layer], rings[exit_layer:])
    )
    draft = None
    if draft_model is not None:
        draft = draft_model.init(rows, capacity, dtype, backend, max(1, kept), rings[0])
    return Prompts(shallow, deep, draft, History.empty(rows, capacity) if looks_up else None)


def empty_slots(
    target: TargetModel,
    draft_model: DraftModel | None,
    batch: int,
    max_eos: int,
    *,
    exit_layer: int,
    capacity: int,
    backend: AttentionBackend,
    looks_up: bool = False,
    kept: int = 0,
    rings: tuple[int | None, ...] = (),
) -> DecodeState:
    """A state whose sequences all idle. `max_eos` is room for each one's EOS ids; the rest as for `empty_prompts`."""
    static = {"exit_layer": exit_layer, "capacity": capacity, "backend": backend, "looks_up": looks_up, "kept": kept}
    static["rings"] = rings
    caches = empty_prompts(target, draft_model, batch, **static)

    def zeros() -> Int[Array, " batch"]:
        return jnp.zeros((batch,), jnp.int32)

    # Length 1: idle sequences run too, and a draft model may look at the position before.
    return DecodeState(
        token=zeros(),
        shallow=caches.shallow.replace(length=zeros() + 1),
        deep=caches.deep.replace(length=zeros() + 1),
        draft=caches.draft,
        num_output=zeros(),
        max_output=zeros(),
        eos_token_ids=jnp.full((batch, max_eos), -1, jnp.int32),
        finished=jnp.ones((batch,), bool),
        sampling=Sampling.greedy(batch),
        history=caches.history,
        pace=Pace.fresh(batch) if kept else None,
    )


def prefill_piece(
    target: TargetModel,
    draft_model: DraftModel | None,
    prompts: Prompts,
    tokens: Int[Array, "rows time"],
    start: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    *,
    exit_layer: int,
) -> tuple[Prompts, Float[Array, "rows hidden"]]:
    """A piece of each prompt through the complete model. Attention's scores exist for one piece at a time, so memory
    grows with a prompt's length and not with its square.

    Args:
      target: the model.
      draft_model: None for plain decoding.
      prompts: what came before `start` is in them.
      tokens: the pieces, padded on the right; start + time is within the capacity.
      start: position of each piece's first token.
      lengths: of the pieces, at least 1.
      exit_layer: l, static.

    Returns:
      The caches with the pieces in them, and the normed hidden state of each piece's last token.
    """
    with jax.named_scope("prefill"):
        positions = start[:, None] + jnp.arange(tokens.shape[1])
        end = start + lengths
        shallow, deep = (cache.replace(length=start, prompt_end=end) for cache in (prompts.shallow, prompts.deep))
        hidden, shallow = shallow_apply(target, tokens, positions, shallow, exit_layer=exit_layer)
        normed, deep = deep_apply(target, hidden, positions, deep, exit_layer=exit_layer)
        draft = prompts.draft
        if draft_model is not None:
            draft = draft_model.after_prefill(draft, tokens, hidden, normed, start, lengths)
        history = None if prompts.history is None else prompts.history.written(tokens, start)
        last = jnp.take_along_axis(normed, (lengths - 1)[:, None, None], axis=1)[:, 0]
        shallow, deep = (cache.replace(length=end, prompt_end=None) for cache in (shallow, deep))
        return Prompts(shallow, deep, draft, history), last


def first_tokens(
    target: TargetModel,
    prompts: Prompts,
    last: Float[Array, "rows hidden"],
    admission: Admission,
    *,
    sampled: bool,
    decides: bool = False,
) -> DecodeState:
    """Complete prompts as sequences, each with its first token committed; one that has none, `NO_TOKEN`, is finished.

    Args:
      target: the model.
      prompts: complete.
      last: from the last `prefill_piece`.
      admission: of each prompt.
      sampled: whether any of them samples, static.
      decides: whether sequences decide how far to draft, static.
    """
    logits = lm_head(target, last)
    tokens, _ = pick_token(logits, admission.sampling if sampled else None, prompts.deep.length, TARGET)
    ended = (tokens == NO_TOKEN) | jnp.any(tokens[:, None] == admission.eos_token_ids, axis=-1)
    return DecodeState(
        token=tokens,
        shallow=prompts.shallow.with_numbers_only(),
        deep=prompts.deep.with_numbers_only(),
        draft=prompts.draft,
        num_output=jnp.ones_like(tokens),
        max_output=jnp.asarray(admission.max_output),
        eos_token_ids=jnp.asarray(admission.eos_token_ids),
        finished=ended | (admission.max_output <= 1),
        sampling=jax.tree.map(jnp.asarray, admission.sampling),
        history=prompts.history,
        pace=Pace.fresh(len(tokens)) if decides else None,
    )


def prefill(
    target: TargetModel,
    draft_model: DraftModel | None,
    tokens: Int[Array, "rows time"],
    lengths: Int[Array, " rows"],
    admission: Admission,
    *,
    exit_layer: int,
    capacity: int,
    backend: AttentionBackend,
    sampled: bool,
    looks_up: bool = False,
    kept: int = 0,
    rings: tuple[int | None, ...] = (),
) -> DecodeState:
    """A batch of its own: prompts, each one piece (arguments as for `prefill_piece` and `first_tokens`), in caches with
    room for `capacity` positions."""
    rows, time = tokens.shape
    static = {"exit_layer": exit_layer, "backend": backend, "looks_up": looks_up, "kept": kept, "rings": rings}
    # First as large as the prompts, so that nothing is done to the room behind them.
    prompts = empty_prompts(target, draft_model, rows, capacity=time, **static)
    start = jnp.zeros((rows,), jnp.int32)
    prompts, last = prefill_piece(target, draft_model, prompts, tokens, start, lengths, exit_layer=exit_layer)
    state = first_tokens(target, prompts, last, admission, sampled=sampled, decides=kept > 0)
    return resize(state, capacity)


def begin_batch(
    target: TargetModel,
    draft_model: DraftModel | None,
    tokens: Int[Array, "rows time"],
    lengths: Int[Array, " rows"],
    admission: Admission,
    **static: Any,
) -> tuple[DecodeState, Int[Array, " rows"]]:
    """`prefill`, and each prompt's first token as a result of its own: the next program may overwrite the state before
    the host reads them. `static`: the keyword arguments of `prefill`."""
    state = prefill(target, draft_model, tokens, lengths, admission, **static)
    return state, state.token


def prefill_and_admit(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState | None,
    prompts: Prompts | None,
    tokens: Int[Array, "rows time"],
    start: Int[Array, " rows"],
    lengths: Int[Array, " rows"],
    slots: Int[Array, " rows"],
    admission: Admission,
    *,
    exit_layer: int,
    backend: AttentionBackend,
    sampled: bool,
    kept: int = 0,
    rings: tuple[int | None, ...] = (),
) -> tuple[DecodeState, Int[Array, " rows"]]:
    """The last piece of each prompt, and its row of a running batch. With `state` donated, in place; without one, the
    batch is the prompts, in their caches where those are donated.

    Args:
      target: the model.
      draft_model: None for plain decoding.
      state: whose caches hold as many positions as those of the prompts, or more; None for a batch of its own.
      prompts: what came before the piece; None where it is all of each prompt.
      tokens: the pieces, padded on the right.
      start: position of each piece's first token.
      lengths: of the pieces, at least 1.
      slots: rows of `state` that the prompts get; beyond them for rows of padding (`DenseBackend` alone).
      admission: of each prompt.
      exit_layer: l, static.
      backend: of the caches, static.
      sampled: whether any of the prompts samples, static.
      kept: as for `empty_prompts`, static; of `state`, as are the next.
      rings: likewise.

    Returns:
      The state, and each prompt's first token; `NO_TOKEN` where the logits are not numbers.
    """
    rows, time = tokens.shape
    if prompts is None:
        static = {"exit_layer": exit_layer, "capacity": time, "backend": backend, "kept": kept, "rings": rings}
        prompts = empty_prompts(target, draft_model, rows, **static, looks_up=state.history is not None)
    prompts, last = prefill_piece(target, draft_model, prompts, tokens, start, lengths, exit_layer=exit_layer)
    with jax.named_scope("admit"):
        new = first_tokens(target, prompts, last, admission, sampled=sampled, decides=kept > 0)
        if state is None:
            return new, new.token
        state = jax.tree.map(lambda old, new: _put(old, new, slots), state, new, is_leaf=_has_positions)
        return state, new.token


def take_prompt(state: DecodeState, slot: Int[Array, ""]) -> Prompts:
    """What a slot of a running batch holds, as the beginning of a prompt."""

    def take(x: Rows) -> Rows:
        return x.row(slot) if _has_positions(x) else jax.lax.dynamic_slice_in_dim(x, slot, 1)

    held = Prompts(state.shallow, state.deep, state.draft, state.history)
    return jax.tree.map(take, held, is_leaf=_has_positions)


def resize(state: DecodeState, capacity: int) -> DecodeState:
    """The same sequences in caches with room for `capacity` positions; the draft model's stay as much larger as they
    are."""
    more = capacity - state.shallow.capacity

    def resized(x: Array | KVCache | History) -> Array | KVCache | History:
        return x.resized(x.capacity + more) if _has_positions(x) else x

    return jax.tree.map(resized, state, is_leaf=_has_positions)


def in_layers(
    state: DecodeState,
) -> tuple[list[Array | KVCache | History], Callable[[list[Array | KVCache | History]], DecodeState]]:
    """The parts of a state, of caches each layer as one; and what makes a state of them again."""
    leaves, structure = jax.tree.flatten(state, is_leaf=_has_positions)
    counts = [len(x.keys) if isinstance(x, KVCache) else 1 for x in leaves]
    parts = [part for x in leaves for part in (x.layers() if isinstance(x, KVCache) else [x])]

    def joined(parts: list[Array | KVCache | History]) -> DecodeState:
        rest = iter(parts)
        groups = [list(itertools.islice(rest, count)) for count in counts]
        return jax.tree.unflatten(
            structure, [KVCache.of_layers(x) if isinstance(x[0], KVCache) else x[0] for x in groups]
        )

    return parts, joined


def _has_positions(x: object) -> bool:
    return isinstance(x, KVCache | History)


def _put(old: Rows, new: Rows, slots: Int[Array, " rows"]) -> Rows:
    if _has_positions(old):
        return old.with_rows(slots, new)
    return old.at[slots].set(new.astype(old.dtype), mode="drop")
