"""What goes into an engine, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kangaroo_jax.config import SamplingConfig


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt with settings of its own. What is None is the engine's default, or that of the call it is given to.

    Attributes:
      prompt: text, or token ids.
      max_new_tokens: at most so many new tokens.
      sampling: temperature, top-p, top-k and seed.
      stop: strings that end the answer, and are not in its text.
      eos_token_ids: tokens that end the answer, kept in its tokens.
      seed: of sampling, in place of `sampling.seed`.
      stream: whether `TextDelta`s are wanted before the answer is finished.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int | None = None
    sampling: SamplingConfig | None = None
    stop: Sequence[str] | None = None
    eos_token_ids: Sequence[int] | None = None
    seed: int | None = None
    stream: bool = True


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
      id: the request's.
      tokens: new token ids, ending with the EOS id if one was produced.
      text: their text without special tokens, cut before a stop string; None without a tokenizer.
      accept_lengths: tokens committed by each round; with the first token, which prefill gives, they add up to the new
        tokens.
      draft_lengths: tokens drafted by each round.
      finish_reason: "eos", "stop" (a stop string), or "length" (max_new_tokens).
      prefill_seconds: wall-clock from the start of its prefill to its first token, compilation not counted.
      seconds: wall-clock from the start of its prefill to its end, its neighbours' prefills included, compilation not.
      reused_tokens: of the prompt, that a slot held already.
    """

    id: int
    tokens: list[int]
    text: str | None
    accept_lengths: list[int]
    draft_lengths: list[int]
    finish_reason: str
    prefill_seconds: float
    seconds: float
    reused_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """What is new of an answer.

    Attributes:
      id: the request's.
      text: new text that is decided; "" without a tokenizer.
      tokens: new token ids. Their text may come with a later delta.
    """

    id: int
    text: str
    tokens: list[int]


@dataclasses.dataclass(frozen=True)
class Finished:
    """The end of an answer: its last event.

    Attributes:
      id: the request's.
      answer: all of it.
    """

    id: int
    answer: Answer


Event = TextDelta | Finished
