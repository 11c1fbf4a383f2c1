"""A safetensors file in a bucket, of which parts of tensors are read by range requests.

The format (https://github.com/huggingface/safetensors#format): 8 bytes, the length of the header (little-endian); the
header, JSON of tensor name -> dtype, shape, and [start, stop) in what follows; the values, row by row. The safetensors
library reads files alone.
"""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np

from kangaroo_jax import json_text
from kangaroo_jax.buckets import Bucket
from kangaroo_jax.checks import is_integer
from kangaroo_jax.errors import InputError, one_line

# As safetensors spells them. ml_dtypes gives numpy the bfloat16 that safetensors asks it for.
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_LENGTH = 8  # bytes of the header's length
_LONGEST_HEADER = 100_000_000  # as in the safetensors library
_REQUEST = 32 << 20  # bytes asked for at a time; several requests are under way together


class RemoteSafetensors:
    """The tensors of a file; its header is read at once.

    Args:
      bucket: the folder.
      name: of the file.
      size: of the file, in bytes.

    Raises:
      InputError: for a file that is damaged or no such file, and as `Bucket`.
    """

    def __init__(self, bucket: Bucket, name: str, size: int):
        self._bucket, self._name = bucket, name
        length = self._bytes(0, min(size, _LENGTH))
        stop = _LENGTH + int.from_bytes(length, "little")
        if len(length) < _LENGTH or stop > min(size, _LONGEST_HEADER):
            raise self._damaged("its header is cut")
        try:
            header = json_text.parse(self._bytes(_LENGTH, stop))
        except ValueError as error:
            raise self._damaged(one_line(error)) from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no object")
        header.pop("__metadata__", None)
        self._tensors: dict[str, tuple[tuple[int, ...], str, int]] = {}  # shape, dtype, place in the file
        for tensor, about in header.items():
            self._tensors[tensor] = self._described(tensor, about, stop, size)

    def names(self) -> list[str]:
        return list(self._tensors)

    def describe(self, tensor: str) -> tuple[tuple[int, ...], str]:
        """Shape, and dtype as safetensors spells it."""
        return self._tensors[tensor][:2]

    def read(self, tensor: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor. Its rows (along the first axis) are read in full, and no others."""
        shape, dtype, start = self._tensors[tensor]
        kind = np.dtype(DTYPES[dtype])
        if not shape:
            return np.frombuffer(self._bytes(start, start + kind.itemsize), kind).reshape(())
        first, last, _ = index[0].indices(shape[0])
        row = math.prod(shape[1:]) * kind.itemsize
        content = self._bytes(start + first * row, start + max(first, last) * row)
        rows = np.frombuffer(content, kind).reshape(-1, *shape[1:])
        return rows[(slice(None), *index[1:])]

    def _described(self, tensor: str, about: Any, start: int, size: int) -> tuple[tuple[int, ...], str, int]:
        about = about if isinstance(about, dict) else {}
        dtype, shape, place = about.get("dtype"), about.get("shape"), about.get("data_offsets")
        numbers = [*shape, *place] if isinstance(shape, list) and isinstance(place, list) else [None]
        if not isinstance(dtype, str) or not all(is_integer(x) and x >= 0 for x in numbers) or len(place) != 2:
            raise self._damaged(f"of tensor {tensor} its header says {about!r:.60}")
        begin, end = place
        wrong = dtype in DTYPES and end - begin != math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if wrong or not begin <= end <= size - start:
            raise self._damaged(f"tensor {tensor} is not where its header says")
        return tuple(shape), dtype, start + begin

    def _bytes(self, start: int, stop: int) -> bytes:
        ranges = [(at, min(at + _REQUEST, stop)) for at in range(start, stop, _REQUEST)]
        try:
            parts = self._bucket.read_ranges(self._name, ranges)
        except FileNotFoundError:
            raise InputError(f"{self._bucket}/{self._name}: no such object; upload the checkpoint again") from None
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _damaged(self, reason: str) -> InputError:
        return InputError(
            f"{self._bucket}/{self._name}: truncated or not a safetensors file ({reason}); upload it again"
        )
