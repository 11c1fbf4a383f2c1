"""The engine: requests in, text as it comes, a running batch on the device in between."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence, Set
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int, PyTree

from kangaroo_jax.checkpoint.adapter import TrainedAdapter, check_exit_layer
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checks import is_integer
from kangaroo_jax.config import DraftConfig, EngineConfig, SamplingConfig
from kangaroo_jax.decode.lookup import History
from kangaroo_jax.decode.pick import NO_TOKEN
from kangaroo_jax.decode.prefill import (
    Admission,
    Prompts,
    begin_batch,
    empty_prompts,
    empty_slots,
    in_layers,
    prefill_and_admit,
    prefill_piece,
    take_prompt,
)
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import Chunk, DecodeState
from kangaroo_jax.engine.costs import costs_of_rounds
from kangaroo_jax.engine.programs import SHARED, ProgramStore, compile_program, signature
from kangaroo_jax.engine.prompts import answer_room, check_new_tokens, encode_prompt
from kangaroo_jax.engine.requests import Answer, DraftedToken, Event, Finished, Request, Round, TextDelta
from kangaroo_jax.engine.shapes import CHUNK, MAX_EOS, ONLINE_CHUNK, PIECE, Plan, Shapes
from kangaroo_jax.engine.text import TextStream
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.attention.backend import choose_backend
from kangaroo_jax.model.cache import KVCache, batch_shardings

_MAX_NEW_TOKENS = 128  # of a request that does not say
_MAX_PROGRAMS = 64


@dataclasses.dataclass(eq=False)
class _Run:
    """A request on its way: waiting, in a slot, or ended."""

    id: int
    ids: list[int]  # of the prompt
    max_new_tokens: int
    sampling: SamplingConfig
    stop: tuple[str, ...]
    eos: tuple[int, ...]
    stop_tokens: tuple[int, ...]  # special tokens among the stop strings
    stream: bool
    drafts: bool
    plan: Plan
    text: TextStream | None
    committed: int = 0  # new tokens that the device is known to have committed, those behind a stop string too
    stands: bool = False  # whether the device goes no further
    start: float = 0.0  # of its prefill, on the engine's clock
    first: float = 0.0  # when its first token was here
    reused: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    accept_lengths: list[int] = dataclasses.field(default_factory=list)
    draft_lengths: list[int] = dataclasses.field(default_factory=list)
    lookup_lengths: list[int] = dataclasses.field(default_factory=list)
    rounds: list[Round] = dataclasses.field(default_factory=list)  # where drafts are wanted
    chunks_ahead: int = 0  # launched and not read yet
    assured: int = 0  # tokens that what was launched commits, unless the answer ends before
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class _Launched:
    """Work on the device whose results have not been read.

    Attributes:
      runs: of the rows of what it gives.
      first_tokens: of an admission; None of a chunk of rounds.
      chunk: of rounds; None of an admission.
    """

    runs: list[_Run | None]
    first_tokens: Int[Array, " rows"] | None
    chunk: Chunk | None


@dataclasses.dataclass
class _LongPrompt:
    """A prompt that is prefilled in more than one step: a long one, or one whose beginning a slot holds."""

    run: _Run
    slot: int
    prompts: Prompts  # the caches it is prefilled in
    done: int  # tokens that are in them


@dataclasses.dataclass
class _Slot:
    """A row of the running batch."""

    run: _Run | None = None
    held: list[int] = dataclasses.field(default_factory=list)  # token ids whose keys and values are in its caches
    filled: int = 0  # positions that may have been written there


class Engine:
    """Decodes requests in the slots of a running batch.

    A request's tokens are those that it gets alone: what it asks for is data of its slot, and nothing of it touches
    another's. In float32 they are plain decoding's.

        engine = Engine(target, adapter, EngineConfig(max_batch=8))
        id = engine.add(Request("Why is the sky blue?", max_new_tokens=200))
        while engine.busy:
            for event in engine.step():
                ...

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`; None decodes plainly, one token per pass, but for what `draft.lookup` finds.
      config: slots and limits.
      draft: exit layer, gamma, eta, trees, look-ups, and whether sequences decide how far to draft; `adapter.draft` is
        what tuning found for the adapter. Without an adapter, look-ups alone.

    Raises:
      InputError: for an exit layer that is out of range or not the adapter's, an adapter of another target, a tree
        wider than the vocabulary, look-ups longer than the context, or a batch that the mesh's data axis does not
        divide.
    """

    def __init__(
        self,
        target: Target,
        adapter: TrainedAdapter | None,
        config: EngineConfig = EngineConfig(),  # noqa: B008 - frozen
        draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    ):
        for name, value, kind in (("config", config, EngineConfig), ("draft", draft, DraftConfig)):
            if not isinstance(value, kind):
                raise InputError(f"{name} must be {kind.__name__}(...), found {value!r:.60}")
        self.target, self.adapter, self.config = target, adapter, config
        draft = draft.at(config.max_batch)
        devices = sorted(target.model.embed_tokens[...].devices(), key=lambda device: device.id)
        platform = self._platform = devices[0].platform
        self.shapes = Shapes(round_shape(target, adapter, draft, platform), accelerator=platform != "cpu")
        self._backend = choose_backend(target.mesh, devices)
        if target.mesh is not None and config.max_batch % target.mesh.shape["data"]:
            raise InputError(
                f"max_batch must be a multiple of the {target.mesh.shape['data']} devices along the mesh's data axis, "
                f"found {config.max_batch}"
            )
        self._rings = self.shapes.rings(target.config.attention_kinds)
        self._weights = (target.model, None if adapter is None else adapter.model)
        self._threshold = np.float32(draft.threshold if adapter is not None else 0.0)
        self._costs = costs_of_rounds(target, adapter, draft, self.shapes.round, config.max_batch, platform)
        self._signature = signature(self._weights, self.shapes, self._rings, self._backend, config.max_batch)
        # What programs are made of that begin with caches.
        self._static = {
            "exit_layer": self.shapes.round.exit_layer,
            "backend": self._backend,
            "looks_up": self.shapes.round.lookup is not None,
            "kept": self.shapes.round.kept,
            "rings": self._rings,
        }
        self._programs = ProgramStore(_MAX_PROGRAMS)
        self._state: DecodeState | None = None
        self._capacity = 0
        self._slots = [_Slot() for _ in range(config.max_batch)]
        self._waiting: collections.deque[_Run] = collections.deque()
        self._runs: dict[int, _Run] = {}  # that have not ended, by id
        self._launched: collections.deque[_Launched] = collections.deque()
        self._long_prompt: _LongPrompt | None = None
        self._next_id = 0
        self._has_sampled = False
        self._newest: PyTree = None  # what was launched last; the next launch may take its memory
        self.compile_seconds = 0.0

    # --- Requests.

    def add(self, request: Request) -> int:
        """Queues a request; returns its id. Requests are begun in the order in which they are added.

        Raises:
          InputError: for settings that cannot be, or a prompt that does not fit with its answer. The engine goes on.
        """
        target = self.target
        sampling = SamplingConfig() if request.sampling is None else request.sampling
        if not isinstance(sampling, SamplingConfig):
            raise InputError(f"sampling must be SamplingConfig(...), found {sampling!r:.60}")
        if request.seed is not None:
            sampling = dataclasses.replace(sampling, seed=request.seed)  # checks it
        if not isinstance(sampling.seed, int):
            raise InputError(f"seed of a request must be one integer, found {sampling.seed!r}")
        stop = () if request.stop is None else request.stop
        listed = isinstance(stop, Sequence) and not isinstance(stop, str)
        if not listed or not all(isinstance(string, str) and string for string in stop):
            raise InputError(f"stop must be a list of strings that are not empty, found {stop!r}")
        if stop and target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; stop strings need one")
        eos = target.eos_token_ids if request.eos_token_ids is None else request.eos_token_ids
        listed = isinstance(eos, Sequence | np.ndarray | Set)
        if not listed or not all(is_integer(token) and -1 <= token < 2**31 for token in eos):
            raise InputError(f"eos_token_ids must be token ids, a list, found {eos!r:.60}")
        eos = tuple(map(int, eos))
        stop_tokens = _special_tokens(target.tokenizer, stop) if stop else ()
        if len(eos) + len(stop_tokens) > MAX_EOS:
            raise InputError(
                f"eos_token_ids and special tokens among the stop strings must be at most {MAX_EOS} token ids, "
                f"found {len(eos) + len(stop_tokens)}"
            )
        most = _MAX_NEW_TOKENS if request.max_new_tokens is None else request.max_new_tokens
        check_new_tokens(most)
        at_least = 1 if request.to_context else most
        ids = encode_prompt(target, request.prompt, at_least, self.config.max_length, "the prompt")
        if request.to_context:
            most = min(most, answer_room(target, ids, self.config.max_length))
        run = _Run(
            id=self._next_id,
            ids=ids,
            max_new_tokens=most,
            sampling=sampling,
            stop=tuple(stop),
            eos=eos,
            stop_tokens=stop_tokens,
            stream=request.stream,
            drafts=request.drafts,
            plan=self.shapes.plan(len(ids), most),
            text=None if target.tokenizer is None else TextStream(target.tokenizer, stop, ids),
        )
        self._next_id += 1
        self._runs[run.id] = run
        self._waiting.append(run)
        return run.id

    def abort(self, id: int) -> None:
        """Ends a request: no event of it follows, and its slot is free. An id that is unknown or has ended is no
        error."""
        run = self._runs.pop(id, None)
        if run is None:
            return
        run.ended = True
        if run in self._waiting:
            self._waiting.remove(run)
        if self._long_prompt is not None and self._long_prompt.run is run:
            self._long_prompt = None
        for slot in self._slots:
            if slot.run is run:
                self._free(slot)

    @property
    def busy(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._runs)

    @property
    def waiting(self) -> int:
        """How many requests have not begun: they wait for a slot."""
        return len(self._waiting)

    def step(self) -> list[Event]:
        """Goes on by one chunk of rounds, and returns what is known of earlier ones; an empty list where nothing is.

        The next chunk is launched before the last one's tokens are read, so that the device does not wait for text. Not
        where a request that comes meanwhile would find a slot: it would wait for both.
        """
        self._admit()
        may_come = self.config.online and any(slot.run is None for slot in self._slots)
        launched = not (may_come and self._launched) and self._launch_rounds()
        events: list[Event] = []
        while self._launched and (len(self._launched) > 1 or not launched):
            launched = self._launched.popleft()
            if any(run is not None and not run.ended for run in launched.runs):  # else nobody waits for its end
                events += self._read(launched)
        return events

    def _running(self) -> list[_Run | None]:
        """The request of each slot that rounds go on with; None for one that is free or still being prefilled."""
        begun = None if self._long_prompt is None else self._long_prompt.run
        return [None if slot.run is begun else slot.run for slot in self._slots]

    # --- Prompts into slots.

    def _admit(self) -> None:
        """Prefills prompts that wait, as far as there are free slots: those of one width together; of a long one, a
        piece per step, so that others go on meanwhile."""
        if self._long_prompt is not None:
            self._prefill_piece()
        while self._waiting and self._long_prompt is None:
            free = [i for i, slot in enumerate(self._slots) if slot.run is None]
            if not free:
                return
            # All of these begin now, in any order.
            first = list(itertools.islice(self._waiting, len(free)))
            self._reserve(first)
            run = first[0]
            alike = [other for other in first if other.plan.width == run.plan.width and len(other.ids) <= PIECE]
            count, rows = self.shapes.group(len(alike), len(self._slots))
            runs = alike[:count] if len(run.ids) <= PIECE else []
            slot, reused = self._best_slot(run, free)
            saves = self.shapes.prompt_width(len(run.ids) - reused) < run.plan.width
            if len(runs) > 1 and (not saves or self.shapes.accelerator):
                reused = 0  # one by one, prompts that are this short would take longer
            if reused or len(run.ids) > PIECE:
                self._waiting.popleft()
                self._begin_long(run, slot, reused)
                continue
            taken = set(map(id, runs))
            self._waiting = collections.deque(other for other in self._waiting if id(other) not in taken)
            # Slots that hold the least are overwritten first.
            free.sort(key=lambda i: len(self._slots[i].held))
            self._prefill_last(runs, free[: len(runs)], None, [0] * len(runs), rows)

    def _best_slot(self, run: _Run, free: Sequence[int]) -> tuple[int, int]:
        """The free slot that holds the longest beginning of a prompt, and how many tokens of it; without any, the one
        that holds the least."""
        shared = {i: self._usable(self._slots[i], run) for i in free}
        best = max(free, key=lambda i: (shared[i], -len(self._slots[i].held)))
        # Below this, taking a row out of the batch costs more than it saves.
        return best, shared[best] if shared[best] >= min(PIECE, len(run.ids)) // 4 and shared[best] >= 16 else 0

    def _usable(self, slot: _Slot, run: _Run) -> int:
        """How many tokens of a prompt can be taken from a slot: those that both begin with, or none where the window of
        the first one behind them reaches what a ring no longer holds."""
        shared = _shared(slot.held, run.ids)
        last = shared + max(0, -(-(len(run.ids) - shared) // PIECE) - 1) * PIECE
        starts = ((shared, slot.filled), (self._last_start(run, last, self._capacity), max(last, slot.filled)))
        lacks = any(
            ring is not None and ring < self._capacity and max(0, start - kind.window + 1) < filled - ring
            for kind, ring in zip(self.target.config.attention_kinds, self._rings, strict=bool(self._rings))
            for start, filled in starts
        )
        return 0 if lacks else shared

    def _last_start(self, run: _Run, done: int, capacity: int) -> int:
        """Where a prompt's last piece begins, behind `done` tokens. The padded piece has to lie within the caches:
        where it would not, it begins earlier and does some again."""
        return min(done, max(0, capacity - self.shapes.prompt_width(len(run.ids) - done)))

    def _begin_long(self, run: _Run, slot: int, reused: int) -> None:
        """Begins a prompt that is not one fresh piece: it is long, or its slot holds its beginning. In a batch of one
        it gets the batch's own caches, or new ones in their place, so that those of a long context are there once."""
        run.start, run.reused = self._clock(), reused
        state, alone = self._state, len(self._slots) == 1
        if alone:
            self._state = self._newest = None
        if not reused:
            state = None  # its memory may be needed
            capacity = self._capacity if alone else run.plan.prompt_capacity
            prompts = empty_prompts(*self._weights, 1, capacity=capacity, **self._static)
        elif alone:
            prompts = Prompts(state.shallow, state.deep, state.draft, state.history)
        else:
            take = self._program("take a prompt", (self._capacity,), take_prompt, (), None, state, np.int32(0))
            prompts = take(state, np.int32(slot))
        self._slots[slot].run, self._slots[slot].held = run, []
        self._long_prompt = _LongPrompt(run, slot, prompts, reused)
        self._prefill_piece()

    def _prefill_piece(self) -> None:
        """The next piece of the long prompt."""
        run, prompts, done = self._long_prompt.run, self._long_prompt.prompts, self._long_prompt.done
        capacity = prompts.deep.capacity
        rest = len(run.ids) - done
        if rest > PIECE:
            tokens = np.asarray([run.ids[done : done + PIECE]], np.int32)
            inputs = (*self._weights, prompts, tokens, np.asarray([done], np.int32), np.asarray([PIECE], np.int32))
            exit_layer = self.shapes.round.exit_layer
            program = self._program("piece", (capacity,), prefill_piece, (2,), None, *inputs, exit_layer=exit_layer)
            self._long_prompt.prompts, _ = program(*inputs)
            self._long_prompt.done += PIECE
            return
        done = self._last_start(run, done, capacity)
        slot, self._long_prompt = self._long_prompt.slot, None
        self._prefill_last([run], [slot], prompts, [done], 1)

    def _prefill_last(
        self, runs: list[_Run], slots: list[int], prompts: Prompts | None, done: list[int], rows: int
    ) -> None:
        """The last piece of each prompt, its first token, and its row of the running batch. Beyond the prompts, `rows`
        are padding, whose slot is beyond the batch."""
        pieces = [run.ids[start:] for run, start in zip(runs, done, strict=True)]
        tokens = np.zeros((rows, max(map(self.shapes.prompt_width, map(len, pieces)))), np.int32)
        eos = np.full((rows, MAX_EOS), -1, np.int32)
        lengths, max_output = np.ones((2, rows), np.int32)
        start, places = np.zeros((rows,), np.int32), np.full((rows,), len(self._slots), np.int32)
        for i, (run, piece) in enumerate(zip(runs, pieces, strict=True)):
            tokens[i, : len(piece)] = piece
            ends = run.eos + run.stop_tokens
            eos[i, : len(ends)] = ends
            lengths[i], max_output[i], start[i], places[i] = len(piece), run.max_new_tokens, done[i], slots[i]
        padding = rows - len(runs)
        sampling = Sampling.create(
            [*(run.sampling for run in runs), *[SamplingConfig()] * padding],
            [*(run.ids for run in runs), *[[]] * padding],
        )
        admission = Admission(max_output, eos, sampling)
        sampled = self._sampled(runs)
        before = self._clock()
        if self._state is None and prompts is None and slots == list(range(len(self._slots))):
            first = self._begin_batch(tokens, lengths, admission, sampled)
        else:
            first = self._put_into_slots(prompts, tokens, start, lengths, places, admission, sampled)
        for run, slot in zip(runs, slots, strict=True):
            if prompts is None:
                run.start = before
            run.assured = 1
            self._slots[slot].run, self._slots[slot].held = run, []
        self._launched.append(_Launched(runs, first, None))

    def _begin_batch(
        self, tokens: np.ndarray, lengths: np.ndarray, admission: Admission, sampled: bool
    ) -> Int[Array, " rows"]:
        """The running batch, made of prompts for all of its slots; their first tokens. Where nothing runs yet, this
        takes less time than to put them into empty slots."""
        inputs = (*self._weights, tokens, lengths, admission)
        static = self._static | {"capacity": self._capacity, "sampled": sampled}
        where = self._places(begin_batch, static, *inputs)
        key = (self._capacity, *tokens.shape, sampled)
        program = self._program("begin", key, begin_batch, (), where, *inputs, **static)
        self._state, first = program(*inputs)
        return first

    def _put_into_slots(
        self,
        prompts: Prompts | None,
        tokens: np.ndarray,
        start: np.ndarray,
        lengths: np.ndarray,
        places: np.ndarray,
        admission: Admission,
        sampled: bool,
    ) -> Int[Array, " rows"]:
        """The last piece of prompts, whose rows go to `places` of the running batch; their first tokens. A prompt of
        several pieces in a batch of one becomes the batch, in the caches that it has."""
        alone = prompts is not None and len(self._slots) == 1
        state = None if alone else self._running_state()
        inputs = (*self._weights, state, prompts, tokens, start, lengths, places, admission)
        # Whether rounds look up, the caches say.
        static = {name: x for name, x in self._static.items() if name != "looks_up"} | {"sampled": sampled}
        capacity = 0 if prompts is None else prompts.deep.capacity
        key = (self._capacity, capacity, *tokens.shape, sampled)
        donated = (3,) if alone else (2,)
        where = self._places(prefill_and_admit, static, *inputs) if alone else self._kept()
        program = self._program("admit", key, prefill_and_admit, donated, where, *inputs, **static)
        self._state, first = program(*inputs)
        return first

    # --- Rounds.

    def _launch_rounds(self) -> bool:
        """Launches the next chunk, unless nothing runs, or chunks that are not read yet bring all to their ends."""
        runs = self._running()
        going_on = [run for run in runs if run is not None]
        if not going_on or (self._launched and all(run.assured >= run.max_new_tokens for run in going_on)):
            return False
        self._reserve([])
        sampled = self._sampled(going_on)
        record = any(run.drafts for run in going_on)
        running = np.asarray([run is not None for run in runs])
        # A chunk ends with sequences whose places others can take.
        refills = self._waiting or self.config.online
        at_least = np.int32(running.sum() + 1 - self.shapes.refill(self.config.max_batch) if refills else 0)
        tokens = ONLINE_CHUNK if self.config.online and not running.all() else CHUNK
        inputs = (*self._weights, self._state, running, self._threshold, at_least, np.int32(tokens), self._costs)
        program = self._program(
            "rounds",
            (self._capacity, sampled, record),
            run_rounds,
            (2,),
            self._kept(),
            *inputs,
            shape=self.shapes.round,
            sampled=sampled,
            tokens=CHUNK,
            record=record,
        )
        self._state, chunk = program(*inputs)
        for run in going_on:
            run.chunks_ahead += 1
            run.assured += 0 if at_least else self.shapes.least_tokens(tokens, len(going_on))
        self._launched.append(_Launched(runs, None, chunk))
        return True

    def _sampled(self, runs: Sequence[_Run]) -> bool:
        """Whether a program for these requests has to be able to sample. Where compiling takes long, one that has
        sampled before serves greedy requests as well."""
        sampled = any(run.sampling.temperature > 0 for run in runs)
        if self.shapes.accelerator:
            sampled = self._has_sampled = self._has_sampled or sampled
        return sampled

    def _reserve(self, new: Sequence[_Run]) -> None:
        """Sees to it that the caches hold what the sequences and `new` ones come to fill by the next chunk's end."""
        # A long prompt on its way goes into a row of these caches.
        needed = 0 if self._long_prompt is None else self._long_prompt.prompts.deep.capacity
        for run in [*(slot.run for slot in self._slots if slot.run is not None), *new]:
            filled, begins = len(run.ids) + len(run.tokens), not run.tokens
            needed = max(needed, self.shapes.room(run.plan, filled, run.chunks_ahead + 1, begins=begins))
        if self._state is None:
            needed = max(needed, self._capacity)
        elif needed > self._capacity or (needed and 2 * needed <= self._capacity):
            self._resize(needed)
            for slot in self._slots:
                # An idle row runs too, and writes behind what it holds.
                if slot.run is None and slot.filled > needed:
                    slot.held = []
        else:
            return
        self._capacity = needed

    def _resize(self, capacity: int) -> None:
        """Puts the batch into caches of another capacity, layer by layer: a program for all at once would have the old
        and the new ones in memory together."""
        (parts, joined), more = in_layers(self._state), capacity - self._capacity
        cached = [i for i, part in enumerate(parts) if isinstance(part, KVCache | History)]

        def resized(part: KVCache | History, capacity: int) -> KVCache | History:
            return part.resized(capacity)

        def compile() -> dict[int, Callable[..., Any]]:
            programs = {}
            for part in (parts[i] for i in cached):
                if signature(part) not in programs:
                    static = {"capacity": part.capacity + more}
                    where = self._places(resized, static, part)
                    programs[signature(part)] = compile_program(resized, (), where, self._platform, part, **static)
            return programs

        programs = self._stored("resize", (self._capacity, capacity), compile)
        self._state = self._newest = None  # which hold the old ones
        for i in cached:
            parts[i] = programs[signature(parts[i])](parts[i])
        self._state = self._newest = joined(parts)

    # --- Results.

    def _read(self, launched: _Launched) -> list[Event]:
        events: list[Event] = []
        if launched.chunk is None:
            tokens = jax.device_get(launched.first_tokens)
            now = self._clock()
            for run, token in zip(launched.runs, tokens.tolist(), strict=False):  # more are padding
                run.first = now
                failed = token == NO_TOKEN
                events += self._advance(run, [] if failed else [token], [], [], [], [], failed)
            return events
        chunk = jax.device_get(launched.chunk)
        for i, run in enumerate(launched.runs):
            if run is None:
                continue
            run.chunks_ahead -= 1
            num_rounds = chunk.num_rounds[i]
            events += self._advance(
                run,
                chunk.tokens[i, : chunk.num_tokens[i]].tolist(),
                chunk.accept_lengths[i, :num_rounds].tolist(),
                chunk.draft_lengths[i, :num_rounds].tolist(),
                [0] * num_rounds if chunk.lookup_lengths is None else chunk.lookup_lengths[i, :num_rounds].tolist(),
                _rounds(chunk, i) if run.drafts else [],
                bool(chunk.failed[i]),
            )
        return events

    def _advance(
        self,
        run: _Run,
        tokens: list[int],
        accept_lengths: list[int],
        draft_lengths: list[int],
        lookup_lengths: list[int],
        rounds: list[Round],
        failed: bool,
    ) -> list[Event]:
        """Takes what the device committed for a request; `failed` says that there is no token after it."""
        if run.ended or not (tokens or failed):
            return []
        run.tokens += tokens
        run.committed += len(tokens)
        run.accept_lengths += accept_lengths
        run.draft_lengths += draft_lengths
        run.lookup_lengths += lookup_lengths
        reason = None
        if failed:
            reason = "error"
        elif run.tokens[-1] in run.eos:
            reason = "eos"
        elif run.tokens[-1] in run.stop_tokens:
            reason = "stop"
        elif len(run.tokens) >= run.max_new_tokens:
            reason = "length"
        run.stands = reason is not None
        piece = ""
        if run.text is not None and (run.stop or run.stream or reason):
            piece = run.text.feed(run.tokens[run.text.num_tokens :], final=reason is not None)
            if run.text.stopped:
                reason = "stop"
                surplus = len(run.tokens) - run.text.num_tokens
                tokens = tokens[: len(tokens) - surplus]
                rounds = _first_tokens(rounds, len(tokens))
                run.tokens = run.tokens[: run.text.num_tokens]
        run.rounds += rounds
        events: list[Event] = []
        if run.stream and (tokens or piece):
            events.append(TextDelta(run.id, piece, tokens, rounds))
        return events if reason is None else [*events, self._finish(run, reason)]

    def _finish(self, run: _Run, reason: str) -> Finished:
        # A stop string may end the sequence within a round, or before ones that the chunk still ran.
        lengths, left = [], len(run.tokens) - 1
        for length in run.accept_lengths:
            if left <= 0:
                break
            lengths.append(min(length, left))
            left -= length
        run.ended = True
        del self._runs[run.id]
        for slot in self._slots:
            if slot.run is run:
                self._free(slot)
        answer = Answer(
            id=run.id,
            tokens=run.tokens,
            text=None if run.text is None else run.text.text,
            accept_lengths=lengths,
            draft_lengths=run.draft_lengths[: len(lengths)],
            finish_reason=reason,
            prefill_seconds=run.first - run.start,
            seconds=self._clock() - run.start,
            reused_tokens=run.reused,
            rounds=run.rounds if run.drafts else None,
            error=_not_numbers(self.target, len(run.tokens) + 1) if reason == "error" else None,
            lookup_lengths=run.lookup_lengths[: len(lengths)],
        )
        return Finished(run.id, answer)

    def _free(self, slot: _Slot) -> None:
        """Leaves a slot to others. What it holds can begin another prompt; not its last tokens, which the caches may
        lack."""
        run = slot.run
        slot.run, slot.held = None, (run.ids + run.tokens)[: -1 - max(1, self.shapes.round.kept)] if run.tokens else []
        ahead = 0 if run.stands else self.shapes.chunk_positions(run.chunks_ahead)
        slot.filled = len(run.ids) + run.committed - 1 + ahead + self.shapes.round.positions

    # --- Programs and arrays.

    def _clock(self) -> float:
        """Seconds on a clock that stands still while programs are compiled."""
        return time.perf_counter() - self.compile_seconds

    def _program(
        self,
        name: str,
        key: tuple[Any, ...],
        function: Callable[..., Any],
        donated: tuple[int, ...],
        out_shardings: PyTree,
        *args: Any,
        **static: Any,
    ) -> Callable[..., Any]:
        """`function` with `static` settings, compiled for arguments like `args`; `name` and `key` say which it is, of
        the programs for these weights."""
        compile = functools.partial(compile_program, function, donated, out_shardings, self._platform, *args, **static)
        program = self._stored(name, key, compile)

        def launch(*inputs: Any) -> Any:
            self._newest = program(*inputs)
            return self._newest

        return launch

    def _stored(self, name: str, key: tuple[Any, ...], compile: Callable[[], Any]) -> Any:
        """What `compile` gives: one program, or several that are kept as one."""
        key = (name, key, self._signature)

        def build() -> Any:
            # What ran while this compiles would seem to take no time: a prefill, say.
            jax.block_until_ready(self._newest)
            start = time.perf_counter()
            compiled = compile()
            self.compile_seconds += time.perf_counter() - start
            return compiled

        return self._programs.get(key, lambda: SHARED.get(key, build))

    def _running_state(self) -> DecodeState:
        """The running batch, of empty slots where nothing has run."""
        if self._state is None:
            batch = {"batch": self.config.max_batch, "max_eos": MAX_EOS, "capacity": self._capacity}
            static = self._static | batch
            where = self._places(empty_slots, static, *self._weights)
            program = self._program("empty", (self._capacity,), empty_slots, (), where, *self._weights, **static)
            self._state = program(*self._weights)
        return self._state

    def _places(self, function: Callable[..., PyTree], static: dict[str, Any], *inputs: Any) -> PyTree:
        """Where what begins a batch lies on a mesh; None without one."""
        if self.target.mesh is None:
            return None
        return batch_shardings(jax.eval_shape(functools.partial(function, **static), *inputs), self.target.mesh)

    def _kept(self) -> PyTree:
        """Where a program's results go: the state stays where it is, so that a program takes its own result."""
        if self.target.mesh is None:
            return None
        return jax.tree.map(lambda x: x.sharding, self._state), None


def round_shape(target: Target, adapter: TrainedAdapter | None, draft: DraftConfig, platform: str) -> RoundShape:
    """What a round is, on devices of `platform`.

    Raises:
      InputError: as `Engine`.
    """
    context, lookup = target.config.context, draft.lookup
    lengths = {} if adapter is None else {"max_draft_len": draft.max_draft_len}
    if draft.tree is not None:
        lengths["tree_budget"] = draft.tree.budget
    if lookup is not None:
        lengths["lookup_tokens"] = lookup.max_tokens
    for name, length in lengths.items():
        if length >= context:
            raise InputError(f"{name} must be less than the target's context ({context}), found {length}")
    if adapter is None:
        return RoundShape.plain(lookup, platform, decides=draft.decide is not None)
    num_tokens = adapter.model.num_tokens(target.config.vocab_size)
    return RoundShape.kangaroo(resolve_exit_layer(target, adapter, draft), draft, num_tokens, platform)


def resolve_exit_layer(target: Target, adapter: TrainedAdapter, draft: DraftConfig) -> int:
    """The exit layer to use, or `InputError` if it is not the adapter's or not within the target."""
    if adapter.target_fingerprint not in (None, target.fingerprint):
        raise InputError(f"{adapter.name}: loaded for another target than {target.name}; load it for this one")
    exit_layer = draft.exit_layer or adapter.exit_layer
    if exit_layer is None:
        raise InputError(f"{adapter.name}: does not record its exit layer; give exit_layer (the paper's 7B uses 2)")
    if adapter.exit_layer is not None and exit_layer != adapter.exit_layer:
        raise InputError(
            f"{adapter.name}: trained for exit layer {adapter.exit_layer}, but exit_layer={exit_layer} was given; "
            "leave exit_layer out, or train an adapter for it"
        )
    check_exit_layer(exit_layer, target.config)
    return exit_layer


def _not_numbers(target: Target, place: int) -> str:
    """Why an answer has no token `place`, counted from 1, and what to do."""
    others = [name for name in ("float32", "bfloat16") if name != str(target.model.compute_dtype)]
    advice = f"try --dtype={' or '.join(others)}"
    if len(others) < 2:  # the largest numbers of these two are alike
        advice = "the weights may be damaged"
    return f"the model's logits are not numbers in {target.model.arithmetic} at token {place} of the answer; {advice}"


def _special_tokens(tokenizer: Any, stop: Sequence[str]) -> tuple[int, ...]:
    """The special tokens among stop strings, which are in no text that could be searched.

    Raises:
      InputError: for a stop string that has one within it.
    """
    special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    for string in stop:
        inside = next((name for name in special if name in string and name.strip() and string not in special), None)
        if inside is not None:
            raise InputError(
                f"the stop string {string!r} has the special token {inside!r} within it, which is not in the text; "
                "give the special token alone"
            )
    return tuple(dict.fromkeys(special[string] for string in stop if string in special))


def _rounds(chunk: Chunk, row: int) -> list[Round]:
    """The rounds of a sequence, from a chunk that records drafts."""
    rounds, start = [], 0
    for i in range(chunk.num_rounds[row]):
        end, count = start + chunk.accept_lengths[row, i], chunk.drafts.counts[row, i]
        drafted = (
            getattr(chunk.drafts, name)[row, i, :count].tolist()
            for name in ("tokens", "parents", "confidence", "accepted")
        )
        rounds.append(
            Round(
                chunk.tokens[row, start:end].tolist(),
                [DraftedToken(*each) for each in zip(*drafted, strict=True)],
                looked_up=chunk.lookup_lengths is not None and bool(chunk.lookup_lengths[row, i]),
            )
        )
        start = end
    return rounds


def _first_tokens(rounds: Sequence[Round], count: int) -> list[Round]:
    """The rounds that gave the first `count` tokens, the last of them cut."""
    kept = []
    for round in rounds:
        if count > 0:
            kept.append(dataclasses.replace(round, tokens=round.tokens[:count]))
            count -= len(round.tokens)
    return kept


def _shared(held: Sequence[int], ids: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike. Not the last of `ids`, which gives the first new token."""
    count = 0
    for a, b in zip(held, ids[:-1], strict=False):
        if a != b:
            break
        count += 1
    return count
