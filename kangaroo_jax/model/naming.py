"""Names of parameters: the keys of checkpoints and of the table of partitions."""

from __future__ import annotations

import re

import jax
from jaxtyping import PyTree


def parameter_paths(module: PyTree) -> list[str]:
    """Dotted names of a module's parameters, in the order of its leaves."""
    paths = (jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(module))
    return [re.sub(r"\.value(?=\.|$)", "", path) for path in paths]
