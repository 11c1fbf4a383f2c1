"""A target's shape and constants from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kangaroo_jax.checkpoint.gguf_file import GGUFFile
from kangaroo_jax.checks import check_count, check_positive, is_integer
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import read_config

# general.architecture -> model_type. llama.cpp converts Mistral to "llama" too: one layer computes both.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

# Metadata by which llama.cpp computes something else, where it is there and not 0.
_NOT_COMPUTED = ("expert_count", "attention.sliding_window", "attention.scale", "attention.clamp_kqv", "logit_scale")

ROPE_FACTORS = "rope_freqs.weight"  # divisors of the rotary frequencies, of Llama 3.1 and later

# Ids that end a text, by the key that llama.cpp reads them from: end of text, of a turn, of a message.
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


def read_gguf_config(file: GGUFFile) -> ModelConfig:
    """The `ModelConfig` that a GGUF file's metadata say.

    Raises:
      InputError: for an architecture that is not supported, a key that is missing or wrong, and for what no model here
        computes.
    """
    architecture = file.metadata["general.architecture"]
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{file.path}: architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)} "
            "(Mistral is llama in a GGUF file)"
        )
    for key in _NOT_COMPUTED:
        if value := file.metadata.get(f"{architecture}.{key}"):
            raise InputError(f"{file.path}: {architecture}.{key} {value!r} is not supported")
    if file.metadata.get(f"{architecture}.attention.causal") is False:
        raise InputError(
            f"{file.path}: {architecture}.attention.causal false is not supported: tokens see those before"
        )
    return read_config(_config_json(file, architecture), str(file.path))


def _config_json(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """What the config.json of the same model has, so that its family reads and checks both alike."""

    def get(key: str, default: Any = ...) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        if value is ...:
            raise InputError(f"{file.path}: {architecture}.{key} is missing in its metadata; convert the model again")
        return value

    def count(key: str, default: Any = ...) -> int:
        value = get(key, default)
        check_count(f"{file.path}: {architecture}.{key}", value)  # a list: layers that differ
        return value

    heads, hidden = count("attention.head_count"), count("embedding_length")
    head_dim = count("attention.key_length", hidden // heads)
    theta = get("rope.freq_base", 10000.0)
    check_positive(f"{file.path}: {architecture}.rope.freq_base", theta)
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key, head_dim) != head_dim:
            raise InputError(
                f"{file.path}: {architecture}.{key} must be the size of a head, {head_dim}; found {get(key)}"
            )
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise InputError(f"{file.path}: expected the embedding, tensor token_embd.weight of two dimensions; found none")
    ends = [file.metadata.get(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    for key, id in zip(_END_KEYS, ends, strict=True):
        if id is not None and not is_integer(id):
            raise InputError(f"{file.path}: tokenizer.ggml.{key} must be a token id, found {id!r:.60}")
    return {
        "model_type": ARCHITECTURES[architecture],
        # Not the metadata's vocab_size, which old files have wrong.
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(file, get, head_dim, theta),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(x for x in ends if x is not None)),
    }


def _rope_scaling(file: GGUFFile, get: Callable[..., Any], head_dim: int, theta: float) -> dict[str, Any] | None:
    """`rope_scaling` of the model's config.json."""
    kind = get("rope.scaling.type", None)
    factor = get("rope.scaling.factor", None) or get("rope.scale_linear", None)
    factors = file.tensors.get(ROPE_FACTORS)
    if factors is not None:
        if kind not in (None, "none"):
            raise InputError(f"{file.path}: rope scaling {kind!r} together with {ROPE_FACTORS} is not supported")
        if factors.shape != (head_dim // 2,) or factors.dtype != "F32":
            raise InputError(
                f"{file.path}: tensor {ROPE_FACTORS}: expected {head_dim // 2} values in float32, found "
                f"{list(factors.shape)} in {factors.kind.name}"
            )
        return _llama3(file, file.read_rows(ROPE_FACTORS, 0, 1)[0], theta)
    if kind not in (None, "none", "linear"):
        raise InputError(
            f"{file.path}: rope type {kind!r} is not supported in a GGUF file; supported: none, linear, and Llama 3.1's"
        )
    if kind is None and factor not in (None, 0.0, 1.0):
        kind = "linear"
    if kind in (None, "none") or (kind == "linear" and factor in (None, 0.0, 1.0)):
        return None
    return {"rope_type": kind, "factor": factor}


def _llama3(file: GGUFFile, found: Sequence[float], theta: float) -> dict[str, Any] | None:
    """Rope scaling of the type "llama3" with these divisors of the frequencies; None where all are 1.

    llama.cpp's converter works the divisors out of config.json's constants. All Llama models from 3.1 on have the same
    ones but for the factor, which is the largest divisor.
    """
    scaling = {
        "rope_type": "llama3",
        "factor": float(np.max(found)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if np.all(np.asarray(found) == 1):
        return None
    frequencies = theta ** -(np.arange(len(found)) / len(found))
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    ramp = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    ramp = np.clip(ramp, 0, 1)
    if not np.allclose(found, 1 / ((1 - ramp) / scaling["factor"] + ramp), rtol=1e-4, atol=0):
        raise InputError(
            f"{file.path}: tensor {ROPE_FACTORS} holds factors of the rotary frequencies that are not those of "
            "Llama 3.1's rope scaling, which alone is supported"
        )
    return scaling
