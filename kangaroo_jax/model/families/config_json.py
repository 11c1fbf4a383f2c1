"""What families share in reading and writing a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.checks import check_count, check_flag, check_positive
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig, RopeScaling

# Fields of `ModelConfig` that are no keys of a config.json.
_OWN_FIELDS = ("rope_scaling", "qkv_bias", "o_bias", "mlp_bias", "eos_token_ids")


def shared_fields(
    contents: Mapping[str, Any],
    *,
    max_positions: int,
    kv_heads: int | None = None,
    bos: int | None = None,
    eos: int | None = None,
) -> dict[str, Any]:
    """The fields of `ModelConfig` but for the biases, of a config.json's contents.

    Args:
      contents: of the file, parsed.
      max_positions: the family's max_position_embeddings where the key is left out.
      kv_heads: num_key_value_heads likewise; None means as many as there are heads.
      bos: bos_token_id likewise.
      eos: eos_token_id likewise.

    Raises:
      InputError: for a key that is missing or has a wrong value, and for what no model here computes.
    """
    quantization = contents.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise InputError(f"quantized weights ({method!r}) are not supported; use the unquantized checkpoint")
    if contents.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"partial_rotary_factor must be 1, found {contents['partial_rotary_factor']!r}")
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        check_count(key, contents.get(key))
    hidden, heads = contents["hidden_size"], contents["num_attention_heads"]
    head_dim = contents.get("head_dim")
    if head_dim is None:
        if hidden % heads:
            raise InputError(
                f"hidden_size must be a multiple of num_attention_heads ({heads}) where head_dim is not given, "
                f"found {hidden}"
            )
        head_dim = hidden // heads
    kv_heads = contents.get("num_key_value_heads", kv_heads)
    theta, scaling = _rope(contents)
    first = token_ids(contents, "bos_token_id", bos)
    if len(first) > 1:
        raise InputError(f"bos_token_id must be one token id or null, found {contents['bos_token_id']!r}")
    return {
        "model_type": contents["model_type"],
        "vocab_size": contents["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": contents["intermediate_size"],
        "num_hidden_layers": contents["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": contents.get("max_position_embeddings", max_positions),
        "rms_norm_eps": contents.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": flag(contents, "tie_word_embeddings"),
        "bos_token_id": first[0] if first else None,
        "eos_token_ids": token_ids(contents, "eos_token_id", eos),
    }


def shared_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that `shared_fields` reads."""
    keys = [field.name for field in dataclasses.fields(ModelConfig) if field.name not in _OWN_FIELDS]
    eos, scaling = config.eos_token_ids, config.rope_scaling
    rope = None
    if scaling is not None:
        fields = dataclasses.asdict(scaling)
        kind = fields.pop("kind")
        rope = {"rope_type": kind} | (fields if kind == "llama3" else {"factor": scaling.factor})
    return {key: getattr(config, key) for key in keys} | {
        "hidden_act": "silu",
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "rope_scaling": rope,
    }


def require_silu(contents: Mapping[str, Any]) -> None:
    """Raises `InputError` for an activation that `layers.MLP` does not have."""
    # ACT2FN in transformers knows SiLU by both names.
    if contents.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"hidden_act {contents['hidden_act']!r} is not supported; supported: silu")


def flag(contents: Mapping[str, Any], key: str) -> bool:
    """The flag under `key`; false where it is left out or null.

    Raises:
      InputError: for anything but true and false.
    """
    value = contents.get(key)
    if value is None:
        return False
    check_flag(key, value)
    return value


def token_ids(contents: Mapping[str, Any], key: str, default: int | None = None) -> tuple[int, ...]:
    """The ids under `key` of a config.json (or generation_config.json): none (null), one, or a list; `default` where it
    is left out.

    Raises:
      InputError: for anything but integers.
    """
    value = contents.get(key, default)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{key} must be a token id or a list of token ids, found {value!r}")
    return ids


def _rope(contents: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling, in the old spelling (`rope_theta`, `rope_scaling.type`) or the new
    (`rope_parameters.rope_theta`, `.rope_type`)."""
    key = "rope_scaling" if contents.get("rope_scaling") else "rope_parameters"  # transformers' precedence
    parameters = contents.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise InputError(f"{key} must be an object, found {parameters!r}")
    nested = [name for name, value in parameters.items() if isinstance(value, Mapping)]
    if nested:
        raise InputError(f"{key} that differs between layers ({nested[0]!r}) is not supported; use one for all layers")
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise InputError(f"{key}.partial_rotary_factor must be 1, found {parameters['partial_rotary_factor']!r}")
    theta = parameters.get("rope_theta")
    theta = contents.get("rope_theta") if theta is None else theta
    theta = 10000.0 if theta is None else theta
    check_positive("rope_theta", theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind is None or kind == "default":
        return float(theta), None
    if kind not in ("linear", "llama3"):
        raise InputError(f"rope type {kind!r} is not supported; supported: default, linear, llama3")
    fields = ["factor"]
    if kind == "llama3":
        fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    for field in fields:
        if field not in parameters:
            raise InputError(f"{key} of rope type {kind!r} needs {field!r}, found {sorted(parameters)}")
    return float(theta), RopeScaling(kind, **{field: parameters[field] for field in fields})
