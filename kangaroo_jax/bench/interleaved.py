"""Calls timed in turns, so that a machine that slows down slows all of them alike."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from jaxtyping import Float

from kangaroo_jax.bench.progress import Progress, silent

Input = TypeVar("Input")
Output = TypeVar("Output")


@dataclasses.dataclass(frozen=True)
class Timings(Generic[Output]):
    """What calls gave, and how long they took.

    Attributes:
      outputs: [call][input], of the run that is not timed.
      seconds: medians over the timed runs.
    """

    outputs: list[list[Output]]
    seconds: Float[np.ndarray, "calls inputs"]


def time_interleaved(
    calls: Sequence[Callable[[Input], Output]],
    inputs: Sequence[Input],
    runs: int,
    seconds_of: Callable[[Output], float],
    progress: Progress = silent,
    description: str = "measuring",
) -> Timings[Output]:
    """Runs every call on every input once without timing it (it may compile), then `runs` times.

    Args:
      calls: functions of one input.
      inputs: prompts, say.
      runs: timed runs of each call on each input; in each, every call has its turn.
      seconds_of: what an output says it took.
      progress: shows how many inputs are done.
      description: what `progress` calls this.
    """
    outputs: list[list[Output]] = [[] for _ in calls]
    seconds = np.zeros((len(calls), len(inputs)))
    for place, value in enumerate(progress(inputs, description, "prompt")):
        times: list[list[float]] = [[] for _ in calls]
        for run in range(1 + runs):
            for call, found, timed in zip(calls, outputs, times, strict=True):
                output = call(value)
                if run == 0:
                    found.append(output)
                else:
                    timed.append(seconds_of(output))
        seconds[:, place] = [statistics.median(timed) for timed in times]
    return Timings(outputs, seconds)
