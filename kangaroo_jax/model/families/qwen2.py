"""Qwen2 and Qwen2.5: Llama's layer, whose queries, keys and values always have biases; later ones may have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.checks import check_count, is_number
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import (
    flag,
    layer_windows,
    require_silu,
    shared_fields,
    shared_keys,
    window_keys,
)
from kangaroo_jax.model.layers import DecoderLayer


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    require_silu(contents)
    fields = shared_fields(contents, max_positions=32768, kv_heads=32)
    return ModelConfig(**fields, qkv_bias=True, windows=qwen_windows(contents))


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return shared_keys(config) | qwen_window_keys(config) | {"architectures": ["Qwen2ForCausalLM"]}


def qwen_windows(contents: Mapping[str, Any]) -> tuple[int | None, ...]:
    """`ModelConfig.windows`, as Qwen's config.json says them."""
    window = contents.get("sliding_window", 4096) if flag(contents, "use_sliding_window") else None
    first = contents.get("max_window_layers", 28)
    check_count("max_window_layers", first + 1 if is_number(first) else first)  # 0 is every layer
    return layer_windows(contents, window, lambda index: index >= first)


def qwen_window_keys(config: ModelConfig) -> dict[str, Any]:
    """The keys of a config.json that `qwen_windows` reads."""
    return window_keys(config) | {"use_sliding_window": bool(config.windows)}


FAMILY = Family("qwen2", _read_config, _write_config, DecoderLayer, same_as="llama")
