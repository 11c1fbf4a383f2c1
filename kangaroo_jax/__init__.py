"""Kangaroo: lossless self-speculative decoding (arXiv 2404.18911) in JAX. The public names; start with `generate`."""

from kangaroo_jax.checkpoint.adapter import load_adapter
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import DraftConfig, SamplingConfig, TreeConfig
from kangaroo_jax.decode.autoregressive import generate_plain
from kangaroo_jax.decode.generate import generate
from kangaroo_jax.decode.host_loop import Answer, Generation
from kangaroo_jax.decode.many import Request, generate_many
from kangaroo_jax.errors import InputError

__all__ = [
    "Answer",
    "DraftConfig",
    "Generation",
    "InputError",
    "Request",
    "SamplingConfig",
    "TreeConfig",
    "generate",
    "generate_many",
    "generate_plain",
    "load_adapter",
    "load_target",
]
