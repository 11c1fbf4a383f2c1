"""What loading a target costs each process: bytes read, seconds, and the peak of its host memory."""

from __future__ import annotations

import dataclasses
import pathlib
import time

import jax

from kangaroo_jax import load_target
from kangaroo_jax.errors import MachineError


@dataclasses.dataclass(frozen=True)
class LoadCost:
    """Of this process.

    Attributes:
      bytes_read: from the checkpoint's files.
      seconds: wall-clock.
      bytes_on_devices: held by this process's devices.
      total_bytes: of the target's weights.
      host_growth: bytes by which the peak of the process's memory exceeds what it had before. On CPU, the devices'
        bytes are part of it.
    """

    bytes_read: int
    seconds: float
    bytes_on_devices: int
    total_bytes: int
    host_growth: int


def measure_load(model: str, dtype: str, mesh: jax.sharding.Mesh, weights: str = "float") -> LoadCost:
    """Loads a target over the devices of a mesh.

    Args:
      model: a folder in Hugging Face format, or a hub id.
      dtype: type of the weights.
      mesh: with axes data, fsdp and model.
      weights: as `load_target`.

    Raises:
      MachineError: where the system has no /proc.
    """
    before = _reset_peak()
    start = time.perf_counter()
    target = load_target(model, dtype, mesh, weights=weights)
    seconds = time.perf_counter() - start
    growth = _status_bytes("VmHWM") - before
    leaves = jax.tree.leaves(target.model)
    return LoadCost(
        target.bytes_read,
        seconds,
        sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards),
        sum(x.nbytes for x in leaves),
        growth,
    )


def _reset_peak() -> int:
    """Makes the kernel measure the peak of the process's memory from now on; returns what the process has now, in
    bytes."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise MachineError(f"peak memory is read from Linux's /proc ({error.strerror})") from None
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024
