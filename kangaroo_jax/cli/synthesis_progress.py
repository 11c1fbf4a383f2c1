"""What a run that synthesizes data shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

import tqdm

from kangaroo_jax.data.synthesize.run import Tally

_LINE_SECONDS = 30.0


class SynthesisProgress:
    """Shows how far `write_records` is, on standard error; a context manager."""

    def __init__(self) -> None:
        self._bar: tqdm.tqdm | None = None
        self._shown = time.monotonic()

    def __enter__(self) -> SynthesisProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, tally: Tally) -> None:
        """After each record, and once before the first."""
        if tally.before == tally.wanted:
            return
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = tqdm.tqdm(total=tally.wanted, initial=tally.records, unit=" records", dynamic_ncols=True)
            self._bar.set_postfix_str(self._rates(tally), refresh=False)
            self._bar.update(tally.records - self._bar.n)
            if tally.records == tally.wanted:
                self._bar.close()
        elif time.monotonic() > self._shown + _LINE_SECONDS:
            self._shown = time.monotonic()
            print(f"{tally.records} of {tally.wanted} records, {self._rates(tally)}", file=sys.stderr, flush=True)

    def dropped(self, tally: Tally) -> str:
        """What was left out, by reason."""
        return ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common()) or "none"

    def _rates(self, tally: Tally) -> str:
        return f"{tally.tokens_per_second:.1f} tokens/s, left out: {self.dropped(tally)}"
