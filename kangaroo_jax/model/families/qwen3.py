"""Qwen3 (dense): Llama's layer with a norm on each head's query and key."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, require_silu, shared_fields, shared_keys
from kangaroo_jax.model.families.qwen2 import qwen_window_keys, qwen_windows
from kangaroo_jax.model.layers import DecoderLayer


@dataclasses.dataclass(frozen=True)
class Qwen3Config(ModelConfig):
    query_key_norm: ClassVar[str] = "head"


def _read_config(contents: Mapping[str, Any]) -> Qwen3Config:
    require_silu(contents)
    bias = flag(contents, "attention_bias")
    contents = {"head_dim": 128} | contents
    fields = shared_fields(contents, max_positions=32768, kv_heads=32)
    return Qwen3Config(**fields, qkv_bias=bias, o_bias=bias, windows=qwen_windows(contents))


def _write_config(config: Qwen3Config) -> dict[str, Any]:
    own = {"architectures": ["Qwen3ForCausalLM"], "attention_bias": config.o_bias}
    return shared_keys(config) | qwen_window_keys(config) | own


FAMILY = Family("qwen3", _read_config, _write_config, DecoderLayer)
