"""Kangaroo: lossless self-speculative decoding (arXiv 2404.18911) in JAX. The public names; start with `generate`.

They are imported at their first use: importing one module of the package does not import JAX and every library behind
the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kangaroo_jax.checkpoint.adapter import load_adapter
    from kangaroo_jax.checkpoint.target import load_target
    from kangaroo_jax.config import DecideConfig, DraftConfig, EngineConfig, LookupConfig, SamplingConfig, TreeConfig
    from kangaroo_jax.engine.conversation import Conversation
    from kangaroo_jax.engine.engine import Engine
    from kangaroo_jax.engine.generate import Generation, generate, generate_many, generate_plain
    from kangaroo_jax.engine.requests import Answer, Finished, Request, TextDelta
    from kangaroo_jax.errors import InputError, MachineError

# As in the block above, which type checkers read.
_MODULES = {
    "Answer": "engine.requests",
    "Conversation": "engine.conversation",
    "DecideConfig": "config",
    "DraftConfig": "config",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "Finished": "engine.requests",
    "Generation": "engine.generate",
    "InputError": "errors",
    "LookupConfig": "config",
    "MachineError": "errors",
    "Request": "engine.requests",
    "SamplingConfig": "config",
    "TextDelta": "engine.requests",
    "TreeConfig": "config",
    "generate": "engine.generate",
    "generate_many": "engine.generate",
    "generate_plain": "engine.generate",
    "load_adapter": "checkpoint.adapter",
    "load_target": "checkpoint.target",
}

__all__ = [
    "Answer",
    "Conversation",
    "DecideConfig",
    "DraftConfig",
    "Engine",
    "EngineConfig",
    "Finished",
    "Generation",
    "InputError",
    "LookupConfig",
    "MachineError",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next use finds it without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
