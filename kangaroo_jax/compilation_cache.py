"""JAX's persistent compilation cache, which the commands use."""

from __future__ import annotations

import jax

from kangaroo_jax import paths


def enable() -> None:
    """Keeps compiled programs between runs, in the user's cache folder unless `JAX_COMPILATION_CACHE_DIR` or the caller
    named another; not where no home folder is known."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = paths.cache_folder()
        if folder is not None:
            jax.config.update("jax_compilation_cache_dir", str(folder))
