"""Qwen2 and Qwen2.5, with full attention: Llama's layer, whose queries, keys and values always have biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import DecoderLayer


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    if flag(contents, "use_sliding_window"):
        raise InputError("qwen2 with use_sliding_window true is not supported; only full attention is")
    layer_types = contents.get("layer_types") or []
    if not isinstance(layer_types, list):
        raise InputError(f"layer_types must be a list, found {layer_types!r}")
    if any(kind != "full_attention" for kind in layer_types):
        raise InputError(f"layer_types {layer_types!r} is not supported; only 'full_attention' is, in every layer")
    require_silu(contents)
    return ModelConfig(**shared_fields(contents, max_positions=32768, kv_heads=32), qkv_bias=True)


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return shared_keys(config) | {"architectures": ["Qwen2ForCausalLM"]}


FAMILY = Family("qwen2", _read_config, _write_config, DecoderLayer)
