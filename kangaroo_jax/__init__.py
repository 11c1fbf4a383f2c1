"""Kangaroo: lossless self-speculative decoding (arXiv 2404.18911) in JAX. The public names; start with `generate`."""

from kangaroo_jax.checkpoint.adapter import load_adapter
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import DraftConfig, EngineConfig, SamplingConfig, TreeConfig
from kangaroo_jax.engine.engine import Engine
from kangaroo_jax.engine.generate import Generation, generate, generate_many, generate_plain
from kangaroo_jax.engine.requests import Answer, Finished, Request, TextDelta
from kangaroo_jax.errors import InputError

__all__ = [
    "Answer",
    "DraftConfig",
    "Engine",
    "EngineConfig",
    "Finished",
    "Generation",
    "InputError",
    "Request",
    "SamplingConfig",
    "TextDelta",
    "TreeConfig",
    "generate",
    "generate_many",
    "generate_plain",
    "load_adapter",
    "load_target",
]
