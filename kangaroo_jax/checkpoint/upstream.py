"""Adapters in the authors' PyTorch format (github.com/Equationliu/Kangaroo): config.json and pytorch_model.bin.

`python -m kangaroo_jax.cli.convert` writes one as an Orbax checkpoint.
"""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np

from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.checkpoint.mapping import check_tensors, fill_module
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checkpoint.weights import Pieces, describe_torch, join_pieces, load_torch, torch_to_numpy
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import Adapter, abstract_adapter
from kangaroo_jax.model.families import read_config

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
    """Loads the authors' AdapterModel. Needs torch.

    Args:
      folder: with config.json and pytorch_model.bin.
      target: the target it was trained for. The folder does not record which that is, nor the exit layer, so only
        the shapes and constants are compared.
      dtype: of the weights.

    Raises:
      InputError: for a missing or damaged file, a config that differs from the target's, or tensors that do not fit.
    """
    folder = pathlib.Path(folder)
    config_file, weights_file = folder / "config.json", folder / "pytorch_model.bin"
    config = read_config(read_json(config_file, "the authors' adapter folders have one"), str(config_file))
    for key in _SAME:
        found, expected = getattr(config, key), getattr(target.config, key)
        if found != expected:
            raise InputError(
                f"{config_file}: {key} is not that of the target {target.name}; expected {expected}, found {found}; "
                "give the target the adapter was trained for"
            )
    if not weights_file.exists():
        raise InputError(f"{weights_file}: no such file; the authors' adapter folders have one")
    tensors = load_torch(weights_file)
    abstract = abstract_adapter(target.config, dtype)
    found = {name: describe_torch(x) for name, x in tensors.items()}
    files = dict.fromkeys(found, str(weights_file))
    check_tensors(abstract, found, files)

    def read(name: str, pieces: Pieces) -> np.ndarray:
        return join_pieces([torch_to_numpy(tensors[name][piece]) for piece in pieces])

    return fill_module(abstract, read, dtype, files=files, mesh=target.mesh)
