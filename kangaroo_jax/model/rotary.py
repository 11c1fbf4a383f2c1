"""Rotary position embeddings: the angles."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kangaroo_jax.model.config import ModelConfig


def rotary_angles(
    config: ModelConfig, positions: Int[Array, ...], dtype: jnp.dtype
) -> tuple[Float[Array, "... head_dim"], Float[Array, "... head_dim"]]:
    """Cosine and sine of the rotary angles (transformers' modeling_rope_utils.py: default, linear, llama3)."""
    inv_freq = 1.0 / config.rope_theta ** (jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        inv_freq = inv_freq / scaling.factor
    elif scaling is not None:
        # Wavelengths short against the original context are kept, long ones divided, those between interpolated.
        wavelengths_in_context = scaling.original_max_position_embeddings * inv_freq / (2 * jnp.pi)
        smooth = (wavelengths_in_context - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        smooth = jnp.clip(smooth, 0.0, 1.0)
        inv_freq = (1 - smooth) * inv_freq / scaling.factor + smooth * inv_freq
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)
