"""What a long run over a file of prompts shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

import tqdm

from kangaroo_jax.engine.answer_prompts import Tally

_LINE_SECONDS = 30.0


class Progress:
    """Shows how far `answer_prompts` is, on standard error; a context manager.

    Args:
      output: the file of answers, which is named after Ctrl-C.
    """

    def __init__(self, output: str) -> None:
        self._output, self._done = output, 0
        self._bar: tqdm.tqdm | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            self.say(f"{self._done} answers are in {self._output}; the same command does the rest")
        if self._bar is not None:
            self._bar.close()

    def show(self, tally: Tally) -> None:
        """After each prompt, and once before the first."""
        self._done = tally.before + tally.prompts
        done = self._done + tally.errors
        rates = f"{tally.tokens_per_second:.1f} tokens/s, mean accept length {tally.mean_accept_length:.2f}"
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm.tqdm(total=tally.total, initial=done, unit=" prompts", dynamic_ncols=True)
            self._bar.set_postfix_str(rates, refresh=False)
            self._bar.update(done - self._bar.n)
        elif time.monotonic() > self._shown + _LINE_SECONDS:
            self._shown = time.monotonic()
            self.say(f"{done} of {tally.total} prompts, {rates}")

    def say(self, message: str) -> None:
        """A line of its own."""
        line = " ".join(message.split())
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)
