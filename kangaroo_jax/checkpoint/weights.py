"""Files of tensors: safetensors and PyTorch, whole or in shards, read a part of a tensor at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kangaroo_jax.buckets import Copy
from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.checkpoint.remote_safetensors import DTYPES as DTYPES
from kangaroo_jax.checkpoint.remote_safetensors import RemoteSafetensors
from kangaroo_jax.errors import InputError, one_line

_TORCH_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}

Index = tuple[slice, ...]  # a part of an array: one slice per dimension, with start and stop
Pieces = tuple[Index, ...]  # parts to be joined along their first axis


@dataclasses.dataclass(frozen=True)
class Int8Blocks:
    """Matrices that a file holds in int8, with a scale for each few inputs of an output (a row).

    Attributes:
      sizes: tensor name -> inputs that share a scale.
      read: tensor name and complete rows of it -> values [rows, inputs] and scales [rows, inputs / size].
    """

    sizes: Mapping[str, int]
    read: Callable[[str, slice], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors.

    Attributes:
      found: tensor name -> shape, and dtype as safetensors spells it.
      files: tensor name -> file.
      read: tensor name and pieces of it -> those, joined.
      int8: those that can be read in int8 as well; None: none.
    """

    found: dict[str, tuple[tuple[int, ...], str]]
    files: dict[str, str]
    read: Callable[[str, Pieces], np.ndarray]
    int8: Int8Blocks | None = None


def open_weights(folder: pathlib.Path) -> Weights:
    """The weights in a checkpoint's folder; their values are not read yet.

    Raises:
      InputError: where there are none, a file is missing or damaged, or shards and their index disagree.
    """
    # In transformers' order of preference.
    for single, opener in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_torch)):
        index = folder / f"{single}.index.json"
        if (folder / single).exists():
            return _read_headers([folder / single], opener)
        if index.exists():
            weight_map = _weight_map(index, lambda shard: os.path.isfile(folder / shard))
            weights = _read_headers([folder / shard for shard in sorted(set(weight_map.values()))], opener)
            return _as_mapped(weights, weight_map, index)
    raise InputError(
        f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, or either's .index.json and shards"
    )


def open_bucket_weights(copied: Copy) -> Weights:
    """The weights in a checkpoint's folder in a bucket, of which `copied` has the small files.

    Raises:
      InputError: as `open_weights`, and for PyTorch files.
    """
    files: dict[pathlib.Path, RemoteSafetensors] = {}

    @contextlib.contextmanager
    def opener(path: pathlib.Path) -> Iterator[_TensorFile]:
        if path not in files:
            files[path] = RemoteSafetensors(copied.bucket, path.name, copied.sizes[path.name])
        yield _TensorFile(files[path].names, files[path].describe, files[path].read)

    single, index = "model.safetensors", copied.path / "model.safetensors.index.json"
    if single in copied.sizes:
        return _read_headers([copied.path / single], opener)
    if index.exists():
        weight_map = _weight_map(index, lambda shard: shard in copied.sizes)
        shards = sorted(set(weight_map.values()))
        return _as_mapped(_read_headers([copied.path / shard for shard in shards], opener), weight_map, index)
    raise InputError(
        f"{copied.bucket}: no weights; expected model.safetensors, or model.safetensors.index.json and shards "
        "(PyTorch files are read from a disk)"
    )


def _as_mapped(weights: Weights, weight_map: dict[str, str], index: pathlib.Path) -> Weights:
    """The weights, which are where their index says."""
    for name, shard in weight_map.items():
        found, path = weights.files.get(name), index.parent / shard
        if found != str(path):
            raise InputError(
                f"{path}: tensor {name} is missing; expected there by {index.name}, "
                f"found {f'in {pathlib.Path(found).name}' if found else 'nowhere'}"
            )
    return weights


def _weight_map(index: pathlib.Path, is_there: Callable[[str], bool]) -> dict[str, str]:
    """Tensor name -> file name of a sharded checkpoint; every file is there."""
    weight_map = read_json(index, "").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected an object under 'weight_map', found {weight_map!r}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or pathlib.PurePath(shard).name != shard:
            raise InputError(f"{index}: tensor {name}: expected the name of a file beside the index, found {shard!r}")
        if not is_there(shard):  # False for a name that is too long, too
            raise InputError(
                f"{index.parent / shard}: no such file; expected by {index.name} for tensor {name}; "
                "fetch the checkpoint again"
            )
    return weight_map


def _read_headers(shards: list[pathlib.Path], opener: Callable[..., Any]) -> Weights:
    found, files = {}, {}
    for shard in shards:
        with opener(shard) as tensors:
            for name in tensors.names():
                if name in files:
                    raise InputError(f"{shard}: tensor {name}: expected in one file, found in {files[name]} too")
                found[name], files[name] = tensors.describe(name), str(shard)

    def read(name: str, pieces: Pieces) -> np.ndarray:
        # Opened again each time, so that the pages of a mapped file do not stay in memory.
        with opener(pathlib.Path(files[name])) as tensors:
            return join_pieces([tensors.read(name, piece) for piece in pieces])

    return Weights(found, files, read)


@dataclasses.dataclass(frozen=True)
class _TensorFile:
    names: Callable[[], list[str]]
    describe: Callable[[str], tuple[tuple[int, ...], str]]
    read: Callable[[str, Index], np.ndarray]


@contextlib.contextmanager
def _open_safetensors(path: pathlib.Path) -> Iterator[_TensorFile]:
    try:
        with safetensors.safe_open(path, framework="np") as file:

            def describe(name: str) -> tuple[tuple[int, ...], str]:
                part = file.get_slice(name)
                return tuple(part.get_shape()), part.get_dtype()

            yield _TensorFile(lambda: list(file.keys()), describe, lambda name, index: file.get_slice(name)[index])
    except safetensors.SafetensorError as error:
        raise InputError(f"{path}: truncated or not a safetensors file ({one_line(error)}); fetch it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({one_line(error)})") from None


@contextlib.contextmanager
def _open_torch(path: pathlib.Path) -> Iterator[_TensorFile]:
    tensors = load_torch(path)
    yield _TensorFile(
        lambda: list(tensors),
        lambda name: describe_torch(tensors[name]),
        lambda name, index: torch_to_numpy(tensors[name][index]),
    )


def load_torch(path: pathlib.Path) -> dict[str, Any]:
    """A PyTorch state dict, memory-mapped, with weights_only=True; torch is needed for this alone.

    Raises:
      InputError: where torch is not installed, or the file is not a state dict.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{path}: reading PyTorch weights needs torch; pip install torch, or convert the checkpoint to safetensors"
        )
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError) as error:
        if path.is_file() and path.stat().st_size and not zipfile.is_zipfile(path):
            reason = "not the zip format of torch 1.6 and later"
        else:
            reason = one_line(error)
        raise InputError(f"{path}: truncated or not a PyTorch state dict ({reason}); fetch it again") from None
    if not isinstance(tensors, dict):
        raise InputError(f"{path}: expected a PyTorch state dict, found {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InputError(
                f"{path}: entry {name!r}: expected a tensor of a PyTorch state dict, found {type(tensor).__name__}"
            )
    return tensors


def describe_torch(tensor: Any) -> tuple[tuple[int, ...], str]:
    """Shape, and dtype as safetensors spells it, of a torch tensor; torch's own name for what is not supported."""
    dtype = str(tensor.dtype)
    return tuple(tensor.shape), _TORCH_DTYPES.get(dtype, dtype)


def torch_to_numpy(tensor: Any) -> np.ndarray:
    """A copy of a torch tensor (numpy has no bfloat16 of its own, so those go through their bits)."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.contiguous().numpy().copy()


def join_pieces(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """Parts of a tensor, joined along their first axis."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
