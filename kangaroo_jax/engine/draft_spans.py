"""An answer's text in parts, by who wrote them: accepted drafts, or the target; and what was rejected in between."""

from __future__ import annotations

import collections
import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.engine.requests import Answer, DraftedToken, Round, TextDelta
from kangaroo_jax.engine.text import TextStream


class Kind(enum.StrEnum):
    ACCEPTED = "accepted"  # drafted, and the target's choice too
    LOOKED_UP = "looked up"  # the same, but looked up in the sequence's own tokens
    REJECTED = "rejected"  # drafted, looked at, and not in the answer
    TARGET = "target"  # added by the target


@dataclasses.dataclass(frozen=True)
class Span:
    """A part of an answer, or what was drafted in place of what follows it.

    Attributes:
      kind: who wrote it.
      text: part of the answer's text; of what was rejected, the text that it would have been. A character of several
        tokens is with its last one, and the others have no text.
      tokens: one token id; of what was rejected, each after the one that it follows.
      round: number of the round, from 0; -1 for the token that prefill gave.
    """

    kind: Kind
    text: str
    tokens: tuple[int, ...]
    round: int


class DraftSpans:
    """Cuts the answer to a request for drafts into spans, as it comes.

    The spans that were not rejected have the answer's tokens and its text, in order.

    Args:
      tokenizer: of the target.
      prompt: the request's token ids.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int]):
        # Without stop strings: what they hold back is decided by the engine, and its text is counted here.
        self._stream = TextStream(tokenizer, (), prompt)
        self._text = ""  # of the answer, decided
        self._end = self._shown = 0  # characters of the spans so far, and of those that were returned
        self._waiting: collections.deque[tuple[Span, int]] = collections.deque()  # with their ends
        self._rounds = 0

    def feed(self, delta: TextDelta) -> list[Span]:
        """Takes what is new; returns the spans whose text is decided."""
        if delta.rounds:
            for each in delta.rounds:
                self._add_round(each)
        else:
            self._add(Kind.TARGET, delta.tokens, -1)
        self._text += delta.text
        # A token without text may have begun a character that the next ones end, or that the answer's end cuts.
        ready, start = 0, self._shown
        for i, (_, end) in enumerate(self._waiting):
            if end > len(self._text):
                break
            if end > start:
                ready, start = i + 1, end
        return [self._next() for _ in range(ready)]

    def finish(self, answer: Answer) -> list[Span]:
        """The last spans. A stop string's tokens are among them, without the text that was cut off."""
        self._text = answer.text
        if self._waiting:  # the last is a token's: a round ends with one
            span, end = self._waiting.pop()
            self._waiting.append((span, max(end, len(answer.text))))
        return [self._next() for _ in range(len(self._waiting))]

    def _add_round(self, round: Round) -> None:
        accepted, number = round.accepted, self._rounds
        self._rounds += 1
        self._add(Kind.LOOKED_UP if round.looked_up else Kind.ACCEPTED, round.tokens[:accepted], number)
        added = round.tokens[accepted:]
        # Without a token of the target, the answer ended before it came to what was rejected.
        if added and (path := rejected_path(round.drafted)):
            tokens = tuple(token.id for token in path)
            self._waiting.append((Span(Kind.REJECTED, self._stream.preview(tokens), tokens, number), self._end))
        self._add(Kind.TARGET, added, number)

    def _add(self, kind: Kind, tokens: Sequence[int], number: int) -> None:
        for token in tokens:
            self._end += len(self._stream.feed([token], final=False))
            self._waiting.append((Span(kind, "", (token,), number), self._end))

    def _next(self) -> Span:
        span, end = self._waiting.popleft()
        if span.kind is Kind.REJECTED:
            return span
        start = self._shown
        self._shown = end
        return dataclasses.replace(span, text=self._text[start:end])


def answer_spans(tokenizer: Any, prompt: Sequence[int], answer: Answer) -> list[Span]:
    """All spans of an answer to a request for drafts; `prompt` is the request's token ids."""
    spans = DraftSpans(tokenizer, prompt)
    first = spans.feed(TextDelta(answer.id, "", answer.tokens[:1]))
    rest = spans.feed(TextDelta(answer.id, answer.text, answer.tokens[1:], answer.rounds)) if answer.rounds else []
    return [*first, *rest, *spans.finish(answer)]


def rejected_path(drafted: Sequence[DraftedToken]) -> list[DraftedToken]:
    """What a round drafted behind its last accepted token; in a tree, the likeliest path of it. May be empty."""
    last = max((i for i, token in enumerate(drafted) if token.accepted), default=-1)
    path: list[DraftedToken] = []
    while True:
        followers = [i for i, token in enumerate(drafted) if token.parent == last and not token.accepted]
        if not followers:
            return path
        last = max(followers, key=lambda i: drafted[i].confidence)
        path.append(drafted[last])
