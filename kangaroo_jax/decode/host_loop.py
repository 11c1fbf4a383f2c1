"""The host's part of decoding: compile, prefill, rounds in chunks on the device, text, and what came of it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import SamplingConfig
from kangaroo_jax.decode.prefill import bucket, empty_slots, prefill, prefill_into
from kangaroo_jax.decode.prompts import encode_prompts
from kangaroo_jax.decode.sampling import Sampler
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.decode.stream import TextStream
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.adapter import Adapter
from kangaroo_jax.model.target import TargetModel

# The device works alone for this many tokens; then the host looks, streams and checks stop strings.
CHUNK = 32
# Shapes are rounded up to multiples of these, so that prompts of many lengths share a few compiled programs.
PROMPT_STEP = 64
CACHE_STEP = 128
EOS_STEP = 4


Round = Callable[..., DecodeState]


@dataclasses.dataclass(frozen=True)
class Method:
    """A way of decoding.

    Attributes:
      adapter: None for plain decoding.
      one_round: commits 1 to `overhang` tokens per sequence.
      exit_layer: l.
      overhang: how far a round may go beyond a sequence's last token.
      slots: the most slots of the caches that a round fills.
      threshold: eta.
    """

    adapter: Adapter | None
    one_round: Round
    exit_layer: int
    overhang: int
    slots: int
    threshold: float


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds. Compilation, done once per shape and kept on disk, is apart."""

    prefill: float
    decode: float
    compile: float


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns: one entry per prompt.

    Attributes:
      tokens: new token ids, ending with the EOS id if one was produced.
      texts: their text without special tokens, cut before a stop string; None without a tokenizer.
      accept_lengths: tokens committed by each round; with the first token, which prefill gives, they add up to the
        new tokens.
      draft_lengths: tokens drafted by each round.
      seconds: wall-clock.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    accept_lengths: list[list[int]]
    draft_lengths: list[list[int]]
    seconds: Seconds

    @property
    def mean_accept_length(self) -> float:
        """Mean tokens per round over all sequences; 1.0 where there was no round (plain decoding has 1.0)."""
        lengths = [length for sequence in self.accept_lengths for length in sequence]
        return float(np.mean(lengths)) if lengths else 1.0


@dataclasses.dataclass(frozen=True)
class Answer:
    """What `generate_many` yields for one request.

    Attributes:
      index: the request's place in the list.
      tokens: new token ids, ending with the EOS id if one was produced.
      text: their text without special tokens, cut before a stop string; None without a tokenizer.
      accept_lengths: tokens committed by each round, as in `Generation`.
      draft_lengths: tokens drafted by each round.
      finish_reason: "eos", "stop" (a stop string), or "length" (max_new_tokens).
      seconds: wall-clock from its prefill to its end, its neighbours' prefills included, compilation not.
      compile_seconds: compilation since the answer before this one; over all answers, all of it.
    """

    index: int
    tokens: list[int]
    text: str | None
    accept_lengths: list[int]
    draft_lengths: list[int]
    finish_reason: str
    seconds: float
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Ending:
    """What ends a sequence before its limit.

    Attributes:
      eos: token ids, padded with -1, which is no token's id.
      stop: strings.
    """

    eos: Int[np.ndarray, " eos"]
    stop: tuple[str, ...]

    @classmethod
    def create(cls, target: Target, eos_token_ids: Sequence[int] | None, stop: Sequence[str], streams: bool) -> Ending:
        """Checks what a user gave; `streams` says that text is to be streamed."""
        if (stop or streams) and target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; stop strings and streamed text need one")
        if isinstance(stop, str) or not all(stop):
            raise InputError(f"stop must be a list of strings that are not empty, found {stop!r}")
        ends = list(target.eos_token_ids if eos_token_ids is None else eos_token_ids)
        if not all(-1 <= token < 2**31 for token in ends):
            raise InputError(f"eos_token_ids must be token ids, found {ends}")
        eos = np.full(bucket(max(1, len(ends)), EOS_STEP), -1, np.int32)
        eos[: len(ends)] = ends
        return cls(eos, tuple(stop))


@dataclasses.dataclass(frozen=True)
class Job:
    """A request that waits for a slot: its place in the list, token ids, most new tokens, and seed."""

    index: int
    ids: list[int]
    max_new_tokens: int
    seed: int


@dataclasses.dataclass
class _Slot:
    """A sequence on the device; `start` is when its prefill began, on a clock that stands still while compiling."""

    index: int
    stream: TextStream | None
    start: float


def run(
    target: Target,
    method: Method,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] | None,
    max_length: int | None,
    stop: Sequence[str],
    on_text: Callable[[int, str], None] | None,
) -> Generation:
    """Decodes prompts as one batch, prefilled together."""
    prompt_ids = encode_prompts(target, prompts, max_new_tokens, max_length)
    ending = Ending.create(target, eos_token_ids, stop, on_text is not None)
    tokens, lengths = _padded(prompt_ids, bucket(max(map(len, prompt_ids)), PROMPT_STEP))
    capacity, room = _shapes(method, tokens.shape[1], int(lengths.max()) + max_new_tokens, max_new_tokens)
    sampler = Sampler.create(sampling, prompt_ids)
    max_output = np.full(len(prompt_ids), max_new_tokens, np.int32)

    start = time.perf_counter()
    first = functools.partial(prefill, exit_layer=method.exit_layer, capacity=capacity, room=room)
    inputs = (target.model, method.adapter, tokens, lengths, max_output, ending.eos, sampler)
    program, prefill_compiling = _compiled(first, (), *inputs)
    state = jax.block_until_ready(program(*inputs))
    prefill_seconds = time.perf_counter() - start - prefill_compiling

    start = time.perf_counter()
    slots: list[_Slot | None] = [_Slot(i, _stream(target, ending), start) for i in range(len(prompt_ids))]
    answers = sorted(
        _decode(target, method, ending, state, slots, [], sampling, on_text), key=lambda answer: answer.index
    )
    compiling = sum(answer.compile_seconds for answer in answers)
    decode_seconds = time.perf_counter() - start - compiling
    return Generation(
        tokens=[answer.tokens for answer in answers],
        texts=None if target.tokenizer is None else [answer.text for answer in answers],
        accept_lengths=[answer.accept_lengths for answer in answers],
        draft_lengths=[answer.draft_lengths for answer in answers],
        seconds=Seconds(prefill_seconds, decode_seconds, prefill_compiling + compiling),
    )


def run_many(
    target: Target, method: Method, jobs: Sequence[Job], batch_size: int, ending: Ending, sampling: SamplingConfig
) -> Iterator[Answer]:
    """Decodes jobs in `batch_size` slots, each refilled as soon as its sequence ends; answers in the order of their
    ends. Caches have room for the longest job."""
    capacity, room = _shapes(
        method,
        max(_prompt_room(len(job.ids)) for job in jobs),
        max(len(job.ids) + job.max_new_tokens for job in jobs),
        max(job.max_new_tokens for job in jobs),
    )
    sampler = Sampler.create(dataclasses.replace(sampling, seed=0), [[0]] * batch_size)
    state = empty_slots(
        target.model, method.adapter, sampler, batch_size, exit_layer=method.exit_layer, capacity=capacity, room=room
    )
    yield from _decode(target, method, ending, state, [None] * batch_size, jobs, sampling, None)


def _decode(
    target: Target,
    method: Method,
    ending: Ending,
    state: DecodeState,
    slots: list[_Slot | None],
    jobs: Sequence[Job],
    sampling: SamplingConfig,
    on_text: Callable[[int, str], None] | None,
) -> Iterator[Answer]:
    """Rounds until the sequences in the slots and all jobs are done.

    The device runs rounds in a `lax.while_loop`. The host is visited once per chunk of tokens, and at once when a
    sequence ends that a waiting job can take the place of.

    Args:
      target: the model.
      method: how to decode.
      ending: what ends a sequence.
      state: donated.
      slots: what each row of `state` holds, None where it idles.
      jobs: taken in this order.
      sampling: of the jobs, but for their seeds.
      on_text: called with an index and the next piece of text.
    """
    waiting = collections.deque(jobs)
    inserts: dict[int, Callable[..., DecodeState]] = {}  # by the prompt's padded length
    rest = (ending.eos, np.float32(method.threshold))
    advance = None
    compiled = reported = 0.0
    while True:
        num_output, finished = (np.array(x) for x in jax.device_get((state.num_output, state.finished)))
        ended = finished.copy()
        output = np.asarray(state.output) if ending.stop or on_text or finished.any() else None
        for i, slot in enumerate(slots):
            if slot is not None and slot.stream is not None and (ending.stop or on_text or finished[i]):
                piece = slot.stream.feed(output[i, : num_output[i]].tolist(), bool(finished[i]))
                finished[i] |= slot.stream.stopped
                if on_text and piece:
                    on_text(slot.index, piece)
        if np.any(finished & ~ended):
            state = state.replace(finished=jnp.asarray(finished))
        done = [i for i, slot in enumerate(slots) if slot is not None and finished[i]]
        answers = []
        if done:
            now = time.perf_counter() - compiled
            stats = jax.device_get(state.stats)
            for i in done:
                accept = stats.accept_lengths[i, : stats.rounds[i]]
                draft = stats.draft_lengths[i, : stats.rounds[i]]
                tokens = output[i, : num_output[i]].tolist()
                answers.append(_answer(slots[i], tokens, accept, draft, ending, now, compiled - reported))
                slots[i], reported = None, compiled
        del output
        for i, slot in enumerate(slots):
            if slot is None and waiting:
                job = waiting.popleft()
                slots[i] = _Slot(job.index, _stream(target, ending), time.perf_counter() - compiled)
                tokens, lengths = _padded([job.ids], _prompt_room(len(job.ids)))
                sampler = Sampler.create(dataclasses.replace(sampling, seed=job.seed), [job.ids])
                most = np.full(1, job.max_new_tokens, np.int32)
                inputs = (target.model, method.adapter, state, np.int32(i), tokens, lengths, most, ending.eos, sampler)
                if tokens.shape[1] not in inserts:
                    insert = functools.partial(prefill_into, exit_layer=method.exit_layer)
                    inserts[tokens.shape[1]], compiling = _compiled(insert, (2,), *inputs)
                    compiled += compiling
                state = inserts[tokens.shape[1]](*inputs)
                num_output[i], finished[i] = 1, False
        if all(slot is None for slot in slots):
            yield from answers
            return
        if advance is None:
            rounds = functools.partial(advance_rounds, method.one_round)
            inputs = (target.model, method.adapter, state, np.int32(0), *rest, np.int32(0))
            advance, compiling = _compiled(rounds, (2,), *inputs)
            compiled += compiling
        goal = np.int32(num_output[~finished].min() + CHUNK)
        least = np.int32(np.sum(~finished) if waiting else 0)
        state = advance(target.model, method.adapter, state, goal, *rest, least)
        yield from answers  # while the device works


def advance_rounds(
    one_round: Round,
    target: TargetModel,
    adapter: Adapter | None,
    state: DecodeState,
    goal: Int[Array, ""],
    eos_token_ids: Int[Array, " eos"],
    threshold: Float[Array, ""],
    least: Int[Array, ""] | int = 0,
) -> DecodeState:
    """Rounds until every unfinished sequence has `goal` tokens, or fewer than `least` sequences are unfinished."""
    return jax.lax.while_loop(
        lambda state: jnp.any(~state.finished & (state.num_output < goal)) & (jnp.sum(~state.finished) >= least),
        lambda state: one_round(target, adapter, state, eos_token_ids, threshold),
        state,
    )


def _padded(prompts: Sequence[list[int]], time: int) -> tuple[Int[np.ndarray, "batch time"], Int[np.ndarray, " batch"]]:
    tokens = np.zeros((len(prompts), time), np.int32)
    for row, ids in zip(tokens, prompts, strict=True):
        row[: len(ids)] = ids
    return tokens, np.asarray([len(ids) for ids in prompts], np.int32)


def _prompt_room(length: int) -> int:
    """Positions that a prompt of `length` is prefilled with on its own: two sizes between powers of two, so that the
    prompts of a long list need few programs."""
    return bucket(length, max(PROMPT_STEP, (1 << (length - 1).bit_length()) // 4))


def _shapes(method: Method, prompt_room: int, longest: int, max_new_tokens: int) -> tuple[int, int]:
    """Capacity of the caches and room for new tokens; `longest` is that of prompt and answer together."""
    capacity = bucket(max(prompt_room, longest + method.slots), CACHE_STEP)
    return capacity, bucket(max_new_tokens + method.overhang, CACHE_STEP)


def _stream(target: Target, ending: Ending) -> TextStream | None:
    return None if target.tokenizer is None else TextStream(target.tokenizer, ending.stop)


def _answer(
    slot: _Slot,
    tokens: list[int],
    accepted: Int[np.ndarray, " rounds"],
    drafted: Int[np.ndarray, " rounds"],
    ending: Ending,
    now: float,
    compile_seconds: float,
) -> Answer:
    stopped = False
    if slot.stream is not None:
        tokens, stopped = tokens[: slot.stream.num_tokens], slot.stream.stopped
    # A stop string may end the sequence within a round, or before ones that the chunk still ran.
    before = 1 + np.cumsum(accepted) - accepted
    accepted = np.minimum(accepted, len(tokens) - before)
    accept_lengths = accepted[accepted > 0].tolist()
    return Answer(
        index=slot.index,
        tokens=tokens,
        text=None if slot.stream is None else slot.stream.text,
        accept_lengths=accept_lengths,
        draft_lengths=drafted[: len(accept_lengths)].tolist(),
        finish_reason="stop" if stopped else "eos" if tokens[-1] in ending.eos else "length",
        seconds=now - slot.start,
        compile_seconds=compile_seconds,
    )


_programs: dict[Any, Any] = {}


def _compiled(
    function: functools.partial, donated: tuple[int, ...], *args: Any
) -> tuple[Callable[..., DecodeState], float]:
    """`function`, compiled ahead for arguments like these so that compilation is timed apart, and the seconds that
    compiling took: 0 where it was compiled before."""
    leaves, structure = jax.tree.flatten(args)
    key = (_identity(function), structure, tuple((x.shape, str(x.dtype), getattr(x, "format", None)) for x in leaves))
    start = time.perf_counter()
    if key not in _programs:
        # What is donated comes back where it was, so that the program takes its own result.
        kept = jax.tree.map(lambda x: x.sharding, args[donated[0]]) if donated else None
        _programs[key] = jax.jit(function, donate_argnums=donated, out_shardings=kept).lower(*args).compile()
        return _programs[key], time.perf_counter() - start
    return _programs[key], 0.0


def _identity(value: Any) -> Any:
    if isinstance(value, functools.partial):
        return (_identity(value.func), tuple(map(_identity, value.args)), tuple(sorted(value.keywords.items())))
    return value
