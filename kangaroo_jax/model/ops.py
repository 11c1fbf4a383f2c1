"""The products of weights: every one goes through here, so that what a weight is stored as is decided in one place."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kangaroo_jax import processor
from kangaroo_jax.model.columns import ColumnArray
from kangaroo_jax.model.quantized import QuantizedArray

Stored = ColumnArray | QuantizedArray  # what a weight may be in place of an array

_BLOCK = 1 << 16  # values; 256 KiB in float32, which stays in a core's cache
_FEW_ROWS = 64  # of activations: with more, computing takes longer than moving the weights


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 is float32 on every platform: TPUs and recent GPUs would otherwise multiply it in bfloat16 or TF32."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def dot(
    spec: str, x: Float[Array, ...], weight: Float[Array, ...] | Stored, accumulate: jnp.dtype | None = None
) -> Float[Array, ...]:
    """`jnp.einsum(spec, x, weight)` in the dtype of `x`, whatever the weight is stored as.

    int8 values are exact in every float dtype; their products are accumulated, and scaled, in float32. Where an output
    has more than one scale, the weight is scaled before it is multiplied, and rounded to the dtype of `x`.

    Args:
      spec: of the product, for example "...k,kn->...n". The last axis of `x` is multiplied with one of the weight's,
        and the weight's others, in their order, end the result.
      x: activations, in the dtype that is computed in.
      weight: of any float dtype, as columns, or quantized.
      accumulate: dtype of the result; that of `x` if None.
    """
    if isinstance(weight, ColumnArray):
        outputs = _product("...k,kn->...n", x, weight.columns, accumulate)[..., : math.prod(weight.outputs)]
        return outputs.reshape(*x.shape[:-1], *weight.outputs)
    if not isinstance(weight, QuantizedArray):
        return _product(spec, x, weight, accumulate)
    num_rows = x.size // x.shape[-1]
    if weight.product == "blocks" and num_rows <= _FEW_ROWS:
        outputs = _product_in_blocks(spec, x, weight)
    elif weight.product == "pairs" and num_rows == 1:
        outputs = _product(spec, jnp.concatenate([x, x]), _multiplied(weight), jnp.float32)[:1]
    else:
        outputs = _product(spec, x, _multiplied(weight), jnp.float32)
    if not weight.in_blocks:
        # The axis of the inputs, of size 1, is not among the result's.
        weight_axes, result = spec.split(",")[1].split("->")
        outputs *= weight.scales.reshape(
            [size for axis, size in zip(weight_axes, weight.shape, strict=True) if axis in result]
        )
    return outputs.astype(x.dtype if accumulate is None else accumulate)


def rows(
    weight: Float[Array, "rows width"] | Stored, index: Int[Array, "*shape"], dtype: jnp.dtype
) -> Float[Array, "*shape w"]:
    """Rows of a table of weights, such as an embedding, in the dtype that is computed in."""
    if not isinstance(weight, QuantizedArray):
        return weight[index].astype(dtype)
    if weight.product == "pairs" and index.size == 1:
        return rows(weight, jnp.concatenate([index, index]), dtype)[:1]
    return weight[index].as_array().astype(dtype)


def as_arrays(tree: PyTree) -> PyTree:
    """The same with an array for each weight that is stored otherwise."""

    def is_stored(x: Any) -> bool:
        return isinstance(x, Stored)

    return jax.tree.map(lambda x: x.as_array() if is_stored(x) else x, tree, is_leaf=is_stored)


def _product(spec: str, x: Array, weight: Array, accumulate: jnp.dtype | None) -> Array:
    def as_stored(x: Array, weight: Array) -> Array:
        return jnp.einsum(
            spec, x, weight.astype(x.dtype), precision=precision(x.dtype), preferred_element_type=accumulate
        )

    x_axes, weight_axes = spec.split("->")[0].split(",")
    inputs_last = len(weight_axes) == 2 and weight_axes[-1] == x_axes[-1]
    if inputs_last and 1 < x.size // x.shape[-1] <= _FEW_ROWS and processor.vectors_are_avx2():
        return jax.lax.platform_dependent(
            x, weight, cpu=functools.partial(_product_from_left, accumulate=accumulate), default=as_stored
        )
    return as_stored(x, weight)


def _product_from_left(
    x: Float[Array, "*rows inputs"], weight: Float[Array, "outputs inputs"], accumulate: jnp.dtype | None
) -> Float[Array, "*rows outputs"]:
    """The product with the weight as the left operand, of few rows on a processor with AVX2: a third to half less time
    than `x @ weight.T`, into which XLA turns it without the barriers. Two rows are padded to three, which are faster.
    (docs/dev/performance.md)"""
    rows = x.reshape(-1, x.shape[-1])
    columns = jax.lax.optimization_barrier(jnp.pad(rows, ((0, max(0, 3 - len(rows))), (0, 0))).T)
    outputs = jnp.matmul(
        weight.astype(x.dtype), columns, precision=precision(x.dtype), preferred_element_type=accumulate
    )
    outputs = jax.lax.optimization_barrier(outputs)[:, : len(rows)]
    return outputs.T.reshape(*x.shape[:-1], len(weight))


def _multiplied(weight: QuantizedArray) -> Array:
    """What activations are multiplied by: the values, where their products can be scaled after."""
    return weight.as_array() if weight.in_blocks else weight.values


def _product_in_blocks(spec: str, x: Array, weight: QuantizedArray) -> Float[Array, ...]:
    """`_product` in float32, a block along the first axis of the weight at a time.

    XLA for CPU calls a library for a product, and converts all of the weight in memory before it: more bytes than
    weights in float32 have. Of a block, the conversion stays in the cache. (docs/dev/int8.md)
    """
    size, scaled = weight.shape[0], weight.first_block
    block = max(1, _BLOCK * size // weight.values.size // scaled) * scaled
    count, rest = divmod(size, block)
    if count < 2:
        return _product(spec, x, _multiplied(weight), jnp.float32)
    weight_axes, result = spec.split(",")[1].split("->")

    def of(start: int | Array, length: int, inputs: Array) -> Array:
        part = weight.sliced(start, length)
        # One scale may be left in a part of a weight in blocks: not one that its products can be scaled by.
        return _product(spec, inputs, part.as_array() if weight.in_blocks else part.values, jnp.float32)

    if weight_axes[0] in result:  # each block gives outputs of its own

        def put(outputs: Array, start: int | Array, length: int) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(outputs, of(start, length, x), start, axis=-1)

        outputs = jnp.zeros((*x.shape[:-1], size), jnp.float32)
    else:  # each block takes inputs of its own

        def put(outputs: Array, start: int | Array, length: int) -> Array:
            return outputs + of(start, length, jax.lax.dynamic_slice_in_dim(x, start, length, axis=-1))

        outputs = jnp.zeros((*x.shape[:-1], *weight.shape[1:]), jnp.float32)
    outputs = jax.lax.fori_loop(0, count, lambda i, outputs: put(outputs, i * block, block), outputs)
    return put(outputs, count * block, rest) if rest else outputs
