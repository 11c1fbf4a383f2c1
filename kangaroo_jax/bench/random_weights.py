"""Random weights in the shapes of well-known models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.bench.machine import memory_bytes
from kangaroo_jax.checkpoint.known_models import SHAPES
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.columns import columns_where_faster
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel


def random_weights(shape: str, dtype: str) -> tuple[TargetModel, Adapter]:
    """A target and an adapter, made on the device.

    Args:
      shape: a name in `SHAPES`.
      dtype: type of the weights.

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
    target, adapter = jax.jit(make)()
    leaves, structure = jax.tree.flatten(target)
    leaves = map(columns_where_faster, parameter_paths(target), leaves)  # as a loaded target has them
    return jax.tree.unflatten(structure, leaves), adapter
