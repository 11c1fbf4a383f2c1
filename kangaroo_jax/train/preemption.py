"""SIGTERM, by which machines that are taken away say so."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
    """While it is open, SIGTERM does not end the process.

    Yields:
      Whether to save and stop after a step, to be asked after every one. Of several processes, all are told so after
      the same step, whichever of them got the signal.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # JAX caught the signal from the start
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
