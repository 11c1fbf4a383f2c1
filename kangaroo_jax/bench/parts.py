"""The parts that decoding is made of: what each reads, and how long each takes alone.

Every part is timed inside one jitted loop, on the code that decoding runs, from a state whose caches hold a context:
after each turn the lengths are set back, so that every turn does the same work.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from kangaroo_jax.bench.machine import seconds_per_call
from kangaroo_jax.config import TreeConfig
from kangaroo_jax.decode.autoregressive import PLAIN_EXIT_LAYER, plain_round
from kangaroo_jax.decode.draft import draft
from kangaroo_jax.decode.generate import kangaroo_round
from kangaroo_jax.decode.prefill import prefill
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.decode.tree import draft_tree, grow_tree
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel

State = TypeVar("State")  # of a timed loop: a DecodeState, with what else its turns start from
Step = Callable[[TargetModel, Adapter | None, State], State]

_TURNS = 32  # of a timed loop
_REPEATS = 7
NO_EOS = np.zeros((0,), np.int32)  # no token ends a sequence


@dataclasses.dataclass(frozen=True)
class Bytes:
    """Bytes that each part has to read: weights, and the whole cache buffers of the layers it runs (attention reads
    what is unused too)."""

    plain_step: int
    shallow: int
    draft_step: int  # adapter, LM head, and the shallow layers for the drafted token
    verification: int

    @classmethod
    def of(cls, model: TargetModel, adapter: Adapter, exit_layer: int, batch: int, capacity: int) -> Bytes:
        """Of a target and an adapter, with `batch` sequences in caches with room for `capacity` positions."""
        config = model.config
        cache = 2 * batch * config.num_key_value_heads * config.head_dim * capacity * model.dtype.itemsize
        layers = [_nbytes(layer) + cache for layer in model.layers]
        head = (model.embed_tokens if model.lm_head is None else model.lm_head)[...].nbytes
        shallow, deep = sum(layers[:exit_layer]), sum(layers[exit_layer:])
        # An adapter's draft vocabulary, with its rows of the head, takes the head's place.
        draft_head = 0 if adapter.draft_vocabulary is not None else head
        return cls(shallow + deep + head, shallow, shallow + _nbytes(adapter) + cache + draft_head, deep + head)


def _nbytes(tree: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Context:
    """A target, an adapter, and sequences that have been processed so far.

    Attributes:
      model: the target's weights.
      adapter: the adapter's.
      exit_layer: l.
      tokens: [batch, context], the sequences.
      capacity: of the caches.
      room: of the output buffers.
    """

    model: TargetModel
    adapter: Adapter
    exit_layer: int
    tokens: Int[np.ndarray, "batch context"]
    capacity: int
    room: int = 256

    def prefill(self, plain: bool = False) -> Callable[[], DecodeState]:
        """The call that makes the state in which decoding finds the sequences before its first round."""
        batch, length = self.tokens.shape
        exit_layer = PLAIN_EXIT_LAYER if plain else self.exit_layer
        first = jax.jit(functools.partial(prefill, exit_layer=exit_layer, capacity=self.capacity, room=self.room))
        lengths, most = (np.full((batch,), n, np.int32) for n in (length, self.room))
        adapter = None if plain else self.adapter
        return lambda: first(self.model, adapter, self.tokens, lengths, most, NO_EOS)

    @property
    def bytes(self) -> Bytes:
        return Bytes.of(self.model, self.adapter, self.exit_layer, len(self.tokens), self.capacity)


def plain_step_seconds(context: Context) -> float:
    """Seconds of one plain step."""

    def step(model: TargetModel, _: Adapter, state: DecodeState) -> DecodeState:
        return _set_back(plain_round(model, None, state, NO_EOS, jnp.float32(0)), state)

    return _seconds(context, context.prefill(plain=True)(), step)


def draft_seconds(context: Context, count: int) -> float:
    """Seconds of a draft phase of exactly `count` tokens: that many draft steps and one more shallow pass."""

    def step(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        drafted = draft(model, adapter, state, jnp.float32(0), exit_layer=context.exit_layer, max_draft_len=count)
        return state.replace(
            token=drafted.tokens[:, -1],
            shallow_hidden=drafted.hidden[:, -1:],
            shallow=drafted.shallow.replace(length=state.shallow.length),
            adapter=drafted.adapter.replace(length=state.adapter.length),
        )

    return _seconds(context, context.prefill()(), step)


def verification_seconds(context: Context, width: int) -> float:
    """Seconds of a verification pass over `width` positions, with its LM head."""
    batch = len(context.tokens)

    def step(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        hidden = jnp.broadcast_to(state.shallow_hidden, (batch, width, state.shallow_hidden.shape[-1]))
        drafted = Draft(
            tokens=jnp.zeros((batch, width - 1), jnp.int32),
            confidence=jnp.ones((batch, width - 1)),
            length=jnp.full((batch,), width - 1),
            hidden=hidden,
            shallow=state.shallow,
            adapter=state.adapter,
            probs=None,
        )
        verdict, deep = verify(model, state.deep, drafted, None, exit_layer=context.exit_layer, widths=(width,))
        # The next turn starts from what this one found, so that no turn can be left out or overlap.
        moved = state.shallow_hidden + 1e-9 * verdict.tokens[:, :1, None].astype(state.shallow_hidden.dtype)
        return state.replace(shallow_hidden=moved, deep=deep.replace(length=state.deep.length))

    return _seconds(context, context.prefill()(), step)


def round_seconds(context: Context, count: int, tree: TreeConfig | None = None) -> float:
    """Seconds of a whole round that drafts exactly `count` tokens, or a tree of exactly that many levels: draft,
    verification and commit."""
    width = 1 + (count if tree is None else tree.drafted(count))

    def step(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        done = kangaroo_round(
            model,
            adapter,
            state,
            NO_EOS,
            jnp.float32(0),
            exit_layer=context.exit_layer,
            max_draft_len=count,
            widths=(width,),
            tree=tree,
        )
        return _set_back(done, state)

    return _seconds(context, context.prefill()(), step)


def growth_seconds(context: Context, topk: int, levels: int) -> float:
    """Seconds of growing a tree to exactly `levels` levels, before a budget cuts it: one pass from x_n, and a draft
    step of `topk` tokens for each level after the first."""

    def step(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        root, grown = grow_tree(
            model, adapter, state, jnp.float32(0), exit_layer=context.exit_layer, max_draft_len=levels, topk=topk
        )
        return state.replace(
            token=grown.tokens[:, -1, 0],
            shallow_hidden=root,
            shallow=grown.shallow.replace(length=state.shallow.length),
            adapter=grown.adapter.replace(length=state.adapter.length),
        )

    return _seconds(context, context.prefill()(), step)


def tree_verification_seconds(context: Context, tree: TreeConfig, levels: int) -> float:
    """Seconds of verifying a tree of exactly `levels` levels, as drafted here, and of committing what stands: mask, the
    pass with its LM head, the walk along the target's choices, and the path's move in the caches."""
    start = context.prefill()()
    settings = {"exit_layer": context.exit_layer, "max_draft_len": levels, "tree": tree}
    drafted = jax.jit(functools.partial(draft_tree, **settings))(context.model, context.adapter, start, jnp.float32(0))
    drafted = drafted.replace(shallow=None, adapter=None)  # the state's own are used

    def step(model: TargetModel, _: Adapter, carry: tuple[DecodeState, Draft]) -> tuple[DecodeState, Draft]:
        state, drafted = carry
        # Each turn starts from what the last one found, so that nothing of it can be left out, or done once for all.
        nothing = jnp.minimum(state.token, 0)[:, None]
        draft_of_turn = drafted.replace(
            hidden=drafted.hidden + 1e-9 * state.shallow_hidden,
            tree=drafted.tree.replace(parents=drafted.tree.parents + nothing),
            shallow=state.shallow,
            adapter=state.adapter,
        )
        widths = (1 + tree.drafted(levels),)
        verdict, deep = verify(model, state.deep, draft_of_turn, None, exit_layer=context.exit_layer, widths=widths)
        done = commit(state, draft_of_turn, deep, verdict, NO_EOS)
        return _set_back(done, state), drafted

    return _seconds(context, (start, drafted), step)


def prefill_seconds(context: Context) -> float:
    """Seconds of prefill over the context."""
    return seconds_per_call(context.prefill())


def _set_back(new: DecodeState, old: DecodeState) -> DecodeState:
    """`new` with the lengths of `old`."""
    return new.replace(
        shallow=new.shallow.replace(length=old.shallow.length),
        deep=new.deep.replace(length=old.deep.length),
        adapter=None if new.adapter is None else new.adapter.replace(length=old.adapter.length),
        num_output=old.num_output,
        finished=old.finished,
        stats=new.stats.replace(rounds=old.stats.rounds),
    )


def _seconds(context: Context, start: State, step: Step) -> float:
    """Median seconds of `step` over runs of one compiled loop of many turns."""

    @functools.partial(jax.jit, donate_argnums=2)
    def loop(model: TargetModel, adapter: Adapter, state: State) -> State:
        return jax.lax.fori_loop(0, _TURNS, lambda _, state: step(model, adapter, state), state)

    def fresh() -> State:
        return jax.block_until_ready(jax.tree.map(jnp.copy, start))

    jax.block_until_ready(loop(context.model, context.adapter, fresh()))
    times = []
    for _ in range(_REPEATS):
        state = fresh()
        begin = time.perf_counter()
        jax.block_until_ready(loop(context.model, context.adapter, state))
        times.append((time.perf_counter() - begin) / _TURNS)
    return statistics.median(times)
