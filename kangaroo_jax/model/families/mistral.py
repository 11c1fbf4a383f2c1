"""Mistral, with full attention: Llama's layer without biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import DecoderLayer

_SLIDING_WINDOW = 4096  # of a config.json without the key


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    window = contents.get("sliding_window", _SLIDING_WINDOW)
    if window is not None:
        default = "" if "sliding_window" in contents else " (the default of a config without the key)"
        raise InputError(
            f"mistral with sliding_window {window!r}{default} is not supported; "
            "only full attention is (sliding_window: null)"
        )
    require_silu(contents)
    return ModelConfig(**shared_fields(contents, max_positions=4096 * 32, kv_heads=8, bos=1, eos=2))


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return shared_keys(config) | {"architectures": ["MistralForCausalLM"], "sliding_window": None}


FAMILY = Family("mistral", _read_config, _write_config, DecoderLayer)
