"""Granite 3: Llama's layer, with multipliers of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.checks import check_positive
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import DecoderLayer

_MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")


@dataclasses.dataclass(frozen=True)
class GraniteConfig(ModelConfig):
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0
    logits_scaling: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _MULTIPLIERS:
            check_positive(name, getattr(self, name))

    @property
    def attention_scale(self) -> float:
        return self.attention_multiplier

    @property
    def logits_divisor(self) -> float:
        return self.logits_scaling


def _read_config(contents: Mapping[str, Any]) -> GraniteConfig:
    require_silu(contents)
    bias = flag(contents, "attention_bias")
    return GraniteConfig(
        **shared_fields(contents, max_positions=2048, bos=1, eos=2, has_windows=False),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(contents, "mlp_bias"),
        **{name: contents.get(name, 1.0) for name in _MULTIPLIERS},
    )


def _write_config(config: GraniteConfig) -> dict[str, Any]:
    own = {"architectures": ["GraniteForCausalLM"], "attention_bias": config.o_bias, "mlp_bias": config.mlp_bias}
    return shared_keys(config) | own | {name: getattr(config, name) for name in _MULTIPLIERS}


FAMILY = Family("granite", _read_config, _write_config, DecoderLayer)
