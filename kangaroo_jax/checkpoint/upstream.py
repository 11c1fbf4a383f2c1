"""Adapters in the authors' PyTorch format (github.com/Equationliu/Kangaroo): config.json and pytorch_model.bin.

    python -m kangaroo_jax.checkpoint.upstream --adapter=FOLDER --target=FOLDER --exit_layer=2 --output=FOLDER

converts one into an Orbax checkpoint, which records the exit layer and the target and needs no torch to read.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import jax.numpy as jnp

from kangaroo_jax.checkpoint.adapter import TrainedAdapter, abstract_adapter, check_exit_layer, save_adapter
from kangaroo_jax.checkpoint.huggingface import (
    Target,
    check_tensors,
    fill_module,
    load_target,
    load_torch,
    read_json,
    torch_to_numpy,
)
from kangaroo_jax.config import ModelConfig
from kangaroo_jax.errors import InputError

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
_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


def load_upstream(folder: str | pathlib.Path, target: Target, dtype: jnp.dtype | None = None) -> TrainedAdapter:
    """Loads the authors' AdapterModel. Needs torch.

    Args:
      folder: with config.json and pytorch_model.bin.
      target: the target it was trained for. The folder does not record which that is, nor the exit layer, so only
        the shapes and constants are compared.
      dtype: of the weights; the target's by default.

    Returns:
      The adapter; its `exit_layer` is None.

    Raises:
      InputError: for a missing or damaged file, a config that differs from the target's, or tensors that do not fit.
    """
    folder = pathlib.Path(folder)
    config_file, weights_file = folder / "config.json", folder / "pytorch_model.bin"
    config = ModelConfig.from_hf(read_json(config_file, "the authors' adapter folders have one"), str(config_file))
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
    dtype = target.model.dtype if dtype is None else dtype
    abstract = abstract_adapter(target.config, dtype)
    found = {name: (tuple(x.shape), _DTYPES.get(str(x.dtype), str(x.dtype))) for name, x in tensors.items()}
    check_tensors(abstract, found, dict.fromkeys(found, str(weights_file)))
    model = fill_module(abstract, lambda name: torch_to_numpy(tensors[name]), dtype)
    return TrainedAdapter(model, None, str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(prog="upstream.py", description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="Folder in the authors' format.")
    parser.add_argument("--target", required=True, help="Its target: a folder in Hugging Face format, or a hub id.")
    parser.add_argument("--exit_layer", required=True, type=int, help="Number of shallow layers it was trained for.")
    parser.add_argument("--output", required=True, help="Folder to write; must not exist.")
    args = parser.parse_args()
    try:
        target = load_target(args.target)
        check_exit_layer(args.exit_layer, target.config)
        # float32: the authors' own, so that nothing is lost whatever the target is run in later.
        adapter = load_upstream(args.adapter, target, jnp.float32)
        training = {"converted_from": args.adapter}
        save_adapter(args.output, adapter.model, exit_layer=args.exit_layer, target=target, training=training)
    except InputError as error:
        print(f"upstream.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
