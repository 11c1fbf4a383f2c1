"""Compiled programs, compiled ahead so that compilation is timed separately, and kept within a bound."""

from __future__ import annotations

import collections
import ctypes
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
from jaxtyping import PyTree

from kangaroo_jax import processor
from kangaroo_jax.errors import MachineError, one_line


class ProgramStore:
    """The programs used last.

    Args:
      limit: how many are kept. One of a small model takes about 13 MB of memory on a CPU.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._programs: collections.OrderedDict[Hashable, Callable[..., Any]] = collections.OrderedDict()

    def get(self, key: Hashable, build: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """The program of `key`, built where it is not here."""
        if key not in self._programs:
            while len(self._programs) >= self.limit:
                self._programs.popitem(last=False)
            self._programs[key] = build()
        self._programs.move_to_end(key)
        return self._programs[key]

    def clear(self) -> None:
        self._programs.clear()


# Each engine keeps its own. This one, for the process, serves calls that make an engine for one list of prompts, as
# `generate` does: the next call finds the programs of the last two shapes. More would fill the memory of a process
# that goes through many shapes.
SHARED = ProgramStore(limit=6)


_signatures: dict[Hashable, int] = {}


def signature(tree: PyTree, *static: Hashable) -> int:
    """A number for what programs depend on of the arrays they take (structure, shapes, dtypes, where and how they lie)
    and of `static` settings: equal for equal ones. A number, as hashing all of that takes a millisecond."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = tuple((x.shape, x.dtype, getattr(x, "format", None)) for x in leaves)
    return _signatures.setdefault((structure, arrays, *static), len(_signatures))


def compiler_options(platform: str) -> dict[str, Any]:
    """How programs of decoding are compiled for a platform, plain decoding's as well as Kangaroo's.

    By default XLA for TPU turns each product that has one row into multiplications and sums on the vector unit, 2.7
    times slower by its own estimate than on the matrix unit (docs/dev/accelerators.md). XLA for CPU gives products to
    YNNPACK, which on a processor with AVX2 takes up to twice as long for a few rows as Eigen
    (docs/dev/performance.md)."""
    if platform == "tpu":
        return {"xla_tpu_enable_dot_strength_reduction": False}
    if platform == "cpu" and processor.vectors_are_avx2():
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    return {}


def compile_program(
    function: Callable[..., Any],
    donated: tuple[int, ...],
    out_shardings: PyTree,
    platform: str,
    *args: Any,
    **static: Any,
) -> Callable[..., Any]:
    """`function` with `static` settings, compiled for arguments like `args`.

    Args:
      function: of arrays.
      donated: places of arguments whose memory the results may take.
      out_shardings: of the results, None for the compiler's choice. What is donated has to come back where it was, so
        that a program takes its own result.
      platform: of the devices.
      args: arrays, or their shapes.
      static: part of the program.

    Raises:
      MachineError: where the compiler does not know an option.
    """
    where = {} if out_shardings is None else {"out_shardings": out_shardings}
    jitted = jax.jit(functools.partial(function, **static), donate_argnums=donated, **where)
    lowered, options = jitted.lower(*args), compiler_options(platform)
    try:
        program = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if not any(name in str(error) for name in options):
            raise
        raise MachineError(
            f"the compiler for {platform} does not take {' or '.join(options)} ({one_line(error)}); install a "
            "jaxlib that pyproject.toml allows"
        ) from None
    _return_freed_memory()
    return program


def _return_freed_memory() -> None:
    """Gives the memory that compiling has freed back to the system: tens of MB each time, which glibc would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
