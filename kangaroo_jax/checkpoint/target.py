"""Targets: a checkpoint in, `TargetModel` and what belongs to it out, and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from kangaroo_jax.buckets import is_bucket
from kangaroo_jax.checkpoint import fingerprint
from kangaroo_jax.checkpoint.bucket_source import bucket_source
from kangaroo_jax.checkpoint.folder_source import folder_source
from kangaroo_jax.checkpoint.fused import join_fused, split_fused
from kangaroo_jax.checkpoint.gguf_source import gguf_source
from kangaroo_jax.checkpoint.hub import find_checkpoint
from kangaroo_jax.checkpoint.mapping import check_tensors, fill_module, is_stored_in_int8, parameter_rule
from kangaroo_jax.checkpoint.source import Source
from kangaroo_jax.checkpoint.tokenizer import end_tokens
from kangaroo_jax.checkpoint.weights import DTYPES, Pieces
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import family_of
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.ops import as_arrays
from kangaroo_jax.model.quantized import WEIGHTS, keeps_blocks
from kangaroo_jax.model.target import TargetModel


@dataclasses.dataclass(frozen=True)
class Target:
    """A loaded target.

    Attributes:
      model: the weights.
      tokenizer: a transformers tokenizer, or None if the checkpoint has none.
      name: the folder, file or hub id it came from.
      fingerprint: identifies the weights whatever float dtype they were loaded in; adapters record it. Those in int8
        have another.
      eos_token_ids: from generation_config.json where there is one, else config.json, or from a GGUF file's metadata;
        and the tokenizer's.
      mesh: what the weights are split over; None where they are on one device.
      bytes_read: of weights, by this process, as the files' values are: blocks of a GGUF file after dequantising.
      other_fingerprints: that what was made for the same weights may have recorded (`fingerprint.fingerprints`).
    """

    model: TargetModel
    tokenizer: Any
    name: str
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    mesh: Mesh | None = None
    bytes_read: int = 0
    other_fingerprints: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether what recorded this fingerprint was made for this target."""
        return recorded == self.fingerprint or recorded in self.other_fingerprints

    def has_checkpoint(self, recorded: str) -> bool:
        """Whether what recorded this fingerprint was made for the same checkpoint, with these weights or others."""
        mine = map(fingerprint.of_checkpoint, (self.fingerprint, *self.other_fingerprints))
        return fingerprint.of_checkpoint(recorded) in mine

    @property
    def is_rounded(self) -> bool:
        """Whether its weights are not the checkpoint's, but those rounded to int8."""
        return fingerprint.is_int8(self.fingerprint)

    @property
    def title(self) -> str:
        """Its name, and what its weights are where they are not the checkpoint's: "NAME (int8 weights)"."""
        return titled(self.name, self.fingerprint)


def titled(name: str, recorded: str) -> str:
    """`Target.title` of the target with that name and fingerprint."""
    return f"{name} (int8 weights)" if fingerprint.is_int8(recorded) else name


def default_dtype(mesh: Mesh | None = None) -> str:
    """The dtype of the weights where a user names none: float32 on CPU, which makes drafted decoding's tokens exactly
    those of plain decoding; bfloat16 on accelerators, which halves the memory.

    Args:
      mesh: what the weights are to be split over; None means the default device.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return "float32" if platform == "cpu" else "bfloat16"


def load_target(
    name: str | os.PathLike[str],
    dtype: str | jnp.dtype | None = None,
    mesh: Mesh | None = None,
    compute_dtype: str | jnp.dtype | None = None,
    weights: str = "float",
    long_context: bool = False,
) -> Target:
    """Loads a target from a local folder, a GGUF file or the Hugging Face hub.

    Args:
      name: a folder with config.json and weights (*.safetensors, or pytorch_model*.bin where torch is installed);
        such a folder in a bucket (safetensors alone); a GGUF file, or a folder with one and no config.json; one of
        `hub.CHECKPOINTS`; or a hub id.
      dtype: of the weights on the device: float32, bfloat16 or float16; None means `default_dtype`. One parameter at
        a time is on the host.
      mesh: splits the weights over its devices (model/sharding.py says how). Each process reads only the parts of
        its own devices, from safetensors; None keeps all on the default device.
      compute_dtype: of activations and caches, as `dtype`; None means that of the weights.
      weights: "float", or "int8": matrices are rounded to int8 as they are read, with a scale for each output channel,
        whatever they are in the file (a GGUF file's blocks are dequantized first); but on one CPU device a GGUF file's
        of Q8_0, which are int8, are taken as they are. `dtype` is then that of the rest.
      long_context: for texts beyond the context that a model with longrope was first trained on (Phi): its long
        factors turn all texts, `ModelConfig.for_long_texts`.

    Raises:
      InputError: for unknown `weights`, `long_context` of a model that has none, a missing or corrupt file, an unknown
        architecture, or tensors that do not fit the config.
    """
    name = os.fspath(name)
    dtype = _supported_dtype("dtype", default_dtype(mesh) if dtype is None else dtype)
    compute_dtype = None if compute_dtype is None else _supported_dtype("compute_dtype", compute_dtype)
    if weights not in WEIGHTS:
        raise InputError(f"weights must be {' or '.join(WEIGHTS)}, found {weights!r}")
    with _opened(name) as source:
        if long_context:
            source = dataclasses.replace(source, config=_for_long_texts(source.config, name))
        return _load(source, name, dtype, mesh, compute_dtype, weights)


def _for_long_texts(config: ModelConfig, name: str) -> ModelConfig:
    try:
        return config.for_long_texts()
    except InputError as error:
        raise InputError(f"{name}: {error}") from None


@contextlib.contextmanager
def _opened(name: str) -> Iterator[Source]:
    if is_bucket(name):
        with bucket_source(name) as source:
            yield source
    else:
        path = find_checkpoint(name)
        yield folder_source(path) if path.is_dir() else gguf_source(path)


def _load(
    source: Source, name: str, dtype: jnp.dtype, mesh: Mesh | None, compute_dtype: jnp.dtype | None, weights: str
) -> Target:
    config, stored = source.config, source.weights
    family = family_of(config)
    tensor_name = family.tensor_name
    layers, tensors = config.num_hidden_layers, len(stored.found)
    if layers > tensors:  # building so many would take long, for the same message
        raise InputError(
            f"{name}: num_hidden_layers is {layers}, but its weights are {tensors} tensors; fetch the checkpoint again"
        )
    abstract = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=dtype, compute_dtype=compute_dtype))
    rules = [
        parameter_rule(path, leaf.shape)
        for path, leaf in zip(parameter_paths(abstract), jax.tree.leaves(abstract), strict=True)
    ]
    expected = {tensor_name(part): shape for rule in rules for part, shape in zip(rule.names, rule.shapes, strict=True)}
    stored = split_fused(stored, family.fused, expected)
    check_tensors(abstract, stored.found, stored.files, tensor_name)
    bytes_read = 0

    def read(full: str, pieces: Pieces) -> np.ndarray:
        nonlocal bytes_read
        tensor = stored.read(full, pieces)
        bytes_read += tensor.nbytes
        return tensor

    def read_int8(full: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        nonlocal bytes_read
        values, scales = stored.int8.read(full, rows)
        bytes_read += values.nbytes + scales.nbytes
        return values, scales

    samples = {}
    for rule in rules:
        for name_here in rule.names:
            full = tensor_name(name_here)
            rows = read(full, (fingerprint.sample_index(stored.found[full][0]),))
            samples[name_here] = fingerprint.sample(rows)
    tokenizer = source.read_tokenizer()  # before the weights, which take long: what is wrong is said at once
    current, *others = fingerprint.fingerprints(config, samples)
    devices = jax.devices()[:1] if mesh is None else mesh.devices.ravel()
    int8 = dataclasses.replace(stored.int8, read=read_int8) if stored.int8 and keeps_blocks(devices) else None
    if weights == "int8" and not is_stored_in_int8(abstract, tensor_name, int8):
        current, *others = map(fingerprint.of_int8, (current, *others))
    model = fill_module(abstract, read, dtype, tensor_name, stored.files, mesh=mesh, weights=weights, int8=int8)
    return Target(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=current,
        eos_token_ids=end_tokens(source.eos_token_ids, tokenizer, config.vocab_size),
        mesh=mesh,
        bytes_read=bytes_read,
        other_fingerprints=tuple(others),
    )


def _supported_dtype(name: str, dtype: str | jnp.dtype) -> jnp.dtype:
    supported = [np.dtype(x) for x in DTYPES.values()]
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found not in supported:
        raise InputError(f"{name} must be one of {', '.join(x.name for x in supported)}, found {dtype!r}")
    return found


def save_target(model: TargetModel, folder: str | pathlib.Path, dtype: jnp.dtype) -> None:
    """Writes `config.json` and `model.safetensors` (in `dtype`) that transformers and `load_target` read."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family, tensors, model = family_of(model.config), {}, as_arrays(model)
    for path, leaf in zip(parameter_paths(model), jax.tree.leaves(model), strict=True):
        rule = parameter_rule(path, leaf.shape)
        for name, part in zip(rule.names, rule.split(np.asarray(leaf)), strict=True):
            tensors[family.tensor_name(name)] = np.ascontiguousarray(part.astype(dtype))
    tensors = join_fused(tensors, family.fused)
    temporary = folder / "model.safetensors.tmp"
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(folder / "model.safetensors")
    config = family.write_config(model.config) | {"torch_dtype": jnp.dtype(dtype).name}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
