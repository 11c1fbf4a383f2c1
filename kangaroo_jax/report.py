"""How long work says what it does: it takes a `Report`, and the caller decides what is shown, and where."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Bar(Protocol):
    """How far a piece of work is."""

    def show(self, done: float, note: str = "") -> None:
        """`done` of the bar's total are done; `note` is a few words beside it."""


class Report(Protocol):
    """Takes what there is to say."""

    def say(self, message: str) -> None:
        """A line."""

    def bar(
        self, description: str, total: float, unit: str = "", done: float = 0
    ) -> contextlib.AbstractContextManager[Bar]:
        """A bar for a piece of work of `total` units, `done` of which were done before; without a unit, shares of
        `total` are all there is to show."""


class _NoBar:
    def show(self, done: float, note: str = "") -> None:
        pass


class _Silent:
    def say(self, message: str) -> None:
        pass

    @contextlib.contextmanager
    def bar(self, description: str, total: float, unit: str = "", done: float = 0) -> Iterator[Bar]:
        yield _NoBar()


SILENT: Report = _Silent()
