"""Which devices JAX looks for, where looking for a TPU would only print errors."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping

# JAX sets it itself while it is imported, on every machine without TPU chips.
_SET_BY_JAX = ("TPU_SKIP_MDS_QUERY",)
_TPU_DEVICES = ("accel*", "vfio/*")
_GPU_DEVICES = ("nvidia*", "dxg", "kfd")


def skip_missing_tpu() -> None:
    """Keeps JAX to the CPU where libtpu is installed but there is no TPU: JAX would load libtpu, which prints errors
    about the missing TPU before the command's own output. Takes effect before JAX is asked for its devices."""
    if not _tpu_is_missing(os.environ, pathlib.Path("/dev")):
        return
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when JAX is imported
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def _tpu_is_missing(environment: Mapping[str, str], devices: pathlib.Path) -> bool:
    """Whether libtpu is installed for nothing. False in doubt: where the user chose platforms, where a variable speaks
    of a TPU, and where a GPU may be, which JAX should look for."""
    if importlib.util.find_spec("libtpu") is None or environment.get("JAX_PLATFORMS"):
        return False
    if any(name.startswith(("TPU_", "JAX_FORCE_TPU")) and name not in _SET_BY_JAX for name in environment):
        return False
    return not any(any(devices.glob(pattern)) for pattern in (*_TPU_DEVICES, *_GPU_DEVICES))
