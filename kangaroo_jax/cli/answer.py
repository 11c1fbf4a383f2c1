"""Prints one answer while it is decoded: its text, or its text with the drafts in it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from kangaroo_jax.engine.draft_spans import DraftSpans, Kind, Span
from kangaroo_jax.engine.requests import Answer, Finished, Request, TextDelta

if TYPE_CHECKING:
    from kangaroo_jax.engine.engine import Engine

_COLOURS = {
    Kind.ACCEPTED: "\033[32m",
    Kind.LOOKED_UP: "\033[36m",
    Kind.REJECTED: "\033[9;31m",
    Kind.TARGET: "\033[1m",
}
_END_OF_COLOUR = "\033[0m"
_ON_ONE_LINE = str.maketrans({"\n": "\\n", "\r": "\\r"})
# As `git diff --word-diff` marks words.
_MARKERS = {
    Kind.ACCEPTED: ("{+", "+}"),
    Kind.LOOKED_UP: ("{=", "=}"),
    Kind.REJECTED: ("[-", "-]"),
    Kind.TARGET: ("", ""),
}


def stream(engine: Engine, request: Request, on_delta: Callable[[TextDelta], None]) -> Answer:
    """Decodes one request in an idle engine; calls `on_delta` with what is new, as it comes."""
    engine.add(request)
    while True:
        for event in engine.step():
            if isinstance(event, Finished):
                return event.answer
            on_delta(event)


class TextPrinter:
    """Prints an answer's text.

    Args:
      strip: whether white space at its beginning is left out.
    """

    def __init__(self, strip: bool = False):
        self._strip = strip

    def feed(self, delta: TextDelta) -> None:
        """Prints what is new."""
        self._write(self._stripped(delta.text))

    def finish(self, answer: Answer) -> None:
        """Prints the rest of an answer."""

    def interrupt(self) -> None:
        """Prints what ends a text that is not gone on with."""

    def _stripped(self, text: str) -> str:
        text = text.lstrip() if self._strip else text
        self._strip = self._strip and not text
        return text

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)


class DraftPrinter(TextPrinter):
    """Prints an answer's text with the drafts in it: in colours, or between markers where the terminal has none.

    Args:
      tokenizer: of the target.
      prompt: the request's token ids.
      strip: whether white space at its beginning is left out.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], strip: bool = False):
        super().__init__(strip)
        self._spans = DraftSpans(tokenizer, prompt)
        self._colours = has_colours()
        self._open: tuple[Kind, int] | None = None  # kind and round of the span that was printed last

    def feed(self, delta: TextDelta) -> None:
        self._show(self._spans.feed(delta))

    def finish(self, answer: Answer) -> None:
        self._show(self._spans.finish(answer))
        self.interrupt()

    def interrupt(self) -> None:
        self._write(self._close())

    def _show(self, spans: Sequence[Span]) -> None:
        shown = ""
        for span in spans:
            # What was rejected is on one line, whatever lines it would have had.
            rejected = span.kind is Kind.REJECTED
            text = span.text.translate(_ON_ONE_LINE) if rejected else self._stripped(span.text)
            if not text:
                continue
            if self._colours:
                shown += f"{_COLOURS[span.kind]}{text}{_END_OF_COLOUR}"
                continue
            if self._open != (span.kind, span.round):
                shown += self._close() + _MARKERS[span.kind][0]
                self._open = (span.kind, span.round)
            shown += text
        self._write(shown)

    def _close(self) -> str:
        closing = "" if self._open is None else _MARKERS[self._open[0]][1]
        self._open = None
        return closing


def legend(looks_up: bool = False) -> str:
    """What the colours or markers say, in one line; `looks_up`: whether there may be looked-up drafts."""
    names = {
        Kind.ACCEPTED: "drafted and accepted",
        **({Kind.LOOKED_UP: "looked up and accepted"} if looks_up else {}),
        Kind.REJECTED: "drafted and rejected",
        Kind.TARGET: "added by the target",
    }
    if has_colours():
        return ", ".join(f"{_COLOURS[kind]}{name}{_END_OF_COLOUR}" for kind, name in names.items())
    return ", ".join(_MARKERS[kind][0] + name + _MARKERS[kind][1] for kind, name in names.items())


def has_colours() -> bool:
    """Whether standard output is a terminal with colours that the user wants (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
