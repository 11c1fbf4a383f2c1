"""The flags of runs over several processes."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from absl import flags

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT that process 0 listens on. Needed, with --process_id and --num_processes, for several processes outside "
    "TPU pods, Slurm, GKE and Open MPI, where all three are detected.",
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process: 0 to num_processes - 1.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes in the run. 1 alone: this process by itself, whatever cluster it is in."
)


def join(command: str, timeout: float = 300.0, patience: float = 10.0) -> None:
    """Joins the processes that the flags name, or those of the cluster that JAX detects. Where the others are not
    reached within `patience` seconds, prints one line about it; within `timeout` seconds, another, and ends the process
    with exit code 1.

    Raises:
      InputError, MachineError: as `distributed.initialize`.
    """
    from kangaroo_jax import distributed

    def end(message: str) -> NoReturn:
        print(f"{command}: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is inside JAX's C++ code: sys.exit would not reach it

    def say(message: str) -> None:
        print(f"{command}: {message}", file=sys.stderr, flush=True)

    distributed.initialize(
        _COORDINATOR.value,
        _PROCESS_ID.value,
        _NUM_PROCESSES.value,
        timeout=timeout,
        on_timeout=end,
        patience=patience,
        on_wait=say,
    )
