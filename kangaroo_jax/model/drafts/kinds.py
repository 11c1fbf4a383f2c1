"""The kinds of draft models that can be trained and loaded, by the name that checkpoints record."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.memory import MemoryAdapter

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (Adapter, MemoryAdapter)}


def abstract_adapter(config: ModelConfig, dtype: jnp.dtype, shape: AdapterConfig) -> Adapter:
    """The draft model of that kind and shape for a target with `config`, with shapes in place of weights."""
    sizes = {"num_layers": shape.num_layers, "mlp_size": shape.mlp_size}
    return nnx.eval_shape(lambda: KINDS[shape.kind](config, rngs=nnx.Rngs(0), dtype=dtype, **sizes))
