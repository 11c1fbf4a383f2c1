"""The parts of decoder layers, as NNX modules that hold weights and functions of arrays.

Mirrors transformers' models/llama/modeling_llama.py, in its order of casts: norms, softmax and rotary angles in
float32, matrix products in the weights' dtype. Projections that read the same input are one matrix. What other families
compute otherwise, `ModelConfig` says; no part knows of families.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model import cache as kv_cache
from kangaroo_jax.model import sharding
from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.attention.uncached import attend
from kangaroo_jax.model.config import AttentionKind, ModelConfig, Rotary
from kangaroo_jax.model.ops import dot
from kangaroo_jax.model.rotary import rotary_angles

INIT = nnx.initializers.normal(0.02)


@flax.struct.dataclass
class AttentionContext:
    """What all layers of one forward pass share: computed once, from positions and the cache's lengths.

    Layers with the same window, and as many places in their buffers, see the same: such a pair is a view."""

    rotaries: tuple[Rotary, ...] = flax.struct.field(pytree_node=False)  # that any of the layers has
    angles: tuple[tuple[Float[Array, "batch time turned"], Float[Array, "batch time turned"]], ...]  # of each, cos, sin
    # Window, and places of the buffer, None without a cache; that any of the layers has.
    views: tuple[tuple[int | None, int | None], ...] = flax.struct.field(pytree_node=False)
    masks: tuple[Bool[Array, "batch time keys"], ...]  # of each view, True where a query may look
    # Of each view that is a ring while a prompt is prefilled, the places of ring and piece that the ring keeps.
    kept: tuple[Int[Array, "batch places"] | None, ...]
    start: Int[Array, " batch"] | None  # position of the first new entry in the cache; None without a cache
    backend: AttentionBackend | None = flax.struct.field(pytree_node=False)  # None without a cache
    capacity: int | None = flax.struct.field(pytree_node=False)  # the cache's; likewise
    in_prompt: Bool[Array, "batch time"] | None = None  # whose values may be other than numbers in the cache

    def turn(self, x: Float[Array, "batch time heads head_dim"], kind: AttentionKind) -> Array:
        """`x` turned by its positions."""
        if kind.rotary is None:
            return x
        cos, sin = self.angles[self.rotaries.index(kind.rotary)]
        still = x[..., cos.shape[-1] :]
        x = x[..., : cos.shape[-1]]
        first, second = jnp.split(x, 2, axis=-1)
        turned = x * cos[:, :, None, :] + jnp.concatenate([-second, first], axis=-1) * sin[:, :, None, :]
        return turned if still.shape[-1] == 0 else jnp.concatenate([turned, still], axis=-1)


class RMSNorm(nnx.Module):
    """Of hidden states, or of `size` values."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32, size: int | None = None):
        self.offset, self.in_float32 = config.norm_offset, config.norm_in_float32
        self.weight = nnx.Param(jnp.full((size or config.hidden_size,), 1 - self.offset, dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.in_float32:
            return ((self.offset + self.weight[...].astype(jnp.float32)) * x32).astype(x.dtype)
        return self.weight[...].astype(x.dtype) * x32.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions, of one kind.

    `qkv_proj` is [hidden, kv_heads, q_per_kv + 2, head_dim]: each key/value head's queries, key and value side by
    side, so one partition of the second axis shards it for any grouping.
    """

    def __init__(self, config: ModelConfig, kind: AttentionKind, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.kind, self.scale, self.soft_cap = kind, config.attention_scale, config.attention_soft_cap
        kv_heads, groups, head_dim = config.num_key_value_heads, config.queries_per_kv, config.head_dim
        shape = (config.hidden_size, kv_heads, groups + 2, head_dim)
        self.qkv_proj = nnx.Param(INIT(rngs.params(), shape, dtype))
        self.qkv_bias = nnx.Param(jnp.zeros(shape[1:], dtype)) if config.qkv_bias else None
        self.o_proj = nnx.Param(INIT(rngs.params(), (kv_heads * groups * head_dim, config.hidden_size), dtype))
        self.o_bias = nnx.Param(jnp.zeros((config.hidden_size,), dtype)) if config.o_bias else None
        self.norms_heads = config.query_key_norm == "head"
        sizes = (head_dim,) * 2 if self.norms_heads else (kv_heads * groups * head_dim, kv_heads * head_dim)
        has_norms = config.query_key_norm is not None
        self.q_norm, self.k_norm = (RMSNorm(config, dtype, size) if has_norms else None for size in sizes)

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        context: AttentionContext,
        keys: Array | None,
        values: Array | None,
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        """Attends over the cache (after writing the new entries into it), or over `x` alone without one.

        Returns the output and the keys and values attended to.
        """
        batch, time, _ = x.shape
        hidden, kv_heads, rows, head_dim = self.qkv_proj.shape
        qkv = dot("...k,kn->...n", x, self.qkv_proj[...].reshape(hidden, -1))
        qkv = qkv.reshape(batch, time, kv_heads, rows, head_dim)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...].astype(x.dtype)
        turned = qkv[..., :-1, :]
        if self.q_norm is not None:
            parts = self._normed(self.q_norm, turned[..., :-1, :]), self._normed(self.k_norm, turned[..., -1:, :])
            turned = jnp.concatenate(parts, axis=-2)
        turned = context.turn(turned.reshape(batch, time, -1, head_dim), self.kind)
        turned = turned.reshape(batch, time, kv_heads, rows - 1, head_dim)
        query, new_keys, new_values = turned[..., :-1, :], turned[..., -1, :], qkv[..., -1, :]
        backend, how = context.backend, {"scale": self.scale, "soft_cap": self.soft_cap}
        places = None if keys is None else backend.capacity(values)
        view = context.views.index((self.kind.window, places))
        mask, kept = context.masks[view], context.kept[view]
        if keys is None:
            return self._project(attend(query, new_keys, new_values, mask, **how)), new_keys, new_values
        # See `KVCache`. A position whose value is not a number still gets what it would get with it: NaN.
        is_number = jnp.isfinite(new_values)
        cached = is_number if context.in_prompt is None else is_number | context.in_prompt[:, :, None, None]
        new_values = jnp.where(cached, new_values, 0)
        if kept is None:
            wraps = places < context.capacity
            keys, values = backend.write(keys, values, new_keys, new_values, context.start, wraps=wraps)
            mixed = backend.attend(query, keys, values, mask, **how)
        else:
            # A prompt's piece may be longer than the ring, and its first tokens see what its last ones overwrite.
            both = backend.resize(keys, values, places + time)
            both = backend.write(*both, new_keys, new_values, jnp.full((batch,), places))
            mixed = backend.attend(query, *both, mask, **how)
            keys, values = backend.take(*both, kept)
        return self._project(jnp.where(is_number[:, :, :, None], mixed, jnp.nan)), keys, values

    def _normed(self, norm: RMSNorm, x: Float[Array, "batch time kv_heads rows head_dim"]) -> Array:
        return norm(x) if self.norms_heads else norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)

    def _project(self, mixed: Float[Array, "batch time kv_heads groups head_dim"]) -> Float[Array, "batch time hidden"]:
        out = dot("...k,kn->...n", mixed.reshape(*mixed.shape[:2], -1), self.o_proj[...])
        return out if self.o_bias is None else out + self.o_bias[...].astype(out.dtype)


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """A gated MLP (SwiGLU, GeGLU); `gate_up_proj` is [hidden, 2, intermediate]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        hidden, width = config.hidden_size, config.intermediate_size
        self.activation = config.activation
        self.gate_up_proj = nnx.Param(INIT(rngs.params(), (hidden, 2, width), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((2, width), dtype)) if config.mlp_bias else None
        self.down_proj = nnx.Param(INIT(rngs.params(), (width, hidden), dtype))
        self.down_bias = nnx.Param(jnp.zeros((hidden,), dtype)) if config.mlp_bias else None

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        # Not reshaped into a matrix: that would move a weight that is sharded along its last axis.
        both = dot("...h,hgi->...gi", x, self.gate_up_proj[...])
        if self.gate_up_bias is not None:
            both = both + self.gate_up_bias[...].astype(x.dtype)
        gated = _ACTIVATIONS[self.activation](both[..., 0, :]) * both[..., 1, :]
        out = dot("...k,kn->...n", gated, self.down_proj[...])
        return out if self.down_bias is None else out + self.down_bias[...].astype(out.dtype)


def added(
    multiplier: float, x: Float[Array, "batch time hidden"], more: Float[Array, "batch time hidden"]
) -> Float[Array, "batch time hidden"]:
    """`more` added to the residual stream, multiplied first, by a float32 whatever the dtype, as PyTorch does."""
    return x + more if multiplier == 1 else x + (more.astype(jnp.float32) * multiplier).astype(more.dtype)


class DecoderLayer(nnx.Module):
    """A norm before attention and one before the MLP. `index` says which of the model's layers it is."""

    def __init__(self, config: ModelConfig, index: int, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.residual_multiplier = config.residual_multiplier
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, config.attention_kinds[index], rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), context, keys, values)
        x = added(self.residual_multiplier, x, mixed)
        return added(self.residual_multiplier, x, self.mlp(self.post_attention_layernorm(x))), keys, values


def attention_context(
    kinds: Sequence[AttentionKind],
    positions: Int[Array, "batch time"],
    cache: kv_cache.KVCache | None,
    mask: Bool[Array, "batch time time"] | kv_cache.DraftMask | None,
    dtype: jnp.dtype,
) -> AttentionContext:
    """The shared part of a forward pass through layers with attention of these kinds, one each. `mask` replaces the
    causal one: a `DraftMask` with a cache, and without one an array over the new positions."""
    batch, time = positions.shape
    rotaries = tuple(dict.fromkeys(kind.rotary for kind in kinds if kind.rotary is not None))
    angles = tuple(rotary_angles(rotary, positions, dtype) for rotary in rotaries)
    if cache is not None and angles:
        # Kept out of the layers' fusions, where XLA would compute the cosines again in each.
        angles = jax.lax.optimization_barrier(angles)
    start = None if cache is None else cache.length
    in_prompt = None
    if cache is not None and cache.prompt_end is not None and not cache.numbers_only:
        offsets = jnp.arange(time)  # not `positions`, which may be others than the places in the cache
        in_prompt = start[:, None] + offsets < cache.prompt_end[:, None]
    if cache is None:
        mask = kv_cache.causal_mask(jnp.zeros((batch,), jnp.int32), time, time) if mask is None else mask
        views = tuple(dict.fromkeys((kind.window, None) for kind in kinds))
        masks = tuple(mask if window is None else kv_cache.within_window(mask, window) for window, _ in views)
        return AttentionContext(rotaries, angles, views, masks, (None,) * len(views), None, None, None)
    if len(cache.values) != len(kinds):
        raise ValueError(f"the cache holds {len(cache.values)} layers, expected {len(kinds)}")
    places = map(cache.backend.capacity, cache.values)
    views = tuple(dict.fromkeys((kind.window, count) for kind, count in zip(kinds, places, strict=True)))
    masks, kept = zip(*(_view(*view, time, cache, mask) for view in views), strict=True)
    return AttentionContext(rotaries, angles, views, masks, kept, start, cache.backend, cache.capacity, in_prompt)


def _view(
    window: int | None, places: int, time: int, cache: kv_cache.KVCache, mask: kv_cache.DraftMask | None
) -> tuple[Bool[Array, "batch time keys"], Int[Array, "batch places"] | None]:
    """A view's mask, and what its ring keeps (`AttentionContext.kept`)."""
    start, end = cache.length, cache.prompt_end
    if places == cache.capacity or end is None:
        needed = time if mask is None else mask.visible.shape[-1]
        if places < cache.capacity and places < window + needed - 1:
            raise ValueError(f"a ring of {places} positions lacks room for {needed} beside a window of {window}")
        if mask is not None:
            return mask.all_places if window is None else mask.windowed(places, window), None
        if window is None:
            return kv_cache.causal_mask(start, time, places), None
        return kv_cache.windowed_mask(start, time, places, window), None
    return kv_cache.piece_mask(start, time, places, window), kv_cache.places_after_piece(start, end, places)


# Traced once for all layers that are alike; XLA inlines the calls. Tracing them one by one took most of the time that
# a process needs before its first token where the programs are in the compilation cache.
@jax.jit
def _layer(
    layer: nnx.Module,
    x: Float[Array, "batch time hidden"],
    context: AttentionContext,
    keys: Array | None,
    values: Array | None,
) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
    if isinstance(context.backend, DenseBackend) and context.backend.alone:
        layer = sharding.in_order(layer, context.backend.platform)
    return layer(x, context, keys, values)


def apply_layers(
    layers: tuple[nnx.Module, ...],
    x: Float[Array, "batch time hidden"],
    context: AttentionContext,
    cache: kv_cache.KVCache | None,
) -> tuple[Float[Array, "batch time hidden"], kv_cache.KVCache | None]:
    """Runs the layers in order; the returned cache holds the new entries and counts them in its length."""
    # A Python loop, not a scan: a scan over stacked weights would slice or copy them at every step.
    if cache is None:
        for layer in layers:
            x, _, _ = _layer(layer, x, context, None, None)
        return x, None
    keys, values = list(cache.keys), list(cache.values)
    for i, layer in enumerate(layers):
        x, keys[i], values[i] = _layer(layer, x, context, keys[i], values[i])
    return x, cache.replace(keys=tuple(keys), values=tuple(values), length=cache.length + x.shape[1])
