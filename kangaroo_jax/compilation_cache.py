"""JAX's persistent compilation cache, on by default in the scripts."""

from __future__ import annotations

import os
import pathlib

import jax


def enable() -> None:
    """Keeps compiled programs between runs, in `JAX_COMPILATION_CACHE_DIR` or the user's cache folder."""
    if jax.config.jax_compilation_cache_dir is None:  # else the environment or the caller has set it
        root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(root / "kangaroo_jax"))
