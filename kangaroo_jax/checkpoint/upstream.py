"""Adapters in the authors' format (github.com/Equationliu/Kangaroo): config.json, and pytorch_model.bin, or
model.safetensors from newer versions of accelerate, with which the authors' code saves.

`python -m kangaroo_jax.cli.convert` writes one as an Orbax checkpoint.
"""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np

from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.checkpoint.mapping import check_tensors, fill_module
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checkpoint.weights import Pieces, open_weights
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.model.families import read_config

_WRAPPED = "module."

# The adapter is run with the target's settings, so those of its own config must be the same.
_SAME = (
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
)


def load_upstream(folder: str | pathlib.Path, target: Target, dtype: jnp.dtype) -> Adapter:
    """Loads the authors' AdapterModel. Needs torch where its weights are in pytorch_model.bin.

    Args:
      folder: with config.json and weights. All of their names may begin with "module.", as PyTorch's
        DistributedDataParallel names what it wraps.
      target: the target it was trained for. The folder does not record which that is, nor the exit layer, so only
        the shapes and constants are compared.
      dtype: of the weights.

    Raises:
      InputError: for a missing or damaged file, a config that differs from the target's, or tensors that do not fit.
    """
    folder = pathlib.Path(folder)
    config_file = folder / "config.json"
    config = read_config(read_json(config_file, "the authors' adapter folders have one"), str(config_file))
    for key in _SAME:
        found, expected = getattr(config, key), getattr(target.config, key)
        if found != expected:
            raise InputError(
                f"{config_file}: {key} is not that of the target {target.name}; expected {expected}, found {found}; "
                "give the target the adapter was trained for"
            )
    weights = open_weights(folder)
    prefix = _WRAPPED if all(name.startswith(_WRAPPED) for name in weights.found) else ""
    found = {name.removeprefix(prefix): x for name, x in weights.found.items()}
    files = {name.removeprefix(prefix): x for name, x in weights.files.items()}
    abstract = abstract_adapter(target.config, dtype, AdapterConfig(Adapter.kind))
    check_tensors(abstract, found, files)

    def read(name: str, pieces: Pieces) -> np.ndarray:
        return weights.read(prefix + name, pieces)

    return fill_module(abstract, read, dtype, files=files, mesh=target.mesh)


def is_upstream(folder: pathlib.Path) -> bool:
    """Whether a folder looks like the authors': a model's configuration and weights."""
    weights = ("pytorch_model.bin", "model.safetensors")
    return (folder / "config.json").exists() and any((folder / name).exists() for name in weights)
