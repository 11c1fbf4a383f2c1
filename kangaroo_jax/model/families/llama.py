"""Llama, and what has its config.json (Vicuna, SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import DecoderLayer


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    require_silu(contents)
    attention_bias = flag(contents, "attention_bias")
    return ModelConfig(
        **shared_fields(contents, max_positions=2048, bos=1, eos=2, has_windows=False),
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=flag(contents, "mlp_bias"),
    )


def _write_config(config: ModelConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    return shared_keys(config) | {"architectures": ["LlamaForCausalLM"]} | biases


FAMILY = Family("llama", _read_config, _write_config, DecoderLayer)
