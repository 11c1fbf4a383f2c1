"""Several processes as one run: joining them before JAX's first use of a device."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from typing import NoReturn

import jax

from kangaroo_jax.errors import InputError, MachineError

# JAX gives each task of a cluster job one GPU, even where the job has a single task. That task keeps all its GPUs.
_TASK_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Long enough for the slowest process to write the last checkpoint; the others wait as long for one that failed.
_LIMITS = {"shutdown_timeout_seconds": 60}


def initialize(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    timeout: float = 300.0,
    on_timeout: Callable[[str], NoReturn] | None = None,
    patience: float = 10.0,
    on_wait: Callable[[str], None] | None = None,
) -> None:
    """Joins the processes of a run: those that the arguments describe, or, without arguments, those of the cluster that
    JAX detects (TPU pod, Slurm, GKE, Open MPI). Does nothing where no cluster is detected. Must be called before JAX is
    asked for its devices.

    Args:
      coordinator: HOST:PORT that process 0 listens on.
      process_id: number of this process, from 0 to num_processes - 1.
      num_processes: number of processes in the run. 1, with the other two absent, keeps this process to itself in any
        cluster.
      timeout: seconds to wait for the other processes.
      on_timeout: called from another thread with one line about who is missing; must end the process. JAX itself aborts
        the process with a C++ stack trace and raises nothing, which is what happens where this is None.
      patience: seconds after which `on_wait` is called.
      on_wait: called from another thread with one line about what is waited for.

    Raises:
      InputError: for arguments that are incomplete or out of range.
      MachineError: for a port that is taken, or a cluster that is detected but cannot be joined.
    """
    if (coordinator, process_id, num_processes) == (None, None, None):
        if any(os.environ.get(name) == "1" for name in _TASK_COUNTS):
            return
        missing = f"the cluster's other processes could not be reached within {timeout:.0f} s; look at their logs"
        waiting = (
            f"waiting up to {timeout:.0f} s for the other processes of {_detected()}; to run this process alone, give "
            "num_processes 1"
        )
        watch = _Watch(timeout, on_timeout, missing, patience, on_wait, waiting)
        try:
            with watch:
                jax.distributed.initialize(initialization_timeout=watch.jax_timeout, **_LIMITS)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):  # JAX's answer where it detects no cluster
                raise _detection_failed(error) from None
        except Exception as error:  # detection asks metadata servers and Kubernetes: errors of many libraries
            raise _detection_failed(error) from None
        return
    if (coordinator, process_id, num_processes) == (None, None, 1):
        return
    _check(coordinator, process_id, num_processes)
    if process_id == 0:
        _check_port_is_free(coordinator)
        missing = (
            f"not all {num_processes} processes reached the coordinator {coordinator} within {timeout:.0f} s; "
            "start the others, and check that they can reach this machine at that address"
        )
    else:
        missing = (
            f"process 0 was not reached at the coordinator's address {coordinator} within {timeout:.0f} s; "
            "check that it runs, the address, and the firewall"
        )
    waiting = f"waiting up to {timeout:.0f} s for all {num_processes} processes to meet at {coordinator}"
    watch = _Watch(timeout, on_timeout, missing, patience, on_wait, waiting)
    try:
        with watch:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                cluster_detection_method="deactivate",  # everything is given
                initialization_timeout=watch.jax_timeout,
                **_LIMITS,
            )
    except RuntimeError as error:
        raise MachineError(f"coordinator {coordinator}: {error}") from None


def _check(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; coordinator, process_id and num_processes go together")
    if num_processes < 1:
        raise InputError(f"num_processes: expected 1 or more, found {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError(f"process_id: expected 0 to {num_processes - 1}, found {process_id}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"coordinator: expected HOST:PORT, found {coordinator!r}")


def _check_port_is_free(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:  # JAX's service crashes without a message where the port is taken
        with socket.create_server(("", port), reuse_port=False):
            pass
    except OSError as error:
        raise MachineError(f"coordinator: port {port} cannot be used here ({error.strerror}); name another") from None


def _detected() -> str:
    """The cluster that JAX looks for the processes of, in words."""
    for name in _TASK_COUNTS:
        if name in os.environ:
            return f"a job of {os.environ[name]} tasks ({name})"
    return "the cluster that JAX detected"


def _detection_failed(error: Exception) -> MachineError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MachineError(
        f"JAX detected a cluster but could not join it ({reason}); give coordinator, process_id and num_processes, or "
        "num_processes 1 alone to run on this machine alone"
    )


class _Watch:
    """Calls `on_wait` and then `on_timeout` from another thread unless left in time: the main thread is inside JAX,
    which does not come back. JAX's own limit is then twice as long, so that it does not abort the process first."""

    def __init__(
        self,
        timeout: float,
        on_timeout: Callable[[str], NoReturn] | None,
        missing: str,
        patience: float,
        on_wait: Callable[[str], None] | None,
        waiting: str,
    ):
        self.jax_timeout = int(timeout if on_timeout is None else 2 * timeout)
        self._timers = []
        for seconds, function, message in ((patience, on_wait, waiting), (timeout, on_timeout, missing)):
            if function is not None:
                self._timers.append(threading.Timer(seconds, function, [message]))
                self._timers[-1].daemon = True

    def __enter__(self) -> None:
        for timer in self._timers:
            timer.start()

    def __exit__(self, *_: object) -> None:
        for timer in self._timers:
            timer.cancel()
