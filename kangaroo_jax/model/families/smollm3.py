"""SmolLM3: Llama's layer; positions turn queries and keys in some layers alone, and the others may have a window."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kangaroo_jax.checks import check_count
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import AttentionKind, ModelConfig
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


@dataclasses.dataclass(frozen=True)
class SmolLM3Config(ModelConfig):
    """`rotary_layers` says of each layer whether it has rotary positions; empty: all have."""

    rotary_layers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rotary_layers and len(self.rotary_layers) != self.num_hidden_layers:
            raise InputError(
                f"no_rope_layers must have a value for each of {self.num_hidden_layers} layers, found "
                f"{len(self.rotary_layers)}"
            )

    @property
    def attention_kinds(self) -> tuple[AttentionKind, ...]:
        kinds = super().attention_kinds
        turned = self.rotary_layers or (True,) * len(kinds)
        return tuple(
            kind if turns else AttentionKind(None, kind.window) for kind, turns in zip(kinds, turned, strict=True)
        )


def _read_config(contents: Mapping[str, Any]) -> SmolLM3Config:
    require_silu(contents)
    fields = shared_fields(
        contents, max_positions=32768, kv_heads=4, bos=128000, eos=128001, tied=True, theta=2_000_000.0
    )
    layers = fields["num_hidden_layers"]
    turned = contents.get("no_rope_layers")  # 1 where a layer has rotary positions, in spite of the name
    if turned is None:
        interval = contents.get("no_rope_layer_interval", 4)
        check_count("no_rope_layer_interval", interval)
        turned = [int((i + 1) % interval != 0) for i in range(layers)]
    if not isinstance(turned, list) or any(x not in (0, 1) for x in turned) or len(turned) < layers:
        raise InputError(f"no_rope_layers must be a list of 0 and 1, one for each of {layers} layers, found {turned!r}")
    window = contents.get("sliding_window") if flag(contents, "use_sliding_window") else None
    bias = flag(contents, "attention_bias")
    return SmolLM3Config(
        **fields,
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag(contents, "mlp_bias"),
        windows=layer_windows(contents, window, lambda index: not turned[index]),
        rotary_layers=() if all(turned[:layers]) else tuple(bool(x) for x in turned[:layers]),
    )


def _write_config(config: SmolLM3Config) -> dict[str, Any]:
    turned = config.rotary_layers or (True,) * config.num_hidden_layers
    return (
        shared_keys(config)
        | window_keys(config)
        | {
            "architectures": ["SmolLM3ForCausalLM"],
            "attention_bias": config.o_bias,
            "mlp_bias": config.mlp_bias,
            "pad_token_id": None,  # the default is beyond a small vocabulary
            "no_rope_layers": [int(x) for x in turned],
            "use_sliding_window": bool(config.windows),
        }
    )


FAMILY = Family("smollm3", _read_config, _write_config, DecoderLayer)
