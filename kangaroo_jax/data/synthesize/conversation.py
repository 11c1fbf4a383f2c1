"""A conversation that the target writes: its user's turns, continued from the template's empty ones, and its answers.

The idea is Magpie's (arXiv 2406.08464).
"""

from __future__ import annotations

import dataclasses
import math
import unicodedata

import numpy as np

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import SamplingConfig, SynthesisConfig
from kangaroo_jax.data.records import Turn
from kangaroo_jax.data.synthesize.frame import Frame, encode
from kangaroo_jax.data.synthesize.record_file import Record
from kangaroo_jax.engine.requests import Answer, Request

_QUESTION, _ANSWER = range(2)
# frac(index * step) of these spreads any share of the conversations evenly, and two shares independently of each other:
# Roberts' sequence, the powers of the number for which x ** 4 = x + 1.
_ROOT = 1.2207440846057596
_LEAST = 16  # tokens that a turn has room for, or it is not begun
_BROKEN = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What an index alone decides about a conversation."""

    greedy: bool  # its answers
    turns: int  # of the user, at most

    @classmethod
    def of(cls, index: int, settings: SynthesisConfig) -> Kind:
        """Of conversation `index`, from 0."""
        greedy, several, many = (math.modf((index + 0.5) * _ROOT**-power)[0] for power in (1, 2, 3))
        turns = 1
        if settings.turns > 1 and several < settings.several_turns:
            turns = 2 + int(many * (settings.turns - 1))
        return cls(greedy < settings.greedy, turns)


class Conversation:
    """One conversation on its way. `request` says what is to be decoded next, `take` what came of it.

    Args:
      index: of the conversation. It depends on this and on the seed alone.
      target: with a tokenizer.
      frame: of the template.
      settings: limits, mix, seed.
    """

    def __init__(self, index: int, target: Target, frame: Frame, settings: SynthesisConfig):
        self._index = index
        self.kind = Kind.of(index, settings)
        self.key: str | None = None  # of the first question, once it is there: equal for duplicates
        self._target, self._frame, self._settings = target, frame, settings
        self._context = target.config.max_position_embeddings
        self._turns: list[Turn] = []
        self._keys: set[str] = set()
        self._ids: list[int] = []  # from the first token to the end of the last answer
        self._answers: list[
            tuple[int, int, int]
        ] = []  # in `_ids`: an answer's start, its end token's place, that token
        self._end = ""  # why the last answer ended
        self._asking = True  # the next text is the user's
        self._prompt = encode(target.tokenizer, frame.opening.rstrip(" "), frame.bare)

    def request(self) -> Request:
        """What is to be decoded next."""
        settings, sampling = self._settings, SamplingConfig()
        if self._asking:
            sampling = SamplingConfig(settings.temperature, settings.top_p)
        elif not self.kind.greedy:
            sampling = SamplingConfig(settings.answer_temperature)
        most = settings.question_tokens if self._asking else settings.answer_tokens
        stage = _QUESTION if self._asking else _ANSWER
        turn = len(self._answers)
        words = np.random.SeedSequence((settings.seed, self._index, turn, stage)).generate_state(1)
        return Request(
            self._prompt,
            min(most, self._context - len(self._prompt)),
            sampling,
            stop=self._frame.turn_stop if self._asking else (),
            eos_token_ids=self._frame.turn_ends if self._asking else None,
            seed=int(words[0]),
            stream=False,
        )

    def take(self, answer: Answer) -> Record | str | None:
        """Takes what was decoded: None where `request` has more to decode, else the record, or why there is none."""
        return self._take_question(answer) if self._asking else self._take_answer(answer)

    def _take_question(self, answer: Answer) -> Record | str | None:
        text = answer.text.strip()
        key = normalised(text)
        if answer.finish_reason == "length":
            return self._finish("user's turn cut")
        if not key:
            return self._finish("user's turn empty")
        if _BROKEN in text or self._frame.special.intersection(answer.tokens[:-1]):
            return self._finish("user's turn not text")
        if key in self._keys:
            return self._finish("duplicate")
        self._keys.add(key)
        self.key = self.key or key
        tokenizer, frame = self._target.tokenizer, self._frame
        following = text + frame.to_answer.rstrip(" ")
        if not self._turns:
            prompt = encode(tokenizer, frame.opening + following, frame.bare)
        else:
            # The template's own end of the answer stands in place of the target's, which may be another.
            prompt = self._ids[: self._answers[-1][1]] + encode(tokenizer, frame.to_next + following)
        if len(prompt) + _LEAST > self._context:
            return self._finish("no room for an answer")
        self._turns.append(Turn("user", text))
        self._prompt, self._asking = prompt, False
        return None

    def _take_answer(self, answer: Answer) -> Record | str | None:
        if not answer.text.strip():
            self._turns.pop()
            return self._finish("answer empty")
        spaced = self._frame.to_answer.endswith(" ")  # the space is the first token's
        self._turns.append(Turn("assistant", answer.text.removeprefix(" ") if spaced else answer.text))
        self._ids, self._end = self._prompt + answer.tokens, answer.finish_reason
        ended = self._end == "eos"
        self._answers.append((len(self._prompt), len(self._ids) - ended, answer.tokens[-1] if ended else -1))
        if not ended or len(self._answers) == self.kind.turns or self._frame.to_next is None:
            return self._finish("")
        prompt = self._ids[:-1] + encode(self._target.tokenizer, self._frame.to_next.rstrip(" "))
        if len(prompt) + _LEAST > self._context:
            return self._finish("")
        self._prompt, self._asking = prompt, True
        return None

    def _finish(self, reason: str) -> Record | str:
        """The end: with what there is, or without anything for `reason`."""
        if not self._answers:
            return reason
        learned = [[start, end + (self._ids[end : end + 1] == [token])] for start, end, token in self._answers]
        return {
            "messages": [{"role": turn.role, "content": turn.text} for turn in self._turns],
            "answers": "greedy" if self.kind.greedy else "sampled",
            "end": self._end,
            "ids": self._ids,
            "answer_spans": learned,
        }


def normalised(text: str) -> str:
    """A text as duplicates are told by: without case, white space and the forms of a character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
