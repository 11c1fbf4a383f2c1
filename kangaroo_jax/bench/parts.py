"""The parts that decoding is made of: what each reads, and how long each takes alone.

A part is a start state and one turn of work on it, by the code that decoding runs. It is timed inside one jitted loop
of turns, from caches that hold a context; a turn sets the lengths back, so that every turn does the same work.

Only this module and acceptance.py call the functions a round is made of; the other measurements go through them.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from kangaroo_jax.bench.machine import seconds_per_call
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, LookupConfig, TreeConfig
from kangaroo_jax.decode.draft import draft_sequence
from kangaroo_jax.decode.lookup import History
from kangaroo_jax.decode.prefill import Admission, prefill
from kangaroo_jax.decode.rounds import RoundShape, one_round
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import Chunk, DecodeState, Draft
from kangaroo_jax.decode.tree import draft_tree, grow_tree
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.engine.engine import resolve_exit_layer
from kangaroo_jax.engine.part_costs import PartCounts
from kangaroo_jax.engine.programs import compiler_options
from kangaroo_jax.engine.shapes import capacity_class, rings
from kangaroo_jax.model.attention.backend import choose_backend
from kangaroo_jax.model.drafts.draft_model import Committed
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.target import TargetModel

State = TypeVar("State")  # a DecodeState, or a tuple of one and what else a turn starts from
Turn = Callable[[TargetModel, Adapter | None, State], State]

_TURNS = 32  # of a timed loop
_REPEATS = 7
_NO_LIMIT = 1 << 20  # new tokens
# One for all parts.
_prefill = jax.jit(prefill, static_argnames=("exit_layer", "capacity", "backend", "sampled", "rings"))


@dataclasses.dataclass(frozen=True)
class Context:
    """A target, an adapter, and the sequences that were processed before the measured position.

    Attributes:
      model: the target's weights.
      adapter: the adapter's weights.
      exit_layer: number of shallow layers.
      tokens: [batch, context], the sequences.
      capacity: positions in the caches.
    """

    model: TargetModel
    adapter: Adapter
    exit_layer: int
    tokens: Int[np.ndarray, "batch context"]
    capacity: int

    def prefill(self, plain: bool = False) -> Callable[[], DecodeState]:
        """The call that makes the state in which decoding finds the sequences before its first round."""
        batch, length = self.tokens.shape
        devices = sorted(self.model.embed_tokens[...].devices(), key=lambda device: device.id)
        static = {
            "exit_layer": RoundShape.plain().exit_layer if plain else self.exit_layer,
            "capacity": self.capacity,
            "backend": choose_backend(None, devices),
            "sampled": False,
            "rings": self.rings,
        }
        lengths, max_output = (np.full((batch,), n, np.int32) for n in (length, _NO_LIMIT))
        admission = Admission(max_output, np.full((batch, 1), -1, np.int32), Sampling.greedy(batch))
        adapter = None if plain else self.adapter
        return lambda: _prefill(self.model, adapter, self.tokens, lengths, admission, **static)

    @property
    def rings(self) -> tuple[int | None, ...]:
        """As `Shapes.rings`, with the room beyond a window that the caches have beyond the context."""
        return rings(self.model.config.attention_kinds, self.capacity - self.tokens.shape[1])

    @property
    def bytes(self) -> PartCounts:
        """What each part reads."""
        return PartCounts.of_bytes(self.model, self.adapter, self.exit_layer, self._cached)

    @property
    def operations(self) -> PartCounts:
        """Floating-point operations of each part's matrix products, for one position of each sequence."""
        return PartCounts.of_operations(self.model, self.adapter, self.exit_layer, len(self.tokens), self._cached)

    @property
    def _cached(self) -> list[int]:
        """Numbers in the caches of each layer."""
        config = self.model.config
        position = 2 * len(self.tokens) * config.num_key_value_heads * config.head_dim
        places = [min(ring or self.capacity, self.capacity) for ring in self.rings or (None,) * len(self.model.layers)]
        return [position * count for count in places]

    def with_draft_vocabulary(self, size: int) -> Context:
        """The same, with an adapter that drafts from the first `size` tokens only (any will do to time it)."""
        adapter = nnx.clone(self.adapter)
        adapter.draft_vocabulary = DraftVocabulary(self.model, jnp.arange(size))
        return dataclasses.replace(self, adapter=adapter)


def rounded_capacity(positions: int) -> int:
    """Positions of caches that hold `positions`."""
    return capacity_class(positions)


def exit_layer_of(target: Target, adapter: TrainedAdapter, settings: DraftConfig = DraftConfig()) -> int:  # noqa: B008
    """The exit layer to decode with.

    Raises:
      InputError: for an exit layer that is out of range or not the adapter's.
    """
    return resolve_exit_layer(target, adapter, settings)


def positions_per_round(adapter: Adapter, settings: DraftConfig) -> int:
    """The maximum number of cache positions that a round fills.

    Raises:
      InputError: for a tree with more children per node than there are tokens to draft.
    """
    num_tokens = adapter.num_tokens(adapter.config.vocab_size)
    return RoundShape.kangaroo(1, settings, num_tokens, jax.default_backend()).positions


def verification_widths(settings: DraftConfig, platform: str | None = None) -> tuple[int, ...]:
    """How many tokens a verification pass may hold, ascending: the last committed token and a round's drafts. On this
    machine's devices, or on another `platform`."""
    topk = 0 if settings.tree is None else settings.tree.topk
    return RoundShape.kangaroo(1, settings, topk, platform or jax.default_backend()).widths


@dataclasses.dataclass(frozen=True)
class Part(Generic[State]):
    """Work to time: `turn` takes model, adapter and a state like `start`, and returns such a state."""

    start: State
    turn: Turn[State]


def plain_step(context: Context) -> Part[DecodeState]:
    """One step of plain decoding."""

    def turn(model: TargetModel, _: Adapter, state: DecodeState) -> DecodeState:
        return _round(model, None, state, RoundShape.plain())

    return Part(context.prefill(plain=True)(), turn)


def draft_phase(context: Context, count: int) -> Part[DecodeState]:
    """A draft phase of exactly `count` tokens: that many draft steps and one more shallow pass."""

    def turn(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        drafted = draft_sequence(
            model, adapter, state, jnp.float32(0), None, exit_layer=context.exit_layer, max_draft_len=count
        )
        return state.replace(
            token=drafted.tokens[:, -1],
            shallow=drafted.shallow.replace(length=state.shallow.length),
            draft=_drafted_state(adapter, state, drafted.carry, drafted.hidden),
        )

    return Part(context.prefill()(), turn)


def verification(context: Context, width: int) -> Part[tuple[DecodeState, jax.Array]]:
    """A verification pass over `width` positions, with its LM head, from one hidden state at all of them."""
    batch = len(context.tokens)
    start = jnp.ones((batch, 1, context.model.config.hidden_size), context.model.compute_dtype)

    def turn(model: TargetModel, _: Adapter, carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, hidden = carry
        drafted = Draft(
            tokens=jnp.zeros((batch, width - 1), jnp.int32),
            confidence=jnp.ones((batch, width - 1)),
            length=jnp.full((batch,), width - 1),
            hidden=jnp.broadcast_to(hidden, (batch, width, hidden.shape[-1])),
            shallow=state.shallow,
            carry=None,
            probs=None,
        )
        verdict, _, deep = verify(model, state.deep, drafted, None, exit_layer=context.exit_layer, widths=(width,))
        # The next turn depends on this one's result, so that no turn can be left out or overlap.
        moved = hidden + 1e-9 * verdict.tokens[:, :1, None].astype(hidden.dtype)
        return state.replace(deep=deep.replace(length=state.deep.length)), moved

    return Part((context.prefill()(), start), turn)


def complete_round(context: Context, count: int, tree: TreeConfig | None = None) -> Part[DecodeState]:
    """A complete round that drafts exactly `count` tokens, or a tree of exactly that many levels: draft, verification
    and commit."""
    width = 1 + (count if tree is None else tree.drafted(count))

    def turn(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        return _round(model, adapter, state, RoundShape(context.exit_layer, count, tree, (width,)))

    return Part(context.prefill()(), turn)


def lookup_round(context: Context, count: int) -> Part[DecodeState]:
    """A complete round that looks up `count` tokens, which are always found: the search, one pass of the shallow layers
    over them, verification and commit."""
    lookup = LookupConfig(count, min_ngram=1)

    def turn(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        shape = RoundShape(context.exit_layer, 1, None, (count + 1,), lookup)
        return _round(model, adapter, state, shape).replace(token=state.token)

    start = context.prefill()()
    # All tokens are alike, so the last one stands before wherever it is.
    history = History.empty(len(context.tokens), context.capacity)
    return Part(start.replace(token=jnp.zeros_like(start.token), history=history), turn)


def tree_growth(context: Context, topk: int, levels: int) -> Part[DecodeState]:
    """Growing a tree to exactly `levels` levels, before a budget cuts it: one pass from the last committed token, and a
    draft step of `topk` tokens for each level after the first."""

    def turn(model: TargetModel, adapter: Adapter, state: DecodeState) -> DecodeState:
        root, grown = grow_tree(
            model, adapter, state, jnp.float32(0), exit_layer=context.exit_layer, max_draft_len=levels, topk=topk
        )
        return state.replace(
            token=grown.tokens[:, -1, 0],
            shallow=grown.shallow.replace(length=state.shallow.length),
            draft=_drafted_state(adapter, state, grown.carry, root),
        )

    return Part(context.prefill()(), turn)


def tree_verification(context: Context, tree: TreeConfig, levels: int) -> Part[tuple[DecodeState, Draft]]:
    """Verifying a tree of exactly `levels` levels, drafted here once, and committing what is accepted: mask, the pass
    with its LM head, the walk along the target's choices, and moving the accepted path in the caches."""
    start = context.prefill()()
    settings = {"exit_layer": context.exit_layer, "max_draft_len": levels, "tree": tree}
    drafted = jax.jit(functools.partial(draft_tree, **settings))(context.model, context.adapter, start, jnp.float32(0))
    drafted = drafted.replace(shallow=None, carry=None)  # a turn uses the caches of its state

    def turn(model: TargetModel, adapter: Adapter, loop: tuple[DecodeState, Draft]) -> tuple[DecodeState, Draft]:
        state, drafted = loop
        # Each turn depends on the last one's result, so that no work can be left out, or done once for all turns.
        zero = jnp.minimum(state.token, 0)[:, None]
        draft_of_turn = drafted.replace(
            hidden=drafted.hidden + zero[:, :, None].astype(drafted.hidden.dtype),
            tree=drafted.tree.replace(parents=drafted.tree.parents + zero),
            shallow=state.shallow,
            carry=state.draft,
        )
        verdict, hidden, deep = verify(
            model,
            state.deep,
            draft_of_turn,
            None,
            exit_layer=context.exit_layer,
            widths=(1 + tree.drafted(levels),),
        )
        done, _ = commit(
            state, Chunk.empty(state.finished, levels + 1, 1), adapter, draft_of_turn, verdict, hidden, deep
        )
        return _set_back(done, state), drafted

    return Part((start, drafted), turn)


def plain_step_seconds(context: Context) -> float:
    """Seconds of one `plain_step`."""
    return seconds_of(plain_step(context), context)


def draft_seconds(context: Context, count: int) -> float:
    """Seconds of one `draft_phase`."""
    return seconds_of(draft_phase(context, count), context)


def verification_seconds(context: Context, width: int) -> float:
    """Seconds of one `verification`."""
    return seconds_of(verification(context, width), context)


def round_seconds(context: Context, count: int, tree: TreeConfig | None = None) -> float:
    """Seconds of one `complete_round`."""
    return seconds_of(complete_round(context, count, tree), context)


def lookup_seconds(context: Context, count: int) -> float:
    """Seconds of one `lookup_round`."""
    return seconds_of(lookup_round(context, count), context)


def growth_seconds(context: Context, topk: int, levels: int) -> float:
    """Seconds of one `tree_growth`."""
    return seconds_of(tree_growth(context, topk, levels), context)


def tree_verification_seconds(context: Context, tree: TreeConfig, levels: int) -> float:
    """Seconds of one `tree_verification`."""
    return seconds_of(tree_verification(context, tree, levels), context)


def prefill_seconds(context: Context) -> float:
    """Seconds of prefill over the context."""
    return seconds_per_call(context.prefill())


def _round(model: TargetModel, adapter: Adapter | None, state: DecodeState, shape: RoundShape) -> DecodeState:
    """A round that no low confidence cuts short; afterwards the lengths are as before."""
    chunk = Chunk.empty(state.finished, shape.max_commit, 1, looks_up=shape.lookup is not None)
    done, _ = one_round(model, adapter, state, chunk, jnp.float32(0), shape=shape, sampled=False)
    return _set_back(done, state)


def _drafted_state(adapter: Adapter, state: DecodeState, carry: Any, hidden: jax.Array) -> Any:
    """The draft model's state with what a draft phase wrote: as if the last node of `hidden` had been committed."""
    batch, nodes, _ = hidden.shape
    one, last = jnp.ones((batch,), jnp.int32), jnp.full((batch, 1), nodes - 1)
    committed = Committed(state.shallow.length, one, last, hidden, hidden, None)
    return adapter.after_verify(state.draft, carry, committed)


def _set_back(new: DecodeState, old: DecodeState) -> DecodeState:
    """`new` with the lengths of `old`. (The draft model is told the position at each call.)"""
    return new.replace(
        shallow=new.shallow.replace(length=old.shallow.length),
        deep=new.deep.replace(length=old.deep.length),
        num_output=old.num_output,
        finished=old.finished,
    )


def seconds_of(part: Part[State], context: Context) -> float:
    """Median seconds of one turn of `part`, over runs of one compiled loop of many turns."""

    @functools.partial(jax.jit, donate_argnums=2, compiler_options=compiler_options(jax.default_backend()))
    def loop(model: TargetModel, adapter: Adapter, state: State) -> State:
        return jax.lax.fori_loop(0, _TURNS, lambda _, state: part.turn(model, adapter, state), state)

    def fresh() -> State:
        return jax.block_until_ready(jax.tree.map(jnp.copy, part.start))

    jax.block_until_ready(loop(context.model, context.adapter, fresh()))  # compiles
    times = []
    for _ in range(_REPEATS):
        state = fresh()
        begin = time.perf_counter()
        jax.block_until_ready(loop(context.model, context.adapter, state))
        times.append((time.perf_counter() - begin) / _TURNS)
    return statistics.median(times)
