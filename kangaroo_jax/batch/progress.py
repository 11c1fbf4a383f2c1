"""What a long run shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

import tqdm

_LINE_SECONDS = 30.0


class Progress:
    """Counts prompts, tokens and rounds; a context manager, on standard error.

    Attributes:
      prompts: done in this run.
      new_tokens: theirs.
      compile_seconds: of compilation, in no other figure.
    """

    def __init__(self, total: int, before: int):
        """`before` prompts of `total` were done by earlier runs."""
        self.prompts = self.new_tokens = 0
        self.compile_seconds = 0.0
        self._committed = self._rounds = 0
        self._total, self._before = total, before
        self._start = self._shown = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=total, initial=before, unit=" prompts", dynamic_ncols=True) if terminal else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        """Since the beginning, compilation apart."""
        return max(time.monotonic() - self._start - self.compile_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds

    @property
    def mean_accept_length(self) -> float:
        return self._committed / self._rounds if self._rounds else 1.0

    def add(self, new_tokens: int, accept_lengths: list[int], compile_seconds: float) -> None:
        """One more answer."""
        self.new_tokens += new_tokens
        self._committed += sum(accept_lengths)
        self._rounds += len(accept_lengths)
        self.compile_seconds += compile_seconds
        self._count()

    def fail(self, message: str) -> None:
        """One more prompt, that has an error in place of an answer."""
        self.say(message)
        self._count()

    def say(self, message: str) -> None:
        """A line of its own."""
        line = " ".join(message.split())
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def _count(self) -> None:
        self.prompts += 1
        rates = f"{self.tokens_per_second:.1f} tokens/s, mean accept length {self.mean_accept_length:.2f}"
        if self._bar is not None:
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update()
        elif time.monotonic() > self._shown + _LINE_SECONDS:
            self._shown = time.monotonic()
            self.say(f"{self._before + self.prompts} of {self._total} prompts, {rates}")
