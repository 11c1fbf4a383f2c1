"""The machines that a preflight compiles for: TPUs and NVIDIA GPUs that need not be attached, and this one."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from kangaroo_jax.errors import InputError, MachineError, one_line
from kangaroo_jax.preflight.gpus import GPUS, Gpu, target_config

LOCAL = "local"
_GIB = 2**30
_TPUS = ("v5e", "v5p", "v6e", "tpu7x")
_PER_HOST = 8  # GPUs


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one device can do, by its maker's figures, and what is known to keep programs from it.

    Attributes:
      bandwidth: bytes per second from its memory.
      products: dtype -> floating-point operations per second of matrix products.
      share: of the bandwidth that programs reach.
      launch: seconds that starting a kernel takes beside its work.
      turn: seconds that each turn of a loop inside a round takes the host.
      clock: cycles per second of the compiler's estimates; None where it makes none, or the clock is not known.
    """

    bandwidth: float
    products: dict[str, float]
    share: float = 1.0
    launch: float = 0.0
    turn: float = 0.0
    clock: float | None = None


# JAX computes a float32 product on a TPU, at the precision that decoding asks for, as six of bfloat16.
def _tpu(bandwidth: float, products: float, clock: float | None = None) -> Limits:
    kinds = {"bfloat16": products, "float16": products, "float32": products / 6}
    return Limits(bandwidth, kinds, clock=clock)


# Memory of one device in GiB and its limits, as the runtime counts devices (a TPU7x chip is two). From Google's pages
# on each (docs.cloud.google.com/tpu/docs); the clock of v5e follows from its peak and its four units of 128 x 128.
_TPU_FACTS = {
    "TPU v5 lite": (16, _tpu(819e9, 197e12, clock=1.5e9)),
    "TPU v5": (95, _tpu(2765e9, 459e12)),
    "TPU v6 lite": (32, _tpu(1638e9, 918e12)),
    "TPU7x": (96, _tpu(7380e9 / 2, 2307e12 / 2)),
}
# The share is that of copies on an H200; the others were fitted to plain steps and rounds that ran on an H100 and an
# H200 (docs/preflight.md has the comparison).
_GPU_OVERHEADS = {"share": 0.87, "launch": 1.9e-6, "turn": 0.17e-3}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine a preflight compiles for.

    Attributes:
      name: as the user gave it.
      devices: make the mesh; they need not be attached. Of a TPU7x, a chip is two.
      memory: bytes per device; None where it is not known.
      limits: of each device; None where they are not known.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None
    limits: Limits | None = None

    def __str__(self) -> str:
        return f"{self.name} ({len(self.devices)} x {self.devices[0].device_kind})"

    @property
    def platform(self) -> str:
        """Of its devices: cpu, gpu or tpu."""
        return self.devices[0].platform


def find_machine(name: str) -> Machine:
    """The machine called `name`: local, a TPU topology such as v5e:4x4, or GPUs such as h100:8. Must be called before
    JAX is asked for its devices.

    Raises:
      InputError: for a name of no machine.
      MachineError: for a TPU or GPU whose compiler is not installed, or does not load.
    """
    kind, colon, shape = name.partition(":")
    if name == LOCAL:
        return _local()
    if kind in GPUS and (not colon or re.fullmatch(r"[1-9]\d*", shape)):
        return _gpus(name, GPUS[kind], int(shape or 1))
    if kind in _TPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        return _tpus(name, [int(x) for x in shape.split("x")])
    raise InputError(
        f"preflight {name}: expected local, GPUs ({', '.join(GPUS)}; with their number where there are several, such "
        f"as h100:8), or a TPU topology: one of {', '.join(_TPUS)}, a colon and the chips along each axis, such as "
        "v5e:4x4 or v5p:2x2x2"
    )


def _local() -> Machine:
    devices = jax.devices()
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None and devices[0].platform == "cpu":  # the host's memory, shared by its devices
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
    return Machine(LOCAL, devices, limit)


def _tpus(name: str, chips: list[int]) -> Machine:
    if importlib.util.find_spec("libtpu") is None:
        raise MachineError(f"preflight {name} needs the TPU compiler (no TPU): pip install -e '.[preflight]'")
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on a device
    # Without these, libtpu looks for a TPU and prints a page of errors that there is none.
    for variable, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for TPUs: several preflights may run at once
    }.items():
        os.environ.setdefault(variable, value)
    small = {} if max(chips) > 1 else {"chips_per_host_bounds": [1, 1, 1]}  # the default is several chips per host
    try:
        devices = topologies.get_topology_desc(name, "tpu", **small).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = one_line(error)
        if "INVALID_ARGUMENT" not in reason:
            raise MachineError(f"preflight {name}: TPU's compiler could not be loaded ({reason})") from None
        raise InputError(f"preflight {name}: no such topology ({reason})") from None
    memory, limits = _TPU_FACTS[devices[0].device_kind]
    return Machine(name, devices, memory * _GIB, limits)


def _gpus(name: str, gpu: Gpu, count: int) -> Machine:
    if count > _PER_HOST and count % _PER_HOST:
        raise InputError(
            f"preflight {name}: expected at most {_PER_HOST} GPUs, or a multiple of {_PER_HOST}: full hosts"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise MachineError(f"preflight {name} needs the GPU compiler (no GPU): pip install -e '.[preflight-cuda]'")
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on a device
    hosts = -(-count // _PER_HOST)
    topology = f"1x{hosts}x{count // hosts}"  # slices, hosts of each, devices of each
    try:
        devices = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(gpu), topology=topology
        ).devices
    except RuntimeError as error:  # and what derives from it: JaxRuntimeError, NotImplementedError
        raise MachineError(f"preflight {name}: the GPU compiler could not be loaded ({one_line(error)})") from None
    kinds = {"bfloat16": gpu.products, "float16": gpu.products, "float32": gpu.float32_products}
    return Machine(name, devices, gpu.memory, Limits(gpu.bandwidth, kinds, **_GPU_OVERHEADS))
