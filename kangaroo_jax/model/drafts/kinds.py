"""The kinds of draft models that can be trained and loaded, by the name that checkpoints record."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.memory import MemoryAdapter

KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (Adapter, MemoryAdapter)}


def abstract_adapter(config: ModelConfig, dtype: jnp.dtype, num_layers: int = 1, kind: str = Adapter.kind) -> Adapter:
    """The draft model of a kind for a target with `config`, with shapes in place of weights."""
    return nnx.eval_shape(lambda: KINDS[kind](config, rngs=nnx.Rngs(0), dtype=dtype, num_layers=num_layers))
