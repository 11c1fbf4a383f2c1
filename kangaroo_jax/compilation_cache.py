"""JAX's persistent compilation cache, which the commands use."""

from __future__ import annotations

import os
import pathlib

import jax


def enable() -> None:
    """Keeps compiled programs between runs, in the user's cache folder unless `JAX_COMPILATION_CACHE_DIR` or the caller
    named another."""
    if jax.config.jax_compilation_cache_dir is None:
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "kangaroo_jax"))
