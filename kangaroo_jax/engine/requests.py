"""What goes into an engine, and what comes out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kangaroo_jax.config import SamplingConfig
from kangaroo_jax.engine.prompts import Prompt
from kangaroo_jax.errors import MachineError


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt with settings of its own. What is None is the engine's default, or that of the call it is given to.

    Attributes:
      prompt: text, token ids, or the messages of a chat.
      max_new_tokens: at most so many new tokens.
      sampling: temperature, top-p, top-k and seed.
      stop: strings that end the answer, and are not in its text.
      eos_token_ids: tokens that end the answer, kept in its tokens.
      seed: of sampling, in place of `sampling.seed`.
      stream: whether `TextDelta`s are wanted before the answer is finished.
      to_context: whether an answer that would pass the context ends there; else such a request is refused.
      drafts: whether `rounds` are wanted, with what was drafted.
    """

    prompt: Prompt
    max_new_tokens: int | None = None
    sampling: SamplingConfig | None = None
    stop: Sequence[str] | None = None
    eos_token_ids: Sequence[int] | None = None
    seed: int | None = None
    stream: bool = True
    to_context: bool = False
    drafts: bool = False


@dataclasses.dataclass(frozen=True)
class DraftedToken:
    """A token that a round drafted.

    Attributes:
      id: token id.
      parent: place, in the round's drafted tokens, of the one that it follows; -1 for the last committed token.
      confidence: the draft model's largest probability there; in a tree, the probability of the path to the token; 1
        where it was looked up.
      accepted: whether it is the target's choice too. Past the answer's end, it may be without being in the answer.
    """

    id: int
    parent: int
    confidence: float
    accepted: bool


@dataclasses.dataclass(frozen=True)
class Round:
    """A round of an answer.

    Attributes:
      tokens: what it committed, as far as that belongs to the answer.
      drafted: each after the one that it follows.
      looked_up: whether these were looked up in the sequence's own tokens.
    """

    tokens: list[int]
    drafted: list[DraftedToken]
    looked_up: bool = False

    @property
    def accepted(self) -> int:
        """How many of `tokens`, from the first on, were drafted; the target added what follows."""
        return min(len(self.tokens), sum(token.accepted for token in self.drafted))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a request.

    Attributes:
      id: the request's.
      tokens: new token ids, ending with the EOS id if one was produced.
      text: their text without special tokens, cut before a stop string: what they add to the prompt's text where all
        are decoded together. None without a tokenizer.
      accept_lengths: tokens committed by each round; with the first token, which prefill gives, they add up to the new
        tokens.
      draft_lengths: draft steps of each round: tokens that it drafted, or levels of its tree. 0 where it looked up or
        drafted nothing.
      finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens, or the context), or "error".
      prefill_seconds: wall-clock from the start of its prefill to its first token, compilation not counted.
      seconds: wall-clock from the start of its prefill to its end, its neighbours' prefills included, compilation not.
      reused_tokens: of the prompt, that a slot held already.
      rounds: what each round committed and drafted; None where the request did not ask for drafts.
      error: why the answer ends before its end, in one line; None where it does not.
      lookup_lengths: tokens that each round looked up in the sequence's own; 0 where it looked up none.
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
    rounds: list[Round] | None = None
    error: str | None = None
    lookup_lengths: Sequence[int] = ()

    def checked(self, name: str = "") -> Answer:
        """The answer itself, if it came to its end.

        Args:
          name: of the request, in the message.

        Raises:
          MachineError: with `error`.
        """
        if self.error is not None:
            raise MachineError(f"{name}: {self.error}" if name else self.error)
        return self


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """What is new of an answer.

    Attributes:
      id: the request's.
      text: new text that is decided; "" without a tokenizer.
      tokens: new token ids. Their text may come with a later delta.
      rounds: that gave them, where the request asked for drafts. The first token is none's.
    """

    id: int
    text: str
    tokens: list[int]
    rounds: Sequence[Round] = ()


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
