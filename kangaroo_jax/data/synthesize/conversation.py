"""Conversations that a target writes or answers, turn by turn."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from kangaroo_jax.config import SamplingConfig, SynthesisConfig
from kangaroo_jax.data.records import BadRecord, Turn
from kangaroo_jax.data.synthesize.frame import Frame, Template, encode
from kangaroo_jax.data.synthesize.mix import Kind, seed_of
from kangaroo_jax.data.synthesize.record_file import Record
from kangaroo_jax.engine.requests import Answer, Request

_LEAST_ANSWER = 16  # tokens that there is room for, or the conversation ends before the question
_LEAST_TURN = 128  # the same for a further question and its answer


class Conversation:
    """One conversation on its way: a `run.Job`. It depends on its index, its questions and the settings alone.

    Without `questions`, the target asks: it continues the empty user's turn of its template (the idea of Magpie,
    arXiv 2406.08464).

    Args:
      index: decides the kind, and the seeds of sampling.
      template: of the target.
      frame: of the template.
      settings: limits, mix, seed.
      questions: the turns of a system and of users to answer; None where the target asks.
      opening: what the target's first question begins with, without a space at its end.
    """

    def __init__(
        self,
        index: int,
        template: Template,
        frame: Frame,
        settings: SynthesisConfig,
        questions: Sequence[Turn] | None = None,
        opening: str = "",
    ):
        self.key: str | None = None
        self._index, self._kind = index, Kind.of(index, settings)
        self._template, self._frame, self._settings = template, frame, settings
        self._opening = opening
        self._room = template.target.config.context  # tokens
        if questions is None:
            self._room = min(self._room, settings.conversation_tokens)
        self._given = None if questions is None else [turn for turn in questions if turn.role != "system"]
        self._turns = [turn for turn in questions or () if turn.role == "system"]
        self._left = self._kind.turns if questions is None else len(self._given)  # questions
        self._keys: set[str] = set()
        self._ids: list[int] = []  # from the first token to the end of the last answer
        self._answers: list[tuple[int, int, int]] = []  # in `_ids`: where an answer starts, where its end is, its end
        self._end = ""  # why the last answer ended
        self._prompt: list[int] = []
        self._asking = True  # the next text is the user's

    def start(self) -> Record | str | None:
        """To be called first; returns what `take` does."""
        return self._next_question()

    def request(self) -> Request:
        """What is to be decoded next."""
        settings, sampling = self._settings, SamplingConfig()
        if self._asking:
            sampling = SamplingConfig(settings.temperature, settings.top_p)
        elif not self._kind.greedy:
            sampling = SamplingConfig(settings.answer_temperature)
        most = settings.question_tokens if self._asking else settings.answer_tokens
        return Request(
            self._prompt,
            min(most, self._room - len(self._prompt)),
            sampling,
            stop=self._frame.turn_stop if self._asking else (),
            eos_token_ids=self._frame.turn_ends if self._asking else None,
            seed=seed_of(settings.seed, self._index),  # random numbers depend on the prompt, too
            stream=False,
        )

    def take(self, answer: Answer) -> Record | str | None:
        """Takes what was decoded: None where `request` has more to decode, else the record, or why there is none."""
        return self._take_question(answer) if self._asking else self._take_answer(answer)

    def _next_question(self) -> Record | str | None:
        """Asks again, or ends the conversation where that was enough."""
        if not self._left or (self._answers and self._frame.to_next is None):
            return self._finish("")
        self._left -= 1
        if self._given is not None:
            return self._ask(self._given[len(self._answers)].text)
        if self._answers:
            self._prompt = self._body() + encode(self._template.target.tokenizer, self._frame.to_next)
        else:
            self._prompt = self._template.opening_ids(self._frame, self._opening)
        self._asking = True
        return None if self._fits(_LEAST_TURN if self._answers else _LEAST_ANSWER) else self._finish("no room")

    def _take_question(self, answer: Answer) -> Record | str | None:
        text = (answer.text if self._answers else self._opening + answer.text).strip()
        key = normalised(text)
        if answer.finish_reason == "length":
            return self._finish("question cut")
        if not key:
            return self._finish("question empty")
        if not self._frame.is_text(text, answer.tokens[:-1]):
            return self._finish("question not text")
        if key in self._keys:
            return self._finish("question repeated")
        self._keys.add(key)
        self.key = self.key or key
        return self._ask(text)

    def _ask(self, question: str) -> Record | str | None:
        """Has a question answered."""
        # A tokenizer's own template takes special tokens' text as text; named ones, and what goes on from tokens, do
        # not.
        if (self._answers or self._template.name) and not self._frame.is_text(question):
            return self._finish("question not text")
        self._turns.append(Turn("user", question))
        if self._answers:
            space = " " if self._frame.spaced_next else ""
            following = self._frame.to_next + space + question + self._frame.to_answer
            self._prompt = self._body() + encode(self._template.target.tokenizer, following)
        else:
            try:
                self._prompt = self._template.ids(self._turns)
            except BadRecord as error:
                return str(error)
        self._asking = False
        if not self._fits(_LEAST_ANSWER):
            self._turns.pop()
            return self._finish("no room")
        return None

    def _take_answer(self, answer: Answer) -> Record | str | None:
        if not answer.text.strip():
            self._turns.pop()
            return self._finish("answer empty")
        text = answer.text.removeprefix(" ") if self._frame.spaced_answer else answer.text
        self._turns.append(Turn("assistant", text))
        self._ids, self._end = self._prompt + answer.tokens, answer.finish_reason
        ended = self._end == "eos"
        self._answers.append((len(self._prompt), len(self._ids) - ended, answer.tokens[-1] if ended else -1))
        return self._next_question() if ended else self._finish("")

    def _body(self) -> list[int]:
        """All tokens up to the end of the last answer. What ended it is left to the template, whose end may be another
        one."""
        return self._ids[: self._answers[-1][1]]

    def _fits(self, more: int) -> bool:
        return len(self._prompt) + more <= self._room

    def _finish(self, reason: str) -> Record | str:
        """The end: with the answers that there are, or without any for `reason`."""
        if not self._answers:
            return reason
        return {
            "messages": [{"role": turn.role, "content": turn.text} for turn in self._turns],
            "answers": "greedy" if self._kind.greedy else "sampled",
            "end": self._end,
            "token_ids": self._ids,
            "learned": [[start, end + (self._ids[end : end + 1] == [token])] for start, end, token in self._answers],
        }


def normalised(text: str) -> str:
    """A text as duplicates are told by: without case, white space and the forms of a character."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
