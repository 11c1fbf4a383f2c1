"""Tensors that a family's files hold joined along their first axis, as the single ones that they are made of."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kangaroo_jax.checkpoint.weights import Pieces, Weights
from kangaroo_jax.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def split_fused(weights: Weights, fused: Mapping[str, tuple[str, ...]], expected: Shapes) -> Weights:
    """The same weights with the parts of each fused tensor in its place; they are views, read where they are.

    Args:
      weights: of a checkpoint.
      fused: as `Family.fused`.
      expected: tensor name -> shape, of the single ones.

    Raises:
      InputError: for a fused tensor of a wrong shape.
    """
    places: dict[str, tuple[str, int]] = {}  # part -> fused tensor, and its first row there
    found = dict(weights.found)
    for name, parts in _groups(fused, expected).items():
        if name not in found:
            continue
        shape, dtype = found.pop(name)
        rows = sum(expected[part][0] for part in parts)
        if shape != (rows, *expected[parts[0]][1:]):
            raise InputError(
                f"{weights.files[name]}: tensor {name} has the wrong shape; "
                f"expected {[rows, *expected[parts[0]][1:]]}, found {list(shape)}"
            )
        first = 0
        for part in parts:
            places[part] = name, first
            found[part] = expected[part], dtype
            first += expected[part][0]

    def read(name: str, pieces: Pieces) -> np.ndarray:
        if name not in places:
            return weights.read(name, pieces)
        stored, first = places[name]
        size = found[name][0][0]
        moved = []
        for rows, *columns in pieces:
            start, stop, _ = rows.indices(size)
            moved.append((slice(first + start, first + stop), *columns))
        return weights.read(stored, tuple(moved))

    files = {name: weights.files[places[name][0] if name in places else name] for name in found}
    return Weights(found, files, read, weights.int8)  # by the names of the file, so that no part of a tensor is in it


def join_fused(tensors: dict[str, np.ndarray], fused: Mapping[str, tuple[str, ...]]) -> dict[str, np.ndarray]:
    """The inverse of `split_fused`, of tensors in memory."""
    joined = dict(tensors)
    for name, parts in _groups(fused, {name: x.shape for name, x in tensors.items()}).items():
        joined[name] = np.concatenate([joined.pop(part) for part in parts])
    return joined


def _groups(fused: Mapping[str, tuple[str, ...]], single: Shapes) -> dict[str, list[str]]:
    """Fused tensor -> the single ones that it is made of, in order."""
    groups = {}
    for name in single:
        for joined, parts in fused.items():
            if name.endswith(f".{parts[0]}.weight"):
                prefix = name.removesuffix(f"{parts[0]}.weight")
                groups[f"{prefix}{joined}.weight"] = [f"{prefix}{part}.weight" for part in parts]
    return groups
