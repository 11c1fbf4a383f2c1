"""Shows a `Report` in a terminal or a log: lines on standard output, bars on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import tqdm

from kangaroo_jax.report import Bar


class TerminalReport:
    """A `Report`. Where standard error is a file or a pipe, a bar is a line now and then instead of a moving one."""

    def say(self, message: str) -> None:
        tqdm.tqdm.write(message)
        sys.stdout.flush()

    @contextlib.contextmanager
    def bar(self, description: str, total: float, unit: str = "", done: float = 0) -> Iterator[Bar]:
        share = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        with tqdm.tqdm(
            desc=description or None,
            total=total,
            initial=done,
            unit=unit,
            bar_format=None if unit else share,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        ) as bar:
            yield _TerminalBar(bar)


class _TerminalBar:
    def __init__(self, bar: tqdm.tqdm) -> None:
        self._bar = bar

    def show(self, done: float, note: str = "") -> None:
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        self._bar.update(done - self._bar.n)
