"""Mistral: Llama's layer without biases; all layers may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import layer_windows, require_silu, shared_fields, shared_keys, window_keys
from kangaroo_jax.model.layers import DecoderLayer

_SLIDING_WINDOW = 4096  # of a config.json without the key


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    require_silu(contents)
    fields = shared_fields(contents, max_positions=4096 * 32, kv_heads=8, bos=1, eos=2)
    window = contents.get("sliding_window", _SLIDING_WINDOW)
    return ModelConfig(**fields, windows=layer_windows(contents, window, lambda index: True))


def _write_config(config: ModelConfig) -> dict[str, Any]:
    windows = set(config.windows)
    keys = window_keys(config) if len(windows) > 1 else {"sliding_window": windows.pop() if windows else None}
    return shared_keys(config) | keys | {"architectures": ["MistralForCausalLM"]}


FAMILY = Family("mistral", _read_config, _write_config, DecoderLayer, same_as="llama")
