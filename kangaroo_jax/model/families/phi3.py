"""Phi-3, 3.5 and 4-mini: Llama's layer, stored with fused tensors; positions may turn a part of each head."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.checks import check_positive, check_size
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig, Rotary
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import (
    layer_windows,
    partial_rotary_factor,
    require_silu,
    shared_fields,
    shared_keys,
)
from kangaroo_jax.model.layers import DecoderLayer


@dataclasses.dataclass(frozen=True)
class Phi3Config(ModelConfig):
    partial_rotary_factor: float = 1.0

    def __post_init__(self) -> None:
        check_positive("partial_rotary_factor", self.partial_rotary_factor)
        check_size("head_dim", self.head_dim)
        dim, scaling = int(self.head_dim * min(1, self.partial_rotary_factor)), self.rope_scaling
        if self.partial_rotary_factor > 1 or dim == 0 or dim % 2:
            raise InputError(
                f"partial_rotary_factor must be at most 1, and an even number of head_dim ({self.head_dim}), found "
                f"{self.partial_rotary_factor!r}"
            )
        super().__post_init__()
        if scaling is not None and scaling.kind not in ("longrope",):
            raise InputError(f"rope type {scaling.kind!r} is not supported for phi3; supported: default, longrope")

    @property
    def rotary(self) -> Rotary:
        return Rotary(self.rope_theta, int(self.head_dim * self.partial_rotary_factor), self.rope_scaling)


def _read_config(contents: Mapping[str, Any]) -> Phi3Config:
    require_silu(contents)
    for key in ("rope_scaling", "rope_parameters"):
        # Earlier names of the same: transformers' Phi3Config.
        found = contents.get(key)
        if isinstance(found, Mapping) and found.get("rope_type", found.get("type")) in ("su", "yarn"):
            contents = dict(contents) | {key: dict(found) | {"rope_type": "longrope"}}
    contents = {"original_max_position_embeddings": 4096} | dict(contents)
    fields = shared_fields(contents, max_positions=4096, bos=1, eos=32000, eps=1e-5, turns_parts=True)
    windows = layer_windows({**contents, "layer_types": None}, contents.get("sliding_window"), lambda index: True)
    return Phi3Config(**fields, windows=windows, partial_rotary_factor=partial_rotary_factor(contents))


def _write_config(config: Phi3Config) -> dict[str, Any]:
    scaling = config.rope_scaling
    original = config.max_position_embeddings if scaling is None else scaling.original_max_position_embeddings
    return shared_keys(config) | {
        "sliding_window": config.windows[0] if config.windows else None,
        "architectures": ["Phi3ForCausalLM"],
        "partial_rotary_factor": config.partial_rotary_factor,
        "original_max_position_embeddings": original,
        "pad_token_id": None,  # the default is beyond a small vocabulary
    }


FAMILY = Family(
    "phi3",
    _read_config,
    _write_config,
    DecoderLayer,
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
)
