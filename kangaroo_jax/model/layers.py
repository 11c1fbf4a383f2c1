"""The parts of a Llama decoder layer, as NNX modules that hold weights and functions of arrays.

Mirrors transformers' models/llama/modeling_llama.py, in its order of casts: norms, softmax and rotary angles in
float32, matrix products in the weights' dtype. Projections that read the same input are one matrix.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.model import cache as kv_cache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.rotary import rotary_angles

_INIT = nnx.initializers.normal(0.02)
_QUERIES_AT_ONCE = 256  # per sequence, of attention without a cache


@flax.struct.dataclass
class AttentionContext:
    """What all layers of one forward pass share: computed once, from positions and the cache's lengths."""

    cos: Float[Array, "batch time head_dim"]
    sin: Float[Array, "batch time head_dim"]
    mask: Bool[Array, "batch time keys"]  # True where a query may look
    start: Int[Array, " batch"] | None  # slot of the first new entry; None without a cache


def matmul(x: Float[Array, "... k"], weight: Float[Array, "k n"]) -> Float[Array, "... n"]:
    """x @ weight in the weight's dtype. float32 is float32 on every platform: TPUs and recent GPUs would otherwise
    multiply it in bfloat16 or TF32 passes."""
    return jnp.matmul(x, weight, precision=_precision(weight.dtype))


def _precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class RMSNorm(nnx.Module):
    def __init__(self, config: ModelConfig, dtype: jnp.dtype = jnp.float32):
        self.weight = nnx.Param(jnp.ones((config.hidden_size,), dtype))
        self.eps = config.rms_norm_eps

    def __call__(self, x: Float[Array, "... hidden"]) -> Float[Array, "... hidden"]:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * x32.astype(x.dtype)


def _rotate(x: Float[Array, "batch time heads head_dim"], context: AttentionContext) -> Array:
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * context.cos[:, :, None, :] + turned * context.sin[:, :, None, :]


def attend(
    query: Float[Array, "batch time kv_heads groups head_dim"],
    keys: Float[Array, "batch keys kv_heads head_dim"],
    values: Float[Array, "batch keys kv_heads head_dim"],
    mask: Bool[Array, "batch time keys"],
    *,
    chunk: int = _QUERIES_AT_ONCE,
) -> Float[Array, "batch time kv_heads groups head_dim"]:
    """Attention without a cache, as training takes it: the scores of `chunk` queries exist at once, also in the
    backward pass, which makes them anew. Batch and heads stay axes of their own, so that each can be sharded."""
    precision = _precision(query.dtype)

    @jax.checkpoint
    def some(query: Array, mask: Array) -> Array:
        scores = jnp.einsum("btkgd,bskd->bkgts", query, keys, precision=precision, preferred_element_type=jnp.float32)
        scores = jnp.where(mask[:, None, None], scores * query.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        return jnp.einsum("bkgts,bskd->btkgd", weights, values, precision=precision)

    batch, time = query.shape[:2]
    if time <= chunk:
        return some(query, mask)
    count = -(-time // chunk)

    def split(x: Array) -> Array:  # [batch, time, ...] -> [count, batch, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    mixed = jax.lax.map(lambda part: some(*part), (split(query), split(mask)))
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * chunk, *query.shape[2:])[:, :time]


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions.

    `qkv_proj` is [hidden, kv_heads, q_per_kv + 2, head_dim]: each key/value head's queries, key and value side by
    side, so one partition of the second axis shards it for any grouping.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        kv_heads, groups, head_dim = config.num_key_value_heads, config.queries_per_kv, config.head_dim
        shape = (config.hidden_size, kv_heads, groups + 2, head_dim)
        self.qkv_proj = nnx.Param(_INIT(rngs.params(), shape, dtype))
        self.qkv_bias = nnx.Param(jnp.zeros(shape[1:], dtype)) if config.qkv_bias else None
        self.o_proj = nnx.Param(_INIT(rngs.params(), (kv_heads * groups * head_dim, config.hidden_size), dtype))
        self.o_bias = nnx.Param(jnp.zeros((config.hidden_size,), dtype)) if config.o_bias else None

    def __call__(
        self,
        x: Float[Array, "batch time hidden"],
        context: AttentionContext,
        keys: Float[Array, "batch*kv_heads head_dim capacity"] | None,
        values: Float[Array, "batch*kv_heads capacity head_dim"] | None,
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        """Attends over the cache (after writing the new entries into it), or over `x` alone without one.

        Returns the output and the keys and values attended to.
        """
        batch, time, _ = x.shape
        hidden, kv_heads, rows, head_dim = self.qkv_proj.shape
        qkv = matmul(x, self.qkv_proj[...].reshape(hidden, -1)).reshape(batch, time, kv_heads, rows, head_dim)
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias[...]
        turned = _rotate(qkv[..., :-1, :].reshape(batch, time, -1, head_dim), context)
        turned = turned.reshape(batch, time, kv_heads, rows - 1, head_dim)
        if keys is None:
            keys, values = turned[..., -1, :], qkv[..., -1, :]
            return self._project(attend(turned[..., :-1, :], keys, values, context.mask)), keys, values
        groups, merged = rows - 2, batch * kv_heads  # batch and heads are one axis, as in the cache
        query = turned[..., :-1, :].transpose(0, 2, 3, 1, 4).reshape(merged, groups * time, head_dim)
        new_keys = turned[..., -1, :].transpose(0, 2, 3, 1).reshape(merged, head_dim, time)
        new_values = qkv[..., -1, :].transpose(0, 2, 1, 3).reshape(merged, time, head_dim)
        keys = kv_cache.write(keys, new_keys, context.start, axis=2)
        values = kv_cache.write(values, new_values, context.start, axis=1)
        precision = _precision(x.dtype)
        scores = jnp.einsum("nqd,nds->nqs", query, keys, precision=precision, preferred_element_type=jnp.float32)
        scores = scores.reshape(batch, kv_heads, groups, time, -1) * head_dim**-0.5
        scores = jnp.where(context.mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype).reshape(merged, groups * time, -1)
        mixed = jnp.einsum("nqs,nsd->nqd", weights, values, precision=precision)
        mixed = mixed.reshape(batch, kv_heads, groups, time, head_dim).transpose(0, 3, 1, 2, 4)
        return self._project(mixed), keys, values

    def _project(self, mixed: Float[Array, "batch time kv_heads groups head_dim"]) -> Float[Array, "batch time hidden"]:
        out = matmul(mixed.reshape(*mixed.shape[:2], -1), self.o_proj[...])
        return out if self.o_bias is None else out + self.o_bias[...]


class MLP(nnx.Module):
    """SwiGLU; `gate_up_proj` is [hidden, 2, intermediate]."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_up_proj = nnx.Param(_INIT(rngs.params(), (hidden, 2, width), dtype))
        self.gate_up_bias = nnx.Param(jnp.zeros((2, width), dtype)) if config.mlp_bias else None
        self.down_proj = nnx.Param(_INIT(rngs.params(), (width, hidden), dtype))
        self.down_bias = nnx.Param(jnp.zeros((hidden,), dtype)) if config.mlp_bias else None

    def __call__(self, x: Float[Array, "batch time hidden"]) -> Float[Array, "batch time hidden"]:
        # Not reshaped into a matrix: that would move a weight that is sharded along its last axis.
        weight = self.gate_up_proj[...]
        both = jnp.einsum("...h,hgi->...gi", x, weight, precision=_precision(weight.dtype))
        if self.gate_up_bias is not None:
            both = both + self.gate_up_bias[...]
        out = matmul(jax.nn.silu(both[..., 0, :]) * both[..., 1, :], self.down_proj[...])
        return out if self.down_bias is None else out + self.down_bias[...]


class DecoderLayer(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config, dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: Float[Array, "batch time hidden"], context: AttentionContext, keys: Array | None, values: Array | None
    ) -> tuple[Float[Array, "batch time hidden"], Array, Array]:
        mixed, keys, values = self.self_attn(self.input_layernorm(x), context, keys, values)
        x = x + mixed
        return x + self.mlp(self.post_attention_layernorm(x)), keys, values


def attention_context(
    config: ModelConfig,
    positions: Int[Array, "batch time"],
    cache: kv_cache.KVCache | None,
    mask: Bool[Array, "batch time keys"] | None,
    dtype: jnp.dtype,
) -> AttentionContext:
    """The shared part of a forward pass. `mask` replaces the causal one (over the cache's slots, or over the new
    positions without a cache)."""
    batch, time = positions.shape
    if cache is None:
        cos, sin = rotary_angles(config, positions, dtype)
    else:
        # Looked up: computed here, XLA would put the cosines into every layer's fusions and compute them in each.
        cos, sin = cache.cos[positions], cache.sin[positions]
    start = None if cache is None else cache.length
    if mask is None:
        first = jnp.zeros((batch,), jnp.int32) if cache is None else cache.length
        mask = kv_cache.causal_mask(first, time, time if cache is None else cache.capacity)
    return AttentionContext(cos, sin, mask, start)


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
            x, _, _ = layer(x, context, None, None)
        return x, None
    keys, values = list(cache.keys), list(cache.values)
    if len(keys) != len(layers):
        raise ValueError(f"the cache holds {len(keys)} layers, expected {len(layers)}")
    for i, layer in enumerate(layers):
        x, keys[i], values[i] = layer(x, context, keys[i], values[i])
    return x, cache.replace(keys=tuple(keys), values=tuple(values), length=cache.length + x.shape[1])
