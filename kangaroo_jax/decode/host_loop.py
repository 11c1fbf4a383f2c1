"""The host's part of decoding: compile, prefill, rounds in chunks on the device, text, and what came of it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.config import SamplingConfig
from kangaroo_jax.decode.prefill import bucket, prefill
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


def run(
    target: Target,
    adapter: Adapter | None,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    one_round: Round,
    *,
    exit_layer: int,
    overhang: int,
    threshold: float,
    sampling: SamplingConfig,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] | None,
    max_length: int | None,
    stop: Sequence[str],
    on_text: Callable[[int, str], None] | None,
) -> Generation:
    """Decodes prompts with `one_round`, which commits 1 to `overhang` tokens per sequence.

    The device runs rounds in a `lax.while_loop`; the host is visited once per chunk of tokens.
    """
    prompt_ids = encode_prompts(target, prompts, max_new_tokens, max_length)
    if (stop or on_text) and target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; stop strings and streamed text need one")
    if isinstance(stop, str) or not all(stop):
        raise InputError(f"stop must be a list of strings that are not empty, found {stop!r}")
    ends = list(target.eos_token_ids if eos_token_ids is None else eos_token_ids)
    if not all(-1 <= token < 2**31 for token in ends):
        raise InputError(f"eos_token_ids must be token ids, found {ends}")
    eos = np.full(bucket(max(1, len(ends)), EOS_STEP), -1, np.int32)  # -1 is no token's id
    eos[: len(ends)] = ends
    lengths = np.asarray([len(ids) for ids in prompt_ids], np.int32)
    tokens = np.zeros((len(prompt_ids), bucket(int(lengths.max()), PROMPT_STEP)), np.int32)
    for row, ids in zip(tokens, prompt_ids, strict=True):
        row[: len(ids)] = ids
    room = bucket(max_new_tokens + overhang, CACHE_STEP)
    capacity = bucket(max(tokens.shape[1], int(lengths.max()) + max_new_tokens + overhang), CACHE_STEP)
    sampler = Sampler.create(sampling, prompt_ids)
    max_output = np.full(len(prompt_ids), max_new_tokens, np.int32)
    streams = [TextStream(target.tokenizer, stop) for _ in prompt_ids] if target.tokenizer is not None else None

    start = time.perf_counter()
    first = functools.partial(prefill, exit_layer=exit_layer, capacity=capacity, room=room)
    inputs = (target.model, adapter, tokens, lengths, max_output, eos, sampler)
    program, prefill_compiling = _compiled(first, (), *inputs)
    state = jax.block_until_ready(program(*inputs))
    prefill_seconds = time.perf_counter() - start - prefill_compiling

    start = time.perf_counter()
    advance = functools.partial(advance_rounds, one_round)
    rest = (eos, np.float32(threshold))
    program, compiling = _compiled(advance, (2,), target.model, adapter, state, np.int32(0), *rest)
    while True:
        num_output, finished = jax.device_get((state.num_output, state.finished))
        if streams is not None:
            output = np.asarray(state.output)
            for i, stream in enumerate(streams):
                piece = stream.feed(output[i, : num_output[i]].tolist(), bool(finished[i]))
                if on_text and piece:
                    on_text(i, piece)
            stopped = np.asarray([stream.stopped for stream in streams])
            if np.any(stopped & ~finished):
                finished = finished | stopped
                state = state.replace(finished=jnp.asarray(finished))
        if finished.all():
            break
        goal = np.int32(num_output[~finished].min() + CHUNK)
        state = program(target.model, adapter, state, goal, *rest)
    decode_seconds = time.perf_counter() - start - compiling
    return _result(state, streams, Seconds(prefill_seconds, decode_seconds, prefill_compiling + compiling))


def advance_rounds(
    one_round: Round,
    target: TargetModel,
    adapter: Adapter | None,
    state: DecodeState,
    goal: Int[Array, ""],
    eos_token_ids: Int[Array, " eos"],
    threshold: Float[Array, ""],
) -> DecodeState:
    """Rounds until every unfinished sequence has `goal` tokens."""
    return jax.lax.while_loop(
        lambda state: jnp.any(~state.finished & (state.num_output < goal)),
        lambda state: one_round(target, adapter, state, eos_token_ids, threshold),
        state,
    )


_programs: dict[Any, Any] = {}


def _compiled(
    function: functools.partial, donated: tuple[int, ...], *args: Any
) -> tuple[Callable[..., DecodeState], float]:
    """`function`, compiled ahead for arguments like these so that compilation is timed apart, and the seconds that
    compiling took: 0 where it was compiled before."""
    leaves, structure = jax.tree.flatten(args)
    key = (_identity(function), structure, tuple((x.shape, str(x.dtype), getattr(x, "sharding", None)) for x in leaves))
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


def _result(state: DecodeState, streams: list[TextStream] | None, seconds: Seconds) -> Generation:
    output, num_output, stats = jax.device_get((state.output, state.num_output, state.stats))
    tokens, accept_lengths, draft_lengths = [], [], []
    for i, count in enumerate(num_output.tolist()):
        if streams is not None:
            count = streams[i].num_tokens
        tokens.append(output[i, :count].tolist())
        accepted = stats.accept_lengths[i, : stats.rounds[i]]
        # A stop string may end the sequence within a round, or before ones that the chunk still ran.
        before = 1 + np.cumsum(accepted) - accepted
        accepted = np.minimum(accepted, count - before)
        accept_lengths.append(accepted[accepted > 0].tolist())
        draft_lengths.append(stats.draft_lengths[i, : len(accept_lengths[-1])].tolist())
    return Generation(
        tokens=tokens,
        texts=None if streams is None else [stream.text for stream in streams],
        accept_lengths=accept_lengths,
        draft_lengths=draft_lengths,
        seconds=seconds,
    )
