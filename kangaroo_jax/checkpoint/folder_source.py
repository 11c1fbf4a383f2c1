"""A target in a folder of Hugging Face's format."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import numpy as np

from kangaroo_jax.buckets import Copy
from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.checkpoint.source import Source
from kangaroo_jax.checkpoint.tokenizer import load_tokenizer
from kangaroo_jax.checkpoint.weights import Weights, open_bucket_weights, open_weights
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import family_of, read_config
from kangaroo_jax.model.families.config_json import token_ids

_PEFT = "adapter_config.json"  # beside a model's weights, transformers adds what it names to them
_BAND = 1 << 22  # values of two tensors that are compared at a time


def folder_source(folder: pathlib.Path, copied: Copy | None = None) -> Source:
    """Opens a folder with config.json, weights, and maybe a tokenizer.

    Args:
      folder: on this machine.
      copied: where it is the copy of a bucket's small objects: that copy. The weights are read from the bucket then.

    Raises:
      InputError: for a missing or corrupt file, or a model that is not supported.
    """
    if (folder / _PEFT).exists():
        raise InputError(
            f"{folder}: has {_PEFT}, of an adapter of PEFT such as LoRA, which is not supported; merge it into its "
            "base model (merge_and_unload) and save that, or remove the file where the weights are merged already"
        )
    config_file = folder / "config.json"
    config = read_config(read_json(config_file, "a folder in Hugging Face format has one"), str(config_file))
    weights = open_weights(folder) if copied is None else open_bucket_weights(copied)
    if config.tie_word_embeddings and not _head_is_embedding(config, weights):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return Source(
        config=config,
        eos_token_ids=_eos_token_ids(folder, config),
        weights=weights,
        read_tokenizer=functools.partial(load_tokenizer, folder, config.vocab_size),
    )


def _head_is_embedding(config: ModelConfig, weights: Weights) -> bool:
    """Whether the LM head is the embedding: the file has no head, or the same numbers under its name. Where it has
    another head, that is what the model was trained with, whatever config.json says; transformers takes it too."""
    tensor_name = family_of(config).tensor_name
    head, embedding = tensor_name("lm_head.weight"), tensor_name("embed_tokens.weight")
    if head not in weights.found or embedding not in weights.found:
        return True
    shape = weights.found[embedding][0]
    if weights.found[head][0] != shape or len(shape) != 2:
        return False
    band = max(1, _BAND // shape[1])
    for start in range(0, shape[0], band):
        rows = ((slice(start, min(start + band, shape[0])), slice(0, shape[1])),)
        if not np.array_equal(weights.read(head, rows), weights.read(embedding, rows)):
            return False
    return True


def _eos_token_ids(folder: pathlib.Path, config: ModelConfig) -> tuple[int, ...]:
    file = folder / "generation_config.json"
    if not file.exists():
        return config.eos_token_ids
    try:
        return token_ids(read_json(file, "remove it if it is not needed"), "eos_token_id") or config.eos_token_ids
    except InputError as error:
        raise InputError(str(error) if str(file) in str(error) else f"{file}: {error}") from None
