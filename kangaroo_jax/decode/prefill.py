"""Prefill: the prompt through the whole model once, giving the first token and the caches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kangaroo_jax.decode.pick import pick_token
from kangaroo_jax.decode.sampling import TARGET, Sampler
from kangaroo_jax.decode.state import DecodeState, RoundStats
from kangaroo_jax.model.adapter import Adapter, adapter_apply
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply


def bucket(length: int, step: int) -> int:
    """The smallest multiple of `step` that holds `length`: few shapes, so few compilations."""
    return -(-length // step) * step


def prefill(
    target: TargetModel,
    adapter: Adapter | None,
    tokens: Int[Array, "batch time"],
    lengths: Int[Array, " batch"],
    max_output: Int[Array, " batch"],
    eos_token_ids: Int[Array, " eos"],
    sampler: Sampler | None = None,
    *,
    exit_layer: int,
    capacity: int,
    room: int,
) -> DecodeState:
    """Processes prompts and commits each one's first token.

    Args:
      target: the model.
      adapter: None for plain decoding.
      tokens: prompts, padded on the right.
      lengths: of the prompts, at least 1.
      max_output: most new tokens per sequence, at least 1.
      eos_token_ids: tokens that end a sequence.
      sampler: None for greedy decoding.
      exit_layer: l, static.
      capacity: of the caches, static: prompt, new tokens and a round beyond them.
      room: of the output buffers, static: new tokens and a round beyond them.
    """
    with jax.named_scope("prefill"):
        batch, time = tokens.shape
        config, dtype = target.config, target.dtype
        positions = jnp.broadcast_to(jnp.arange(time), (batch, time))
        # The prompt attends to a buffer of its own length; room for the answer is added after.
        shallow, deep = (
            KVCache.empty(config, layers, batch, time, dtype)
            for layers in (exit_layer, config.num_hidden_layers - exit_layer)
        )
        hidden, shallow = shallow_apply(target, tokens, positions, shallow, exit_layer=exit_layer)
        normed, deep = deep_apply(target, hidden, positions, deep, exit_layer=exit_layer)
        adapter_cache = None
        if adapter is not None:
            adapter_cache = KVCache.empty(config, 1, batch, time, dtype)
            _, adapter_cache = adapter_apply(adapter, hidden, positions, adapter_cache)
            adapter_cache = adapter_cache.grown(config, capacity).replace(length=lengths - 1)
        last = (lengths - 1)[:, None, None]
        logits = lm_head(target, jnp.take_along_axis(normed, last, axis=1)[:, 0])
        token, _ = pick_token(logits, sampler, lengths, TARGET)
        ended = jnp.any(token[:, None] == eos_token_ids, axis=-1)
        return DecodeState(
            token=token,
            shallow_hidden=jnp.take_along_axis(hidden, last, axis=1),
            shallow=shallow.grown(config, capacity).replace(length=lengths),
            deep=deep.grown(config, capacity).replace(length=lengths),
            adapter=adapter_cache,
            output=jnp.zeros((batch, room), jnp.int32).at[:, 0].set(token),
            num_output=jnp.ones((batch,), jnp.int32),
            max_output=max_output,
            finished=ended | (max_output <= 1),
            stats=RoundStats.empty(batch, room),
            sampler=sampler,
        )


def empty_slots(
    target: TargetModel,
    adapter: Adapter | None,
    sampler: Sampler | None,
    batch: int,
    *,
    exit_layer: int,
    capacity: int,
    room: int,
) -> DecodeState:
    """A state whose sequences all idle, for `prefill_into`. Arguments as for `prefill`; the sampler's keys are
    placeholders."""
    config, dtype = target.config, target.dtype
    one = jnp.ones((batch,), jnp.int32)  # idle sequences read and write within their own row, whatever it holds
    shallow, deep, adapter_cache = (
        KVCache.empty(config, layers, batch, capacity, dtype)
        for layers in (exit_layer, config.num_hidden_layers - exit_layer, 1)
    )
    return DecodeState(
        token=jnp.zeros((batch,), jnp.int32),
        shallow_hidden=jnp.zeros((batch, 1, config.hidden_size), dtype),
        shallow=shallow.replace(length=one),
        deep=deep.replace(length=one + 0),  # donated, so no two may share a buffer
        adapter=None if adapter is None else adapter_cache,
        output=jnp.zeros((batch, room), jnp.int32),
        num_output=jnp.zeros((batch,), jnp.int32),
        max_output=jnp.zeros((batch,), jnp.int32),
        finished=jnp.ones((batch,), bool),
        stats=RoundStats.empty(batch, room),
        sampler=sampler,
    )


def prefill_into(
    target: TargetModel,
    adapter: Adapter | None,
    state: DecodeState,
    slot: Int[Array, ""],
    tokens: Int[Array, "1 time"],
    length: Int[Array, " 1"],
    max_output: Int[Array, " 1"],
    eos_token_ids: Int[Array, " eos"],
    sampler: Sampler | None,
    *,
    exit_layer: int,
) -> DecodeState:
    """Processes one prompt, and puts it where sequence `slot` was; the other sequences stay as they are.

    Only what the prompt fills is written: what lies beyond it in the slot's row is masked, and overwritten later.
    With `state` donated, in place.

    Args:
      target: the model.
      adapter: None for plain decoding.
      state: whose caches hold `time` positions or more.
      slot: which sequence to replace.
      tokens: the prompt, padded on the right.
      length: of the prompt, at least 1.
      max_output: most new tokens, at least 1.
      eos_token_ids: tokens that end a sequence.
      sampler: of this sequence; None for greedy decoding.
      exit_layer: l, static.
    """
    time = tokens.shape[1]
    new = prefill(
        target,
        adapter,
        tokens,
        length,
        max_output,
        eos_token_ids,
        sampler,
        exit_layer=exit_layer,
        capacity=time,
        room=1,
    )

    def put(buffer: Array, row: Array) -> Array:
        # The first axis is the batch, or batch and heads.
        return jax.lax.dynamic_update_slice(buffer, row, (slot * row.shape[0], *[0] * (row.ndim - 1)))

    def put_cache(cache: KVCache, row: KVCache) -> KVCache:
        keys, values = (tuple(map(put, *pair)) for pair in ((cache.keys, row.keys), (cache.values, row.values)))
        return cache.replace(keys=keys, values=values, length=put(cache.length, row.length))

    # Spelled out, not `replace`, so that no part of a state can be forgotten.
    return DecodeState(
        token=put(state.token, new.token),
        shallow_hidden=put(state.shallow_hidden, new.shallow_hidden),
        shallow=put_cache(state.shallow, new.shallow),
        deep=put_cache(state.deep, new.deep),
        adapter=None if adapter is None else put_cache(state.adapter, new.adapter),
        output=put(state.output, new.output),
        num_output=put(state.num_output, new.num_output),
        max_output=put(state.max_output, new.max_output),
        finished=put(state.finished, new.finished),
        stats=jax.tree.map(put, state.stats, new.stats),
        sampler=None if sampler is None else state.sampler.replace(keys=put(state.sampler.keys, sampler.keys)),
    )
