"""The processor of this machine."""

from __future__ import annotations

import functools
import platform


def name() -> str:
    """Its model, as the system calls it."""
    return _fields().get("model name") or platform.machine()


def vectors_are_avx2() -> bool:
    """Whether its widest vectors are AVX2's: an x86 processor without AVX-512."""
    features = _fields().get("flags", "").split()
    return "avx2" in features and "avx512f" not in features


@functools.cache
def _fields() -> dict[str, str]:
    """What Linux says of the first processor; nothing on other systems."""
    try:
        with open("/proc/cpuinfo") as file:
            first = file.read().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
