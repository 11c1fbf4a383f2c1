"""The demo's text: the Python standard library's own sources, which every user of this project already has."""

from __future__ import annotations

import hashlib
import pathlib
import sysconfig

# Tests are not installed everywhere; encodings/ is generated tables.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload", "encodings"}


def is_held_out(module: str) -> bool:
    """Whether a top-level module or package of the standard library is kept for evaluation: one in sixteen, by the
    SHA-256 of its name, so the split is the same for every Python version and machine."""
    return hashlib.sha256(module.encode()).digest()[0] < 16


def standard_library(held_out: bool) -> dict[str, str]:
    """Path (relative to the standard library) -> source text, of the training or the held-out modules, in sorted
    order."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    sources = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _LEFT_OUT.intersection(relative.parts) or relative.parts[0].startswith("config-"):
            continue
        if is_held_out(relative.parts[0].removesuffix(".py")) == held_out:
            sources[relative.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return sources
