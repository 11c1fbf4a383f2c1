"""How near the plain step comes to the memory's limit, and what the cache's size does to it."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.autoregressive import plain_round
from kangaroo_jax.decode.prefill import prefill
from kangaroo_jax.decode.state import DecodeState

_STEPS = 64  # plain steps in one timed call


def seconds_per_call(call: Callable[[], object], repeats: int = 7) -> float:
    """Median wall-clock of a call, after one that is not counted."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_bandwidth(num_bytes: int) -> float:
    """Bytes per second at which the default device reads a float32 working set of this size, by multiplying matrices
    of it with a vector, repeatedly: the access pattern of a plain step without anything between the products."""
    width = 1024
    count = max(1, num_bytes // (4 * width * width))
    matrices = [jax.random.normal(jax.random.key(i), (width, width)) / width**0.5 for i in range(count)]

    @jax.jit
    def sweep(x: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        def body(_: jax.Array, x: jax.Array) -> jax.Array:
            for matrix in matrices:
                x = x @ matrix
            return x

        return jax.lax.fori_loop(0, 20, body, x)

    return 20 * count * 4 * width * width / seconds_per_call(lambda: sweep(jnp.ones((1, width)), matrices))


def step_bytes(target: Target) -> int:
    """Weight bytes that a plain step reads: all but the embedding, of which it reads one row; a tied one is read as
    the head."""
    model = target.model
    total = sum(x.nbytes for x in jax.tree.leaves(model))
    return total if model.lm_head is None else total - model.embed_tokens[...].nbytes


def cache_bytes(target: Target, capacity: int) -> int:
    """Cache bytes that a plain step's attention reads: the whole buffer, whatever part of it is valid."""
    config = target.config
    row = config.num_key_value_heads * config.head_dim * target.model.dtype.itemsize
    return 2 * config.num_hidden_layers * capacity * row


def plain_step_seconds(target: Target, capacity: int, valid: int) -> float:
    """Seconds of one plain step with `valid` tokens in caches with room for `capacity`, averaged over 64 steps in one
    call."""
    tokens = np.arange(valid, dtype=np.int32)[None] % target.config.vocab_size
    no_eos = np.zeros((0,), np.int32)
    start = prefill(
        target.model,
        None,
        tokens,
        np.asarray([valid], np.int32),
        np.asarray([_STEPS + 2], np.int32),
        no_eos,
        exit_layer=1,
        capacity=capacity,
        room=_STEPS + 4,
    )

    @functools.partial(jax.jit, donate_argnums=1)
    def steps(model: object, state: DecodeState) -> DecodeState:
        round_ = functools.partial(plain_round, model, None, eos_token_ids=no_eos, threshold=jnp.float32(0))
        return jax.lax.fori_loop(0, _STEPS, lambda _, s: round_(s), state)

    def fresh() -> DecodeState:
        return jax.block_until_ready(jax.tree.map(jnp.copy, start))

    jax.block_until_ready(steps(target.model, fresh()))
    times = []
    for _ in range(7):
        state = fresh()
        begin = time.perf_counter()
        jax.block_until_ready(steps(target.model, state))
        times.append((time.perf_counter() - begin) / _STEPS)
    return statistics.median(times)
