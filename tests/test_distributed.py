"""Joining the processes of a run: flags, detected clusters, and what cannot be reached."""

import os
import socket
import subprocess
import sys

import pytest

_JOIN = """
import sys
from absl import app
from kangaroo_jax.cli import command_line, process_flags

def main():
    process_flags.join("join", timeout={timeout}, patience={patience})
    import jax
    print(jax.process_index(), jax.process_count(), len(jax.local_devices()), jax.device_count())

command_line.run("join", main, ["join", *sys.argv[1:]])
"""
_CLUSTER_VARIABLES = ("SLURM_", "OMPI_", "TPU_", "KUBERNETES_", "JAX_")


def _port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _start(*flags: str, timeout: float = 60, patience: float = 60, **environment: str) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_CLUSTER_VARIABLES)}
    clean |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.Popen(
        [sys.executable, "-c", _JOIN.format(timeout=timeout, patience=patience), *flags],
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out.strip(), err.strip()


def _slurm(task: int, tasks: int) -> dict[str, str]:
    # As srun sets them, one task a node.
    values = {"JOB_ID": "77", "STEP_NODELIST": "localhost", "NTASKS": tasks, "PROCID": task, "LOCALID": 0}
    return {f"SLURM_{name}": str(value) for name, value in values.items()}


@pytest.mark.long
def test_processes_join_by_flags_and_by_slurm_and_one_task_stays_alone():
    port = _port()
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    slurm = {"JAX_COORDINATOR_PORT": str(_port())}
    runs = [_start(*flags, f"--process_id={i}") for i in range(2)]
    runs += [_start(**_slurm(i, 2), **slurm) for i in range(2)]
    runs += [_start(), _start(**_slurm(0, 1)), _start("--num_processes=1", **_slurm(1, 2))]
    outcomes = [_outcome(run) for run in runs]
    assert [(code, out) for code, out, _ in outcomes] == [
        (0, "0 2 2 4"),
        (0, "1 2 2 4"),
        (0, "0 2 2 4"),
        (0, "1 2 2 4"),
        (0, "0 1 2 2"),
        (0, "0 1 2 2"),
        (0, "0 1 2 2"),
    ], outcomes


@pytest.mark.long
def test_what_cannot_be_reached_is_one_line_after_the_timeout():
    port = _port()
    with socket.create_server(("", 0)) as server:
        taken = server.getsockname()[1]
        alone = _start(f"--coordinator=localhost:{port}", "--process_id=0", "--num_processes=2", timeout=2)
        nobody = _start(f"--coordinator=localhost:{_port()}", "--process_id=1", "--num_processes=2", timeout=2)
        in_use = _start(f"--coordinator=localhost:{taken}", "--process_id=0", "--num_processes=2")
        # As in the shell of an allocation, whose tasks are not started.
        slurm = {"JAX_COORDINATOR_PORT": str(_port()), **_slurm(0, 4)}
        waiting = _start(timeout=3, patience=1, **slurm)
        outcomes = [_outcome(run) for run in (alone, nobody, in_use)]
    code, out, err = _outcome(waiting)
    said, last = err.splitlines()
    assert (code, out) == (1, "")
    assert said == (
        "join: waiting up to 3 s for the other processes of a job of 4 tasks (SLURM_NTASKS); to run this process "
        "alone, give num_processes 1"
    )
    assert "the cluster's other processes could not be reached within 3 s" in last
    expected = [
        f"not all 2 processes reached the coordinator localhost:{port} within 2 s",
        "process 0 was not reached at the coordinator's address localhost:",
        f"port {taken} cannot be used here",
    ]
    for (code, out, err), message in zip(outcomes, expected, strict=True):
        assert (code, out) == (1, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_wrong_flags_are_one_line():
    cases = {
        ("--coordinator=a:1",): "process_id, num_processes missing",
        ("--process_id=0", "--num_processes=2"): "coordinator missing",
        ("--coordinator=a:1", "--process_id=2", "--num_processes=2"): "process_id: expected 0 to 1, found 2",
        ("--coordinator=a", "--process_id=1", "--num_processes=2"): "coordinator: expected HOST:PORT, found 'a'",
    }
    runs = [_start(*flags) for flags in cases]
    for run, message in zip(runs, cases.values(), strict=True):
        code, out, err = _outcome(run)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
