"""Kangaroo: lossless self-speculative decoding (arXiv 2404.18911) in JAX. The public names; start with `generate`.

They are imported at their first use: importing one module of the package does not import JAX and every library behind
the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kangaroo_jax.checkpoint.adapter import load_adapter
    from kangaroo_jax.checkpoint.huggingface import load_target
    from kangaroo_jax.config import DraftConfig, SamplingConfig, TreeConfig
    from kangaroo_jax.decode.autoregressive import generate_plain
    from kangaroo_jax.decode.generate import generate
    from kangaroo_jax.decode.host_loop import Answer, Generation
    from kangaroo_jax.decode.many import Request, generate_many
    from kangaroo_jax.errors import InputError

# As in the block above, which type checkers read.
_MODULES = {
    "Answer": "decode.host_loop",
    "DraftConfig": "config",
    "Generation": "decode.host_loop",
    "InputError": "errors",
    "Request": "decode.many",
    "SamplingConfig": "config",
    "TreeConfig": "config",
    "generate": "decode.generate",
    "generate_many": "decode.many",
    "generate_plain": "decode.autoregressive",
    "load_adapter": "checkpoint.adapter",
    "load_target": "checkpoint.huggingface",
}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
