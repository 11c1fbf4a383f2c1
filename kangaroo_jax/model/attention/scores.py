"""What attention does to scores before their softmax."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float


def capped(scores: Float[Array, "*shape"], soft_cap: float | None) -> Float[Array, "*shape"]:
    """Scores, or logits, bent smoothly so that none is beyond `soft_cap`; as they are where that is None."""
    return scores if soft_cap is None else soft_cap * jnp.tanh(scores / soft_cap)
