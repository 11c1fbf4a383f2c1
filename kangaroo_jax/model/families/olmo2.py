"""OLMo 2: norms after attention and MLP in place of before, and norms of all queries and of all keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import MLP, Attention, AttentionContext, RMSNorm


@dataclasses.dataclass(frozen=True)
class Olmo2Config(ModelConfig):
    norm_in_float32: ClassVar[bool] = True
    query_key_norm: ClassVar[str] = "all"


class Olmo2Layer(nnx.Module):
    def __init__(self, config: Olmo2Config, index: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.self_attn = Attention(config, config.attention_kinds[index], rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.post_feedforward_layernorm = RMSNorm(config, dtype)

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(x, context, keys, values)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(x)), keys, values


def _read_config(contents: Mapping[str, Any]) -> Olmo2Config:
    require_silu(contents)
    bias = flag(contents, "attention_bias")
    return Olmo2Config(
        **shared_fields(contents, max_positions=2048, eos=50279, eps=1e-5, has_windows=False),
        qkv_bias=bias,
        o_bias=bias,
    )


def _write_config(config: Olmo2Config) -> dict[str, Any]:
    return shared_keys(config) | {"architectures": ["Olmo2ForCausalLM"], "attention_bias": config.o_bias}


FAMILY = Family("olmo2", _read_config, _write_config, Olmo2Layer)
