"""Shapes of well-known models, to cost them without their weights."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import huggingface_hub

from kangaroo_jax import paths
from kangaroo_jax.buckets import Bucket, Copy, is_bucket
from kangaroo_jax.checkpoint import hub
from kangaroo_jax.checkpoint.gguf_source import gguf_shape
from kangaroo_jax.checkpoint.json_file import read_json
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig, RopeScaling
from kangaroo_jax.model.families import read_config

_LLAMA2 = functools.partial(
    ModelConfig, model_type="llama", vocab_size=32000, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5
)
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}
# From the config.json of Llama-2-7b, LLaMA-2-7B-32K, Llama-2-13b, Meta-Llama-3-8B, Llama-3.1-8B, Llama-3.2-1B,
# Qwen3-8B, Qwen3-4B, Mistral-7B-v0.3 and, its text_config alone, gemma-3-12b-it; Vicuna's are Llama's.
SHAPES = {
    "llama7b": _LLAMA2(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama13b": _LLAMA2(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama3_8b": ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "llama3_1b": ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=32.0),
        tie_word_embeddings=True,
    ),
    "qwen3_8b": read_config(_QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288}),
    "qwen3_4b": read_config(_QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}),
    "mistral_7b": read_config(
        {
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
        }
    ),
    "gemma3_12b": read_config(
        {
            "model_type": "gemma3_text",
            "vocab_size": 262208,
            "hidden_size": 3840,
            "intermediate_size": 15360,
            "num_hidden_layers": 48,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        }
    ),
}
# The same with longer contexts.
SHAPES |= {
    "llama7b_32k": dataclasses.replace(
        SHAPES["llama7b"], max_position_embeddings=4096, rope_scaling=RopeScaling("linear", factor=8.0)
    ),
    "llama31_8b": dataclasses.replace(
        SHAPES["llama3_8b"], max_position_embeddings=131072, rope_scaling=RopeScaling("llama3", factor=8.0)
    ),
}

# Hub ids whose config.json gives these shapes.
_KNOWN = {
    "lmsys/vicuna-7b-v1.3": "llama7b",
    "lmsys/vicuna-7b-v1.5": "llama7b",
    "meta-llama/Llama-2-7b-hf": "llama7b",
    "meta-llama/Llama-2-7b-chat-hf": "llama7b",
    "lmsys/vicuna-13b-v1.3": "llama13b",
    "lmsys/vicuna-13b-v1.5": "llama13b",
    "meta-llama/Llama-2-13b-hf": "llama13b",
    "meta-llama/Llama-2-13b-chat-hf": "llama13b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "meta-llama/Meta-Llama-3-8B-Instruct": "llama3_8b",
    "togethercomputer/LLaMA-2-7B-32K": "llama7b_32k",
    "meta-llama/Llama-3.1-8B": "llama31_8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama31_8b",
    "Qwen/Qwen3-8B": "qwen3_8b",
    "Qwen/Qwen3-4B": "qwen3_4b",
    "mistralai/Mistral-7B-v0.3": "mistral_7b",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistral_7b",
}


def model_config(name: str) -> ModelConfig:
    """A model's shape without its weights.

    Args:
      name: a folder with config.json, here or in a bucket, or a GGUF file, such a file, one of `SHAPES` or of
        `hub.CHECKPOINTS`, or a hub id; those of `_KNOWN` need no network.

    Raises:
      InputError: for a name that is none of these, or a file that is wrong.
    """
    if is_bucket(name):
        with Copy(Bucket(name)) as copy, copy.bucket.named(copy.path):
            copy.fetch_all(lambda object_name: object_name == "config.json")
            file = copy.path / "config.json"
            return read_config(read_json(file, "give a folder that has one"), str(file))
    file = paths.expanded(name)
    if file.suffix != ".json" or not file.is_file():
        file = hub.local_checkpoint(name)
    if file is not None:
        if file.suffix == ".gguf":
            return gguf_shape(file)
        file = file / "config.json" if file.is_dir() else file
        return read_config(read_json(file, "give a folder that has one"), str(file))
    name = hub.hub_id(name)
    known = _KNOWN.get(name, name)
    if known in SHAPES:
        return SHAPES[known]
    try:
        huggingface_hub.model_info(name, timeout=10)  # fails at once where downloading would try again and again
        file = pathlib.Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub's errors and those of the HTTP library under it share no base class
        raise InputError(
            f"{name}: no folder with config.json, and its shape could not be had from the Hugging Face hub "
            f"({type(error).__name__}); give a config.json, or one of {', '.join(SHAPES)}"
        ) from None
    return read_config(read_json(file, "the hub's cache is damaged"), str(file))
