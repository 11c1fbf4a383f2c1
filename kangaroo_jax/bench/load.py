"""What loading a target costs each process: bytes read, seconds, and the peak of its host memory.

python -m kangaroo_jax.bench load --model=FOLDER --fsdp=-1
"""

from __future__ import annotations

import pathlib
import time

import jax
from absl import flags

from kangaroo_jax import load_target
from kangaroo_jax.cli import process_flags
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.model import sharding

_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Of the weights.")
_FSDP = flags.DEFINE_integer("fsdp", -1, "Devices that each weight is stored apart on; -1 is the rest.")
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that each layer is split over.")


def main() -> None:
    if _MODEL.value is None:
        raise InputError("--model is missing; give a folder in Hugging Face format, or a hub id")
    process_flags.join("bench load")
    mesh = sharding.make_mesh({"data": 1, "fsdp": _FSDP.value, "model": _MODEL_PARALLEL.value})
    before = _reset_peak()
    start = time.perf_counter()
    target = load_target(_MODEL.value, _DTYPE.value, mesh)
    seconds = time.perf_counter() - start
    peak = _status("VmHWM") - before
    leaves = jax.tree.leaves(target.model)
    whole = sum(x.nbytes for x in leaves)
    # Each array's parts on this process's devices.
    held = sum(part.data.nbytes for x in leaves for part in x.addressable_shards)
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {len(jax.local_devices())} of {jax.device_count()} "
        f"devices: read {target.bytes_read / 1e6:.1f} MB in {seconds:.1f} s; its devices hold {held / 1e6:.1f} MB of "
        f"{whole / 1e6:.1f} MB; its host memory grew by at most {peak / 1e6:.1f} MB"
        + (", which its devices' is part of" if jax.default_backend() == "cpu" else "")
    )


def _reset_peak() -> int:
    """Starts the peak of the process's memory anew; what it has now, in bytes."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        raise MachineError(f"peak memory is read from Linux's /proc ({error.strerror})") from None
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))) * 1024
