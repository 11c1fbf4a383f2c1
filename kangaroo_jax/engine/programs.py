"""Compiled programs, compiled ahead so that compilation is timed separately, and kept within a bound."""

from __future__ import annotations

import collections
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import PyTree


class ProgramStore:
    """The programs used last.

    Args:
      limit: how many are kept. One of a small model takes a few MB of memory.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._programs: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()

    def get(self, key: Hashable, build: Callable[[], Callable[..., Any]]) -> tuple[Callable[..., Any], float]:
        """The program of `key`, and the seconds that compiling it took: 0 where it is here."""
        if key in self._programs:
            self._programs.move_to_end(key)
            return self._programs[key], 0.0
        start = time.perf_counter()
        self._programs[key] = build()
        while len(self._programs) > self._limit:
            self._programs.popitem(last=False)
        return self._programs[key], time.perf_counter() - start

    def clear(self) -> None:
        self._programs.clear()


# One for the process: engines for the same weights' shapes share programs.
STORE = ProgramStore(limit=32)


def signature(tree: PyTree) -> Hashable:
    """What a program depends on of the arrays it takes: structure, shapes, dtypes, and where and how they lie."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((x.shape, str(x.dtype), getattr(x, "format", None)) for x in leaves)


def compile_program(
    function: Callable[..., Any], donated: tuple[int, ...], out_shardings: PyTree, *args: Any, **static: Any
) -> Callable[..., Any]:
    """`function` with `static` settings, compiled for arguments like `args`.

    Args:
      function: of arrays.
      donated: places of arguments whose memory the results may take.
      out_shardings: of the results, None for the compiler's choice. What is donated has to come back where it was, so
        that a program takes its own result.
      args: arrays, or their shapes.
      static: part of the program.
    """
    where = {} if out_shardings is None else {"out_shardings": out_shardings}
    return jax.jit(functools.partial(function, **static), donate_argnums=donated, **where).lower(*args).compile()
