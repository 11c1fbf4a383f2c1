"""Gemma 2: scaled embeddings, norms before and after attention and MLP, GeGLU, soft caps, a window in every other
layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kangaroo_jax.checks import check_positive
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import flag, layer_windows, shared_fields, shared_keys, window_keys
from kangaroo_jax.model.layers import MLP, Attention, AttentionContext, RMSNorm

_ACTIVATIONS = ("gelu_pytorch_tanh", "gelu_new")  # transformers' names of one function


@dataclasses.dataclass(frozen=True)
class GemmaConfig(ModelConfig):
    """What Gemma 2 and 3 have in common."""

    query_pre_attn_scalar: float = 256.0  # scores are divided by its square root
    logits_soft_cap: float | None = None

    norm_offset: ClassVar[float] = 1.0
    norm_in_float32: ClassVar[bool] = True
    activation: ClassVar[str] = "gelu_tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("query_pre_attn_scalar", self.query_pre_attn_scalar)
        if self.logits_soft_cap is not None:
            check_positive("final_logit_softcapping", self.logits_soft_cap)

    @property
    def embedding_multiplier(self) -> float:
        return self.hidden_size**0.5

    @property
    def attention_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


@dataclasses.dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    attention_soft_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention_soft_cap is not None:
            check_positive("attn_logit_softcapping", self.attention_soft_cap)


class GemmaLayer(nnx.Module):
    def __init__(self, config: GemmaConfig, index: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, config.attention_kinds[index], rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.pre_feedforward_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.post_feedforward_layernorm = RMSNorm(config, dtype)

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), context, keys, values)
        x = x + self.post_attention_layernorm(mixed)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x))), keys, values


def gemma_fields(contents: Mapping[str, Any], max_positions: int, **shared: Any) -> dict[str, Any]:
    """The fields of `GemmaConfig` but for windows and soft caps; `shared` as for `shared_fields`."""
    activation = contents.get("hidden_activation", _ACTIVATIONS[0])
    if activation not in _ACTIVATIONS:
        raise InputError(f"hidden_activation {activation!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    if flag(contents, "use_bidirectional_attention"):
        raise InputError("use_bidirectional_attention true is not supported: tokens see those before them alone")
    bias = flag(contents, "attention_bias")
    contents = {"head_dim": 256} | dict(contents)
    fields = shared_fields(contents, max_positions=max_positions, kv_heads=4, bos=2, eos=1, tied=True, **shared)
    return fields | {
        "qkv_bias": bias,
        "o_bias": bias,
        "query_pre_attn_scalar": contents.get("query_pre_attn_scalar", 256),
    }


def gemma_windows(contents: Mapping[str, Any], default: Callable[[int], bool]) -> tuple[int | None, ...]:
    """`ModelConfig.windows`; `default` as for `layer_windows`.

    Raises:
      InputError: as `layer_windows`, and for layers with a window whose length is null.
    """
    window, kinds = contents.get("sliding_window", 4096), contents.get("layer_types")
    if window is None and kinds is None and any(map(default, range(contents["num_hidden_layers"]))):
        raise InputError("sliding_window must be a number, found null; give layer_types where no layer has a window")
    return layer_windows(contents, window, default)


def gemma_keys(config: GemmaConfig) -> dict[str, Any]:
    """The keys of a config.json that Gemma 2 and 3 have in common."""
    return (
        shared_keys(config)
        | window_keys(config)
        | {
            "hidden_activation": _ACTIVATIONS[0],
            "attention_bias": config.o_bias,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
            "final_logit_softcapping": config.logits_soft_cap,
        }
    )


def _read_config(contents: Mapping[str, Any]) -> Gemma2Config:
    return Gemma2Config(
        **gemma_fields(contents, 8192),
        windows=gemma_windows(contents, lambda index: index % 2 == 0),
        logits_soft_cap=contents.get("final_logit_softcapping", 30.0),
        attention_soft_cap=contents.get("attn_logit_softcapping", 50.0),
    )


def _write_config(config: Gemma2Config) -> dict[str, Any]:
    own = {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": config.attention_soft_cap}
    return gemma_keys(config) | own


FAMILY = Family("gemma2", _read_config, _write_config, GemmaLayer)
