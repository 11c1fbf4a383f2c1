"""Lists of prompts through an engine: `generate`, `generate_plain` and `generate_many`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checks import is_integer
from kangaroo_jax.config import DraftConfig, EngineConfig, SamplingConfig
from kangaroo_jax.engine.engine import Engine
from kangaroo_jax.engine.prompts import Prompt, check_new_tokens, encode_prompt, encode_prompts
from kangaroo_jax.engine.requests import Answer, Finished, Request, TextDelta
from kangaroo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds. Compilation, done once per shape and kept on disk, is counted separately."""

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
      draft_lengths: draft steps of each round: tokens that it drafted, or levels of its tree. 0 where it looked up or
        drafted nothing.
      lookup_lengths: tokens that each round looked up in the sequence's own; 0 where it looked up none.
      seconds: wall-clock.
    """

    tokens: list[list[int]]
    texts: list[str] | None
    accept_lengths: list[list[int]]
    draft_lengths: list[list[int]]
    lookup_lengths: list[list[int]]
    seconds: Seconds

    @property
    def mean_accept_length(self) -> float:
        """Mean tokens per round over all sequences; 1.0 where there was no round (plain decoding has 1.0)."""
        lengths = [length for sequence in self.accept_lengths for length in sequence]
        return float(np.mean(lengths)) if lengths else 1.0


def generate(
    target: Target,
    adapter: TrainedAdapter | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Kangaroo decoding (paper, section 3): in float32 the tokens that `generate_plain` gives, sooner.

    With a temperature, tokens from the distribution that `generate_plain` draws from: both draw each token from the
    target's distribution, with different random numbers, so their texts differ.

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`; None: nothing is drafted but what `draft.lookup` finds.
      prompts: each a string, a list of token ids, or a list of messages; decoded together.
      max_new_tokens: most tokens per answer.
      draft: exit layer, gamma, eta, trees and look-ups; `adapter.draft` is what the adapter's decode.json says.
      sampling: temperature, top-p, top-k, and a seed for all or one per prompt; greedy by default.
      eos_token_ids: tokens that end a sequence, kept in its tokens; None means the target's own.
      max_length: most tokens of prompt and answer together; None, or more, means the target's context.
      stop: strings that end a sequence; the text ends before them.
      on_text: called with a prompt's index and the next piece of its text, once per chunk of tokens.

    Raises:
      InputError: for an empty or too long prompt, ids outside the vocabulary, an exit layer that is out of range or
        not the adapter's, seeds that are not one per prompt.
      MachineError: where the target's logits are not numbers, as they may be in float16.
    """
    return _generate(
        target, adapter, prompts, max_new_tokens, draft, sampling, eos_token_ids, max_length, stop, on_text
    )


def generate_plain(
    target: Target,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Greedy decoding or sampling, one token per pass. Arguments, result and errors as for `generate`."""
    return _generate(
        target, None, prompts, max_new_tokens, DraftConfig(), sampling, eos_token_ids, max_length, stop, on_text
    )


def generate_many(
    target: Target,
    adapter: TrainedAdapter | None,
    requests: Sequence[Prompt | Request],
    batch_size: int = 8,
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
) -> Iterator[Answer]:
    """Decodes any number of prompts, `batch_size` at a time: as soon as one ends, the next takes its place.

    Each answer's tokens are those that `generate` gives its prompt alone. (Where sequences decide how far to draft, a
    sampled one also depends on the number of slots.)

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`; None decodes plainly, one token per pass, but for what `draft.lookup` finds.
      requests: prompts (as for `generate`), or `Request`s, begun in this order. An answer's `id` is its
        request's place here.
      batch_size: sequences on the device at a time.
      max_new_tokens: most tokens per answer, where a request does not say.
      draft: exit layer, gamma, eta, trees and look-ups.
      sampling: where a request does not say; a seed for all, or one per request.
      eos_token_ids: where a request does not say; None means the target's own.
      max_length: most tokens of prompt and answer together; None, or more, means the target's context.
      stop: where a request does not say.

    Returns:
      An iterator over the answers, in the order in which they are done.

    Raises:
      InputError: at once, before anything is decoded: as `generate` does, and for a batch size below 1.
      MachineError: from the iterator, as `generate`; other answers may be lost with it. An `Engine` goes on.
    """
    if not is_integer(batch_size) or batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size!r}")
    requests = [request if isinstance(request, Request) else Request(request) for request in requests]
    config = EngineConfig(_slots(min(batch_size, max(1, len(requests))), target), max_length)
    engine = Engine(target, adapter, config, draft)
    for i, (request, one) in enumerate(zip(requests, _per_prompt(sampling, len(requests), "request"), strict=True)):
        most = max_new_tokens if request.max_new_tokens is None else request.max_new_tokens
        check_new_tokens(most)
        at_least = 1 if request.to_context else most
        engine.add(
            dataclasses.replace(
                request,
                prompt=encode_prompt(target, request.prompt, at_least, max_length, f"request {i}"),
                max_new_tokens=most,
                sampling=one if request.sampling is None else request.sampling,
                stop=stop if request.stop is None else request.stop,
                eos_token_ids=eos_token_ids if request.eos_token_ids is None else request.eos_token_ids,
                stream=False,
            )
        )
    return _answers(engine)


def _answers(engine: Engine) -> Iterator[Answer]:
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                yield event.answer.checked(f"request {event.id}")


def _generate(
    target: Target,
    adapter: TrainedAdapter | None,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    draft: DraftConfig,
    sampling: SamplingConfig,
    eos_token_ids: Sequence[int] | None,
    max_length: int | None,
    stop: Sequence[str],
    on_text: Callable[[int, str], None] | None,
) -> Generation:
    ids = encode_prompts(target, prompts, max_new_tokens, max_length)
    if on_text is not None and not callable(on_text):
        raise InputError(f"on_text must be a function, found {on_text!r:.60}")
    if on_text is not None and target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; streamed text needs one")
    engine = Engine(target, adapter, EngineConfig(_slots(len(ids), target), max_length), draft)
    stream = on_text is not None
    for prompt, one in zip(ids, _per_prompt(sampling, len(ids), "prompt"), strict=True):
        engine.add(Request(prompt, max_new_tokens, one, stop, eos_token_ids, stream=stream))
    answers = {}
    start = time.perf_counter()
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                answers[event.id] = event.answer.checked(f"prompt {event.id}" if len(ids) > 1 else "")
            elif isinstance(event, TextDelta) and event.text:
                on_text(event.id, event.text)
    seconds = time.perf_counter() - start - engine.compile_seconds
    prefill = max(answer.prefill_seconds for answer in answers.values())
    answers = [answers[i] for i in range(len(ids))]
    return Generation(
        tokens=[answer.tokens for answer in answers],
        texts=None if target.tokenizer is None else [answer.text for answer in answers],
        accept_lengths=[answer.accept_lengths for answer in answers],
        draft_lengths=[answer.draft_lengths for answer in answers],
        lookup_lengths=[answer.lookup_lengths for answer in answers],
        seconds=Seconds(prefill, seconds - prefill, engine.compile_seconds),
    )


def _slots(count: int, target: Target) -> int:
    """Slots for `count` prompts: as many for each device along the mesh's data axis."""
    parts = 1 if target.mesh is None else target.mesh.shape["data"]
    return -(-count // parts) * parts


def _per_prompt(sampling: SamplingConfig, count: int, what: str) -> list[SamplingConfig]:
    """The settings with one seed each."""
    if not isinstance(sampling, SamplingConfig):
        raise InputError(f"sampling must be SamplingConfig(...), found {sampling!r:.60}")
    seeds = [sampling.seed] * count if isinstance(sampling.seed, int) else sampling.seed
    if len(seeds) != count:
        raise InputError(f"seed must be one integer or one per {what}, found {len(seeds)} for {count}")
    return [dataclasses.replace(sampling, seed=seed) for seed in seeds]
