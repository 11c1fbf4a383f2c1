"""A target's logits for a batch of tokens, and their comparison with transformers'."""

import jax
import jax.numpy as jnp
import numpy as np

from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply


@jax.jit
def forward(target: TargetModel, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = shallow_apply(target, tokens, positions, exit_layer=1)
    hidden, _ = deep_apply(target, hidden, positions, exit_layer=1)
    return lm_head(target, hidden)


def assert_same_logits(found: jax.Array, expected: np.ndarray, tolerance: float) -> None:
    """The largest difference, relative to the logits' scale."""
    assert found.shape == expected.shape
    error = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"logits differ by {error:.2e} of their scale"
