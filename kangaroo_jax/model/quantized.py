"""Weights in int8: symmetric, one scale for each output channel, or on a CPU for each block of its inputs where a file
has them so. Activations stay floats."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

WEIGHTS = ("float", "int8")

# The matrices of a model, by the end of their paths: all that `ops.dot` and `ops.rows` take. Norms and biases stay as
# they are.
_MATRIX = re.compile(r"(^|\.)(embed_tokens|lm_head|\w+_proj)$")
_TABLE = re.compile(r"(^|\.)(embed_tokens|lm_head)$")  # [outputs, inputs]; all others have their inputs first
_LARGEST = 127  # -128 is not used: the range is symmetric
_BAND = 1 << 20  # values that are converted at a time


@flax.struct.dataclass
class QuantizedArray:
    """`values * scales`. A pytree of both, that `ops.dot` and `ops.rows` take in place of an array.

    Attributes:
      values: -127 to 127; a file's own may be -128.
      scales: float32, one for each output channel: the axis of the inputs has size 1. Or one for each block of an
        output channel's inputs: that axis has as many entries as there are blocks.
      product: how it is multiplied, as `product_on` says.
    """

    values: Int8[Array, ...]
    scales: Float[Array, ...]
    product: str = flax.struct.field(pytree_node=False, default="direct")

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def in_blocks(self) -> bool:
        """Whether an output channel has more than one scale."""
        return self.block_axis is not None

    @property
    def block_axis(self) -> int | None:
        """The axis of the inputs, where an output channel has more than one scale."""
        sizes = zip(self.values.shape, self.scales.shape, strict=True)
        return next((axis for axis, (values, scales) in enumerate(sizes) if 1 < scales < values), None)

    @property
    def first_block(self) -> int:
        """How many places of the first axis share their scales, where all do not: 1, or the inputs of a block."""
        return self.shape[0] // self.scales.shape[0] if self.block_axis == 0 else 1

    def devices(self) -> set[jax.Device]:
        return self.values.devices()

    def __getitem__(self, index: Any) -> QuantizedArray:
        """`...`, which is how a parameter is read; or rows of a table."""
        if index is ...:
            return self
        return self.replace(values=self.values[index], scales=self.scales[index])

    def reshape(self, inputs: int, outputs: int) -> QuantizedArray:
        """As a matrix, of an array whose inputs come first."""
        scales = self.scales.reshape(self.scales.shape[0], outputs)
        return self.replace(values=self.values.reshape(inputs, outputs), scales=scales)

    def sliced(self, start: int | Array, length: int) -> QuantizedArray:
        """Part of the first axis. Both are multiples of `first_block`."""
        values, scales = jax.lax.dynamic_slice_in_dim(self.values, start, length), self.scales
        if scales.shape[0] > 1:
            scales = jax.lax.dynamic_slice_in_dim(scales, start // self.first_block, length // self.first_block)
        return self.replace(values=values, scales=scales)

    def as_array(self) -> Float[Array, ...]:
        """In float32."""
        values, scales, axis = self.values.astype(jnp.float32), self.scales.astype(jnp.float32), self.block_axis
        if axis is None:
            return values * scales
        return values * jnp.repeat(scales, self.shape[axis] // scales.shape[axis], axis)


def input_axis(path: str, ndim: int) -> int | None:
    """The axis of a parameter's inputs; None where it is not stored in int8.

    Args:
      path: dotted, as `parameter_paths` gives it for a model that is not quantized.
      ndim: number of its dimensions.
    """
    if ndim < 2 or not _MATRIX.search(path):
        return None
    return 1 if _TABLE.search(path) else 0


def product_on(devices: Collection[Any]) -> str:
    """How weights on these devices are multiplied, so that no float copy of them is made (docs/dev/int8.md).

    "direct": converted where the product reads them. "blocks": on a CPU that holds them undivided, a block at a time is
    converted and multiplied. "pairs": on TPUs, as "direct", but what is one row is taken twice.
    """
    platform = next(iter(devices)).platform
    if platform == "cpu" and len(devices) == 1:
        return "blocks"
    return "pairs" if platform == "tpu" else "direct"


def parameter_of(path: str) -> str:
    """The path of the parameter that a leaf is of: a quantized one has two."""
    return re.sub(r"\.(values|scales)$", "", path)


def keeps_blocks(devices: Collection[Any]) -> bool:
    """Whether int8 values that a file has with several scales for an output stay so on these devices. Compilers for
    accelerators would write a scaled copy of such a weight to memory for each product (docs/dev/int8.md)."""
    return product_on(devices) == "blocks"


def abstract_quantized(path: str, x: Any, devices: Collection[Any]) -> Any:
    """The shapes of the parameter `x` at `path` in int8 on these devices: its own, where it stays as it is."""
    axis = input_axis(path, len(x.shape))
    if axis is None:
        return x
    scales = tuple(1 if i == axis else size for i, size in enumerate(x.shape))
    return QuantizedArray(
        jax.ShapeDtypeStruct(x.shape, jnp.int8), jax.ShapeDtypeStruct(scales, jnp.float32), product_on(devices)
    )


def quantize_rows(
    rows: Float[np.ndarray, "outputs inputs"],
) -> tuple[Int8[np.ndarray, "outputs inputs"], Float[np.ndarray, "outputs 1"]]:
    """Values and scales of a matrix with one output channel per row: its largest magnitude becomes 127. A few rows at a
    time are in float32. A channel with a value that is not a number has a scale that is not, so that nothing is hidden;
    one of zeros has scale 1.
    """
    values, scales = np.empty(rows.shape, np.int8), np.empty((len(rows), 1), np.float32)
    band = max(1, _BAND // rows.shape[1])
    for start in range(0, len(rows), band):
        part = slice(start, start + band)
        some = rows[part].astype(np.float32)
        scale = np.abs(some).max(axis=1, keepdims=True) / np.float32(_LARGEST)
        scales[part] = np.where(scale == 0, 1, scale)
        with np.errstate(invalid="ignore"):
            values[part] = np.nan_to_num(np.rint(some / scales[part]))
    return values, scales
