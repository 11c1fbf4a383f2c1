"""A target in a GGUF file."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

from kangaroo_jax.checkpoint.source import Source
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig


def gguf_source(path: pathlib.Path) -> Source:
    """Opens a GGUF file.

    Raises:
      InputError: for a file that is damaged, a model that is not supported, or the gguf package missing.
    """
    _require_package(path)
    from kangaroo_jax.checkpoint.gguf_config import read_gguf_config
    from kangaroo_jax.checkpoint.gguf_file import read_gguf
    from kangaroo_jax.checkpoint.gguf_tokenizer import gguf_tokenizer
    from kangaroo_jax.checkpoint.gguf_weights import gguf_weights

    file = read_gguf(path)
    config = read_gguf_config(file)
    return Source(
        config=config,
        eos_token_ids=config.eos_token_ids,
        weights=gguf_weights(file, config),
        read_tokenizer=functools.partial(gguf_tokenizer, file, config.vocab_size),
    )


def gguf_shape(path: pathlib.Path) -> ModelConfig:
    """The shape of the model in a GGUF file. Raises as `gguf_source`."""
    _require_package(path)
    from kangaroo_jax.checkpoint.gguf_config import read_gguf_config
    from kangaroo_jax.checkpoint.gguf_file import read_gguf

    return read_gguf_config(read_gguf(path))


def _require_package(path: pathlib.Path) -> None:
    # Imported only here: no other format needs it.
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path}: reading it needs the package gguf, which is not installed; pip install gguf")
