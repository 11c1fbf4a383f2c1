"""Handles SIGTERM, which preempted machines receive."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
    """A context in which SIGTERM does not end the process, however often it comes.

    Yields:
      A function of the step number, to be called after every step: whether to save and stop now. Several processes
      all stop after the same step, whichever of them received the signal.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point  # JAX has handled the signal since distributed.initialize
        return
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
