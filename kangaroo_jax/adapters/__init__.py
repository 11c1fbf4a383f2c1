"""Adapters that come with the package: folders that `save_adapter` wrote, here and beside the demo's target.

Each is found by the target that its metadata says it was trained for, so that adding one is adding its folder.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from kangaroo_jax import demo
from kangaroo_jax.checkpoint.adapter import is_for, is_for_checkpoint_of, is_for_shapes_of, read_metadata
from kangaroo_jax.checkpoint.target import Target


def folders() -> list[pathlib.Path]:
    """The adapters' folders."""
    here = pathlib.Path(__file__).parent
    return [demo.ADAPTER, *sorted(path.parent for path in here.glob("*/metadata"))]


def find(target: Target, among: Sequence[pathlib.Path] | None = None) -> pathlib.Path | None:
    """The folder of the adapter for a target: one that was trained for it, else for the same one in float weights or in
    int8, else for a target of the same shapes, such as the original of a fine-tune; None where there is none.

    Args:
      target: what the adapter is for.
      among: folders of adapters; those of `folders` by default.
    """
    all_metadata = {folder: read_metadata(folder) for folder in (folders() if among is None else among)}
    for fits in (is_for, is_for_checkpoint_of, is_for_shapes_of):
        for folder, metadata in all_metadata.items():
            if fits(metadata, target):
                return folder
    return None
