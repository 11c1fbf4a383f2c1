"""What loading a target costs each process: bytes read, seconds, and the peak of its host memory.

python -m kangaroo_jax.bench load --model=FOLDER --fsdp=-1
"""

from __future__ import annotations

import jax
from absl import flags

from kangaroo_jax.bench.load_cost import measure_load
from kangaroo_jax.cli import process_flags
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding

_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id. Required.")
_DTYPE = shared_flags.define_dtype(("float32", "bfloat16", "float16"), default="bfloat16")
_WEIGHTS = shared_flags.define_weights()
_FSDP = flags.DEFINE_integer("fsdp", -1, "Devices over which each weight is stored in parts; -1 is all that are left.")
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices over which each layer is split.")


def main() -> None:
    if _MODEL.value is None:
        raise InputError("--model is missing; give a folder in Hugging Face format, or a hub id")
    process_flags.join("bench load")
    mesh = sharding.make_mesh({"data": 1, "fsdp": _FSDP.value, "model": _MODEL_PARALLEL.value})
    cost = measure_load(_MODEL.value, _DTYPE.value, mesh, _WEIGHTS.value)
    print(
        f"process {jax.process_index()} of {jax.process_count()}, {len(jax.local_devices())} of {jax.device_count()} "
        f"devices: read {cost.bytes_read / 1e6:.1f} MB in {cost.seconds:.1f} s; its devices hold "
        f"{cost.bytes_on_devices / 1e6:.1f} MB of {cost.total_bytes / 1e6:.1f} MB; its host memory grew by at most "
        f"{cost.host_growth / 1e6:.1f} MB"
        + (", its devices' memory included" if jax.default_backend() == "cpu" else "")
    )
