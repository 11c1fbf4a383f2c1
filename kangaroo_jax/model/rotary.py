"""Rotary position embeddings: the angles."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kangaroo_jax.model.config import RopeScaling, Rotary


def rotary_angles(
    rotary: Rotary, positions: Int[Array, ...], dtype: jnp.dtype
) -> tuple[Float[Array, "... turned"], Float[Array, "... turned"]]:
    """Cosine and sine of the rotary angles, of the dimensions that are turned (transformers' modeling_rope_utils.py).
    Of "dynamic" and "longrope", for texts within `ModelConfig.context`."""
    frequencies = 1.0 / rotary.theta ** (jnp.arange(0, rotary.dim, 2, dtype=jnp.float32) / rotary.dim)
    scaling, factor = rotary.scaling, 1.0
    if scaling is not None:
        frequencies, factor = _SCALED[scaling.kind](frequencies, rotary, scaling), scaling.attention_factor
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if factor != 1.0:
        cos, sin = cos * factor, sin * factor
    cos, sin = cos.astype(dtype), sin.astype(dtype)
    # Repeated last: XLA for CPU fuses a cosine into every product with it, and computes it again in each, but keeps a
    # concatenation.
    return jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([sin, sin], axis=-1)


def _linear(frequencies: Array, rotary: Rotary, scaling: RopeScaling) -> Array:
    return frequencies / scaling.factor


def _dynamic(frequencies: Array, rotary: Rotary, scaling: RopeScaling) -> Array:
    return frequencies


def _llama3(frequencies: Array, rotary: Rotary, scaling: RopeScaling) -> Array:
    # Wavelengths short against the original context are kept, long ones divided, those between interpolated.
    turns = scaling.original_max_position_embeddings * frequencies / (2 * jnp.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = jnp.clip(kept, 0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: Array, rotary: Rotary, scaling: RopeScaling) -> Array:
    # The same over the index of a frequency, between those that turn beta_fast and beta_slow times (arXiv 2309.00071).
    def index(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return rotary.dim * math.log(length) / (2 * math.log(rotary.theta))

    first, last = index(scaling.beta_fast), index(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary.dim - 1)
    divided = (jnp.arange(rotary.dim // 2, dtype=jnp.float32) - first) / (last - first or 0.001)
    divided = jnp.clip(divided, 0.0, 1.0)
    return divided * frequencies / scaling.factor + (1 - divided) * frequencies


def _longrope(frequencies: Array, rotary: Rotary, scaling: RopeScaling) -> Array:
    return frequencies / jnp.asarray(scaling.long_factor if scaling.long else scaling.short_factor, jnp.float32)


_SCALED = {"linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
