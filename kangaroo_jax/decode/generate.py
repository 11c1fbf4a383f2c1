"""Text from prompts: tokenise, prefill, rounds in chunks on the device, and what came of it.

`generate` is Kangaroo; `generate_plain` (autoregressive.py) is the baseline. Both are `run` with their own round.
"""

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

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.decode.draft import draft
from kangaroo_jax.decode.prefill import bucket, prefill
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.decode.stream import TextStream
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.adapter import Adapter
from kangaroo_jax.model.target import TargetModel

# The device works alone for this many tokens; then the host looks, streams and checks stop strings.
CHUNK = 32
# Shapes are rounded up to multiples of these, so that prompts of many lengths share a few compiled programs.
_PROMPT_STEP = 64
_CACHE_STEP = 128
_EOS_STEP = 4

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


def generate(
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Greedy Kangaroo decoding: the tokens `generate_plain` gives, sooner (design, section 4).

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`.
      prompts: strings, or lists of token ids.
      max_new_tokens: exactly this many unless a sequence ends earlier.
      draft: exit layer, gamma, eta.
      eos_token_ids: tokens that end a sequence, kept in its tokens; None means the target's own.
      max_length: most tokens of prompt and answer together; None means the target's max_position_embeddings.
      stop: strings that end a sequence; its text ends before the first of them, its tokens with the token that
        completed it.
      on_text: called with the prompt's index and the next piece of its text, once per chunk of tokens.

    Raises:
      InputError: for an empty or too long prompt, ids outside the vocabulary, an exit layer that is out of range or
        not the adapter's.
    """
    exit_layer = resolve_exit_layer(target, adapter, draft)
    full = draft.max_draft_len + 1
    # Beside reading the weights, positions are free on accelerators; on CPU they are not.
    widths = (full,) if jax.default_backend() != "cpu" else tuple(sorted({w for w in (2, 3, 5) if w < full} | {full}))
    one_round = functools.partial(
        kangaroo_round, exit_layer=exit_layer, max_draft_len=draft.max_draft_len, widths=widths
    )
    return run(
        target,
        adapter.model,
        prompts,
        one_round,
        exit_layer=exit_layer,
        overhang=full,
        threshold=draft.threshold,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        stop=stop,
        on_text=on_text,
    )


def kangaroo_round(
    target: TargetModel,
    adapter: Adapter,
    state: DecodeState,
    eos_token_ids: Int[Array, " eos"],
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    max_draft_len: int,
    widths: tuple[int, ...],
) -> DecodeState:
    """One draft, one verification, one commit."""
    drafted = draft(target, adapter, state, threshold, exit_layer=exit_layer, max_draft_len=max_draft_len)
    tokens, deep = verify(target, state.deep, drafted, exit_layer=exit_layer, widths=widths)
    return commit(state, drafted, deep, tokens, eos_token_ids)


def resolve_exit_layer(target: Target, adapter: TrainedAdapter, draft: DraftConfig) -> int:
    """The exit layer to use, or `InputError` if it is not the adapter's or not within the target."""
    exit_layer = draft.exit_layer or adapter.exit_layer
    if exit_layer is None:
        raise InputError(f"{adapter.name}: does not record its exit layer; give exit_layer (the paper's 7B uses 2)")
    if adapter.exit_layer is not None and exit_layer != adapter.exit_layer:
        raise InputError(
            f"{adapter.name}: trained for exit layer {adapter.exit_layer}, but exit_layer={exit_layer} was given; "
            "leave exit_layer out, or train an adapter for it"
        )
    layers = target.config.num_hidden_layers
    if not 1 <= exit_layer < layers:
        raise InputError(f"exit_layer must be between 1 and {layers - 1} for {target.name}, found {exit_layer}")
    return exit_layer


def run(
    target: Target,
    adapter: Adapter | None,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    one_round: Round,
    *,
    exit_layer: int,
    overhang: int,
    threshold: float,
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
    if any(not string for string in stop):
        raise InputError("stop: an empty string stops nothing; remove it")
    ends = list(target.eos_token_ids if eos_token_ids is None else eos_token_ids)
    eos = np.full(bucket(max(1, len(ends)), _EOS_STEP), -1, np.int32)  # -1 is no token's id
    eos[: len(ends)] = ends
    lengths = np.asarray([len(ids) for ids in prompt_ids], np.int32)
    tokens = np.zeros((len(prompt_ids), bucket(int(lengths.max()), _PROMPT_STEP)), np.int32)
    for row, ids in zip(tokens, prompt_ids, strict=True):
        row[: len(ids)] = ids
    room = bucket(max_new_tokens + overhang, _CACHE_STEP)
    capacity = bucket(max(tokens.shape[1], int(lengths.max()) + max_new_tokens + overhang), _CACHE_STEP)
    max_output = np.full(len(prompt_ids), max_new_tokens, np.int32)
    streams = [TextStream(target.tokenizer, stop) for _ in prompt_ids] if target.tokenizer is not None else None

    start = time.perf_counter()
    first = functools.partial(prefill, exit_layer=exit_layer, capacity=capacity, room=room)
    program, compiling = _compiled(first, (), target.model, adapter, tokens, lengths, max_output, eos)
    state = jax.block_until_ready(program())
    prefill_seconds, prefill_compiling = time.perf_counter() - start - compiling, compiling

    start, compiling = time.perf_counter(), 0.0
    advance = functools.partial(advance_rounds, one_round)
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
        program, seconds = _compiled(advance, (2,), target.model, adapter, state, goal, eos, np.float32(threshold))
        compiling += seconds
        state = program()
    decode_seconds = time.perf_counter() - start - compiling
    return _result(state, streams, Seconds(prefill_seconds, decode_seconds, prefill_compiling + compiling))


def encode_prompts(
    target: Target,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None,
) -> list[list[int]]:
    """Token ids of the prompts, each checked to fit with its answer.

    Raises:
      InputError: naming the prompt by its index.
    """
    if isinstance(prompts, str):
        raise InputError("prompts must be a list; put the one prompt into a list")
    if not prompts:
        raise InputError("prompts is empty; give at least one")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    context = target.config.max_position_embeddings if max_length is None else max_length
    encoded = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            if target.tokenizer is None:
                raise InputError(
                    f"{target.name}: has no tokenizer; give token ids, or put its tokenizer files beside it"
                )
            ids = target.tokenizer.encode(prompt, verbose=False) if prompt else []
        else:
            ids = [int(token) for token in prompt]
        if not ids:
            raise InputError(f"prompt {i} is empty; give at least one token")
        for token in ids:
            if not 0 <= token < target.config.vocab_size:
                raise InputError(
                    f"prompt {i}: token id {token} is outside the vocabulary of {target.config.vocab_size}"
                )
        if len(ids) >= context:
            raise InputError(f"prompt {i} has {len(ids)} tokens, but the context is {context}; shorten it")
        if len(ids) + max_new_tokens > context:
            raise InputError(
                f"prompt {i} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}: {len(ids) + max_new_tokens} "
                f"exceed the context of {context}; shorten the prompt or lower max_new_tokens to {context - len(ids)}"
            )
        encoded.append(ids)
    return encoded


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
) -> tuple[Callable[[], DecodeState], float]:
    """A call of `function`, compiled ahead for these shapes so that compilation is timed apart, and the seconds that
    compiling took: 0 where it was compiled before."""
    leaves, structure = jax.tree.flatten(args)
    key = (_identity(function), structure, tuple((x.shape, str(x.dtype)) for x in leaves))
    start = time.perf_counter()
    if key not in _programs:
        _programs[key] = jax.jit(function, donate_argnums=donated).lower(*args).compile()
        return functools.partial(_programs[key], *args), time.perf_counter() - start
    return functools.partial(_programs[key], *args), 0.0


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
