"""The machine that a measurement ran on, and how fast it moves bytes and multiplies: the limits of every part."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kangaroo_jax import processor
from kangaroo_jax.engine.programs import compiler_options

_FEW_ROWS = 8


def describe(*packages: str) -> str:
    """One line: processor or accelerator, threads, and the versions of Python, JAX and the installed `packages`."""
    versions = [
        f"{package} {importlib.import_module(package).__version__}"
        for package in ("jax", *packages)
        if importlib.util.find_spec(package) is not None
    ]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name()}, {threads} threads, Python {platform.python_version()}, {', '.join(versions)}"


def name() -> str:
    """The processor, or the accelerator."""
    device = jax.devices()[0]
    return processor.name() if device.platform == "cpu" else device.device_kind


def memory_bytes() -> int:
    """The memory of the default device."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds_per_call(call: Callable[[], object], repeats: int = 7) -> float:
    """Median wall-clock seconds of a call, after one call that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(num_bytes: int, dtype: jnp.dtype) -> float:
    """Bytes per second at which the default device reads a working set of this size. It multiplies the matrices of the
    set with a vector, several times: the accesses of a plain step, with nothing between the products."""
    return num_bytes / _sweep_seconds(num_bytes, dtype, 1)


def few_rows_peak(num_bytes: int, dtype: jnp.dtype) -> float:
    """Floating-point operations per second of products of a few rows with a working set of this size: those of a
    verification, which on a CPU are far slower than large square ones."""
    return 2 * _FEW_ROWS * num_bytes / jnp.dtype(dtype).itemsize / _sweep_seconds(num_bytes, dtype, _FEW_ROWS)


def _sweep_seconds(num_bytes: int, dtype: jnp.dtype, rows: int) -> float:
    """Seconds of products of so many rows with matrices of `num_bytes`, one after another."""
    width = 1024 if num_bytes < 2**28 else 4096
    size = width * width * jnp.dtype(dtype).itemsize
    count = max(1, num_bytes // size)
    sweeps = max(2, 2**30 // (count * size * rows))
    matrices = [(jax.random.normal(jax.random.key(i), (width, width)) / width**0.5).astype(dtype) for i in range(count)]

    @functools.partial(jax.jit, compiler_options=compiler_options(jax.default_backend()))
    def sweep(x: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        def body(_: jax.Array, x: jax.Array) -> jax.Array:
            for matrix in matrices:
                x = x @ matrix
            return x

        return jax.lax.fori_loop(0, sweeps, body, x)

    x = jnp.ones((rows, width), dtype)
    return seconds_per_call(lambda: sweep(x, matrices)) / (sweeps * count * size) * num_bytes


def copy_bandwidth(num_bytes: int) -> float:
    """Bytes per second, read and written together, of elementwise passes over a float32 array of this size. In place:
    with a new array for the result, the allocation of its pages would be measured."""
    passes, x = 8, jnp.ones((num_bytes // 4,), jnp.float32)
    add = jax.jit(lambda x: jax.lax.fori_loop(0, passes, lambda _, x: x + 1, x), donate_argnums=0)
    held = [x]

    def call() -> jax.Array:
        held[0] = add(held[0])
        return held[0]

    return passes * 2 * num_bytes / seconds_per_call(call)


def matmul_peak(dtype: jnp.dtype) -> float:
    """Floating-point operations per second of a large square matrix product."""
    width = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.random.normal(jax.random.key(0), (width, width)).astype(dtype)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    return 2 * width**3 / seconds_per_call(lambda: product(x))
