"""The products of weights: every one goes through here, so that what a weight is stored as is decided in one place."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 is float32 on every platform: TPUs and recent GPUs would otherwise multiply it in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(
    spec: str, x: Float[Array, ...], weight: Float[Array, ...], accumulate: jnp.dtype | None = None
) -> Float[Array, ...]:
    """`jnp.einsum(spec, x, weight)` in the dtype of `x`, whatever the weight is stored as.

    Args:
      spec: of the product, for example "...k,kn->...n".
      x: activations, in the dtype that is computed in.
      weight: of any float dtype.
      accumulate: dtype of the result; that of `x` if None.
    """
    return jnp.einsum(spec, x, weight.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=accumulate)


def rows(weight: Float[Array, "rows width"], index: Int[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape w"]:
    """Rows of a table of weights, such as an embedding, in the dtype that is computed in."""
    return weight[index].astype(dtype)
