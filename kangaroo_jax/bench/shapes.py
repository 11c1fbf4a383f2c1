"""Shapes of well-known models, to cost them with random weights."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.bench.machine import memory_bytes
from kangaroo_jax.config import ModelConfig, RopeScaling
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.adapter import Adapter
from kangaroo_jax.model.target import TargetModel

_LLAMA2 = functools.partial(
    ModelConfig, model_type="llama", vocab_size=32000, head_dim=128, max_position_embeddings=4096, rms_norm_eps=1e-5
)
# From the config.json of Llama-2-7b, Llama-2-13b, Meta-Llama-3-8B and Llama-3.2-1B; Vicuna's are Llama's.
SHAPES = {
    "llama7b": _LLAMA2(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "llama13b": _LLAMA2(
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
    ),
    "llama3_8b": ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
    ),
    "llama3_1b": ModelConfig(
        model_type="llama",
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", factor=32.0),
        tie_word_embeddings=True,
    ),
}


def random_weights(shape: str, dtype: str) -> tuple[TargetModel, Adapter]:
    """A target and an adapter of a shape, made on the device.

    Raises:
      InputError: for weights that the device cannot hold.
    """
    config = SHAPES[shape]

    def make() -> tuple[TargetModel, Adapter]:
        rngs = nnx.Rngs(0)
        return TargetModel(config, rngs=rngs, dtype=jnp.dtype(dtype)), Adapter(
            config, rngs=rngs, dtype=jnp.dtype(dtype)
        )

    need = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.eval_shape(make)))
    if need > 0.9 * memory_bytes():
        raise InputError(
            f"--shape={shape}: {need / 1e9:.1f} GB of {dtype} weights, but the device holds "
            f"{memory_bytes() / 1e9:.1f} GB; take a smaller shape, or --dtype=bfloat16"
        )
    return jax.jit(make)()
