"""Ministral: Mistral, of which some layers have a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family, mistral
from kangaroo_jax.model.families.config_json import shared_keys, window_keys


def _write_config(config: ModelConfig) -> dict[str, Any]:
    return shared_keys(config) | window_keys(config) | {"architectures": ["MinistralForCausalLM"]}


def _read_config(contents: Mapping[str, Any]) -> ModelConfig:
    return mistral.FAMILY.read_config(contents)


FAMILY = Family("ministral", _read_config, _write_config, mistral.FAMILY.decoder_layer, same_as="llama")
