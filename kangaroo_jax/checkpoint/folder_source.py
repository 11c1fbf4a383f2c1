"""A target in a folder of Hugging Face's format."""

from __future__ import annotations

import functools
import pathlib

from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.checkpoint.source import Source
from kangaroo_jax.checkpoint.tokenizer import load_tokenizer
from kangaroo_jax.checkpoint.weights import open_weights
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import read_config
from kangaroo_jax.model.families.config_json import token_ids


def folder_source(folder: pathlib.Path) -> Source:
    """Opens a folder with config.json, weights, and maybe a tokenizer.

    Raises:
      InputError: for a missing or corrupt file, or a model that is not supported.
    """
    config_file = folder / "config.json"
    config = read_config(read_json(config_file, "a folder in Hugging Face format has one"), str(config_file))
    return Source(
        config=config,
        eos_token_ids=_eos_token_ids(folder, config),
        weights=open_weights(folder),
        read_tokenizer=functools.partial(load_tokenizer, folder, config.vocab_size),
    )


def _eos_token_ids(folder: pathlib.Path, config: ModelConfig) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    if not file.exists():
        return config.eos_token_ids
    try:
        return token_ids(read_json(file, "remove it if it is not needed"), "eos_token_id") or config.eos_token_ids
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
