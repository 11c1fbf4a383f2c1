"""GGUF files (llama.cpp's format): the header, and the tensors by rows.

The header is read here and not with `gguf.GGUFReader`, which makes an array for every token and merge
(docs/dev/performance.md has what that takes). What the numbers of types mean, and how each is dequantised, is the
package's to say. The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
import struct
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from kangaroo_jax.errors import InputError

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_ALIGNMENT = 32  # of the tensors, in bytes, where general.alignment does not say otherwise
_MAX_DIMENSIONS = 4
_BAND = 1 << 20  # values that are dequantised at a time: enough to be fast, few enough that copies do not count

# What holds values, not blocks, by the name of its type here and in safetensors.
_PLAIN = {
    gguf.GGMLQuantizationType.F32: ("F32", np.dtype(np.float32)),
    gguf.GGMLQuantizationType.F16: ("F16", np.dtype(np.float16)),
    gguf.GGMLQuantizationType.BF16: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
_Q8_0 = np.dtype([("scale", "<f2"), ("values", "i1", 32)])


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """Where one tensor lies in a file, and how it is stored.

    Attributes:
      shape: row by row, as in numpy; GGUF counts dimensions the other way round.
      kind: type of its values or blocks.
      offset: of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int

    @property
    def row_bytes(self) -> int:
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // values * size

    @property
    def dtype(self) -> str:
        """Of its values, as safetensors spells it: blocks are dequantised to float32."""
        return _PLAIN[self.kind][0] if self.kind in _PLAIN else "F32"


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's header.

    Attributes:
      path: of the file.
      metadata: key -> number, flag, string, or list of these.
      tensors: by name.
    """

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of a tensor of one or two dimensions, in the file's own dtype, or dequantised to float32. A tensor of
        one dimension is one row."""
        tensor = self.tensors[name]
        columns = tensor.shape[-1]
        if tensor.kind in _PLAIN:
            return self._bytes(tensor, start, stop).view(_PLAIN[tensor.kind][1])
        values = np.empty((stop - start, columns), np.float32)
        band = max(1, _BAND // columns)
        for first in range(start, stop, band):
            last = min(first + band, stop)
            values[first - start : last - start] = gguf.dequantize(self._bytes(tensor, first, last), tensor.kind)
        return values

    def read_q8_0(self, name: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a matrix of Q8_0 as they are stored: int8 values, and the float16 scale of each 32 of a row's."""
        blocks = self._bytes(self.tensors[name], start, stop).reshape(stop - start, -1, _Q8_0.itemsize).view(_Q8_0)
        values = blocks["values"].reshape(stop - start, -1)
        return np.ascontiguousarray(values), blocks["scale"].reshape(stop - start, -1)

    def _bytes(self, tensor: GGUFTensor, start: int, stop: int) -> np.ndarray:
        size = tensor.row_bytes
        data = np.fromfile(self.path, np.uint8, (stop - start) * size, offset=tensor.offset + start * size)
        return data.reshape(stop - start, size)


def read_gguf(path: pathlib.Path) -> GGUFFile:
    """The header of a GGUF file; the tensors' values are not read yet.

    Raises:
      InputError: for a file that is truncated, damaged or one of several parts, and for what cannot be dequantised.
    """
    with _mapped(path) as data:
        reader = _Reader(path, data)
        tensor_count, metadata_count = reader.start()
        metadata = dict(reader.entry() for _ in range(metadata_count))
        if metadata.get("split.count") not in (None, 0, 1):
            raise InputError(
                f"{path}: is one of {metadata['split.count']} parts of a model; join them with llama.cpp's "
                "`llama-gguf-split --merge FIRST_PART OUTPUT.gguf` and give the result"
            )
        if not isinstance(metadata.get("general.architecture"), str):
            raise InputError(f"{path}: expected general.architecture in its metadata, found {len(metadata)} other keys")
        infos = [reader.tensor() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise InputError(f"{path}: general.alignment must be a positive integer, found {alignment!r}")
        begin = -(-reader.position // alignment) * alignment
        tensors = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise InputError(f"{path}: tensor {name} is there twice; the file is damaged, fetch it again")
            tensors[name] = tensor = GGUFTensor(shape, _kind(path, name, kind), begin + offset)
            if shape[-1] % gguf.GGML_QUANT_SIZES[tensor.kind][0]:
                raise InputError(f"{path}: tensor {name}: its rows of {shape[-1]} are no multiple of a block; damaged")
            end = tensor.offset + math.prod(shape[:-1]) * tensor.row_bytes
            if end > len(data):
                raise InputError(
                    f"{path}: truncated: tensor {name} ends at byte {end}, the file at {len(data)}; fetch it again"
                )
        return GGUFFile(path, metadata, tensors)


def _mapped(path: pathlib.Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise InputError(f"{path}: truncated: an empty file; fetch it again") from None


class _Reader:
    """Reads a header from its beginning to its end."""

    def __init__(self, path: pathlib.Path, data: mmap.mmap):
        self._path, self._data, self.position = path, data, 0

    def start(self) -> tuple[int, int]:
        """How many tensors and metadata entries there are."""
        if self._data[:4] != b"GGUF":
            raise InputError(f"{self._path}: not a GGUF file; it begins with {self._data[:4]!r}")
        self.position = 4
        version = self._unpack("<I")
        if version not in _VERSIONS:
            order = " (written on a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise InputError(
                f"{self._path}: GGUF version {version}{order} is not supported; supported: "
                f"{', '.join(map(str, _VERSIONS))}; convert the model again with a current llama.cpp"
            )
        return self._unpack("<Q"), self._unpack("<Q")

    def entry(self) -> tuple[str, Any]:
        return self._string(), self._value(self._unpack("<I"))

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, number of the type, and offset from the first tensor."""
        name, dimensions = self._string(), self._unpack("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._damaged(f"a tensor of {dimensions} dimensions")
        sizes = [self._unpack("<Q") for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self._unpack("<I"), self._unpack("<Q")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._unpack("<I"), self._unpack("<Q")
            if kind == _STRING:
                return [self._string() for _ in range(count)]
            if kind not in _NUMBERS:
                raise self._damaged(f"a list of the unknown type {kind}")
            dtype = np.dtype(_NUMBERS[kind])
            return np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        if kind not in _NUMBERS:
            raise self._damaged(f"a value of the unknown type {kind}")
        dtype = np.dtype(_NUMBERS[kind])
        value = np.frombuffer(self._take(dtype.itemsize), dtype)[0]
        # As it was written: 1e-5, not the nearest float32's 9.99999974e-06, so that constants equal config.json's.
        return float(str(value)) if dtype == np.float32 else value.item()

    def _string(self) -> str:
        try:
            return self._take(self._unpack("<Q")).decode("utf-8")
        except UnicodeDecodeError:
            raise self._damaged("a string that is not UTF-8") from None

    def _unpack(self, form: str) -> int:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, size: int) -> bytes:
        begin, self.position = self.position, self.position + size
        if self.position > len(self._data):
            raise InputError(
                f"{self._path}: truncated: its header goes on to byte {self.position} at least, the file ends at "
                f"{len(self._data)}; fetch it again"
            )
        return self._data[begin : self.position]

    def _damaged(self, found: str) -> InputError:
        return InputError(f"{self._path}: damaged: {found} near byte {self.position}; fetch it again")


def _kind(path: pathlib.Path, name: str, number: int) -> gguf.GGMLQuantizationType:
    """A tensor's type.

    Raises:
      InputError: for one that the gguf package does not dequantise.
    """
    try:
        kind = gguf.GGMLQuantizationType(number)
        if kind in _PLAIN or _can_dequantize(kind):
            return kind
        found = kind.name
    except ValueError:
        found = f"type {number}, which it does not know"
    supported = ", ".join(x.name for x in gguf.GGMLQuantizationType if x in _PLAIN or _can_dequantize(x))
    raise InputError(
        f"{path}: tensor {name} has an unsupported quantisation; expected one that the gguf package dequantises "
        f"({supported}), found {found}"
    )


def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
