"""Several processes as one run: the flags, and joining them before JAX's first use of a device."""

from __future__ import annotations

import os
import socket
import sys
import threading
from typing import NoReturn

import jax
from absl import flags

from kangaroo_jax.errors import InputError, MachineError

_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT that process 0 listens on. With --process_id and --num_processes, for machines that are no TPU pod, "
    "Slurm, GKE or Open MPI job; there, all three are found out.",
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process: 0 to num_processes - 1.")
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Of the run. 1 alone: this process by itself, whatever cluster it is in."
)

# JAX gives each task of these one GPU, also where there is but one task: that one keeps all its GPUs.
_TASK_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Long enough for the slowest to write the last checkpoint; others wait as long for one that failed.
_LIMITS = {"shutdown_timeout_seconds": 60}


def initialize(command: str, timeout: float = 300.0) -> None:
    """Joins the processes of a run, from the flags where they are given, else where JAX detects a cluster (TPU pod,
    Slurm, GKE, Open MPI). Anywhere else it does nothing. Must come before anything that asks JAX for its devices.

    Args:
      command: its name, for the message below.
      timeout: seconds. Where the others cannot be reached by then, prints one line and exits with code 1: JAX would
        abort the process.

    Raises:
      InputError: for flags that are incomplete or out of range.
      MachineError: for a port that is taken, or a cluster that is detected but does not say enough of itself.
    """
    coordinator, process_id, num_processes = _COORDINATOR.value, _PROCESS_ID.value, _NUM_PROCESSES.value
    if (coordinator, process_id, num_processes) == (None, None, None):
        if any(os.environ.get(name) == "1" for name in _TASK_COUNTS):
            return
        give_up = f"the cluster's other processes could not be reached within {timeout:.0f} s; look at their logs"
        watch = _watch(command, timeout, give_up)
        try:
            jax.distributed.initialize(initialization_timeout=int(2 * timeout), **_LIMITS)
        except ValueError as error:
            if "coordinator_address should be defined" not in str(error):  # JAX's answer where there is no cluster
                raise _detection_failed(error) from None
        except Exception as error:  # metadata servers, Kubernetes: errors of many libraries
            raise _detection_failed(error) from None
        finally:
            watch.cancel()
        return
    if (coordinator, process_id, num_processes) == (None, None, 1):
        return
    _check_flags(coordinator, process_id, num_processes)
    if process_id == 0:
        _check_port_is_free(coordinator)
        missing = f"not all {num_processes} processes reached --coordinator={coordinator} within {timeout:.0f} s"
        mend = "start the others, and check that they can reach this machine at that address"
    else:
        missing = f"process 0 was not reached at --coordinator={coordinator} within {timeout:.0f} s"
        mend = "check that it runs, the address, and the firewall"
    watch = _watch(command, timeout, f"{missing}; {mend}")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",  # the flags are given: nothing is to be found out
            initialization_timeout=int(2 * timeout),
            **_LIMITS,
        )
    except RuntimeError as error:
        raise MachineError(f"--coordinator={coordinator}: {error}") from None
    finally:
        watch.cancel()


def _check_flags(coordinator: str | None, process_id: int | None, num_processes: int | None) -> None:
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if missing:
        raise InputError(f"{', '.join(missing)} missing; --coordinator, --process_id and --num_processes go together")
    if num_processes < 1:
        raise InputError(f"--num_processes: expected 1 or more, found {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError(f"--process_id: expected 0 to {num_processes - 1}, found {process_id}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")


def _check_port_is_free(coordinator: str) -> None:
    port = int(coordinator.rpartition(":")[2])
    try:  # JAX's service would crash without a word
        with socket.create_server(("", port), reuse_port=False):
            pass
    except OSError as error:
        raise MachineError(f"--coordinator: port {port} cannot be used here ({error.strerror}); name another") from None


def _detection_failed(error: Exception) -> MachineError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return MachineError(
        f"JAX detected a cluster but could not join it ({reason}); give --coordinator, --process_id and "
        "--num_processes, or --num_processes=1 to run on this machine alone"
    )


def _watch(command: str, timeout: float, message: str) -> threading.Timer:
    """Ends the process with one line unless cancelled in time."""

    def end() -> NoReturn:
        print(f"{command}: error: {message}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is inside JAX

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    return timer
