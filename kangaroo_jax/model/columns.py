"""Weights as a processor with AVX2 multiplies them fastest by few rows of activations: outputs side by side, and the
rows of memory at different places of its first cache."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kangaroo_jax import processor
from kangaroo_jax.model.quantized import input_axis

_LINE = 64  # bytes of a line of a cache
_CROWDED = 16  # lines: rows that are a multiple of so many start at four of the first cache's 64 places, or fewer
_LARGE = 1 << 20  # bytes; smaller weights stay in the second cache


@flax.struct.dataclass
class ColumnArray:
    """A weight with a row of memory for each input, that `ops.dot` and `ops.rows` take in place of an array.

    Attributes:
      columns: the weight as a matrix, with zeros behind its outputs, so that a row is an odd number of cache lines.
      shape: of the weight.
      input_axis: of its inputs, 0, or 1 for a table.
    """

    columns: Float[Array, "inputs padded"]
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    input_axis: int = flax.struct.field(pytree_node=False)

    @property
    def dtype(self) -> jnp.dtype:
        return self.columns.dtype

    @property
    def outputs(self) -> tuple[int, ...]:
        """The sizes of the axes that are not the inputs'."""
        return self.shape[: self.input_axis] + self.shape[self.input_axis + 1 :]

    def devices(self) -> set[jax.Device]:
        return self.columns.devices()

    def __getitem__(self, index: Any) -> ColumnArray | Array:
        """`...`, which is how a parameter is read; or rows of a table, as an array."""
        if index is ...:
            return self
        return jnp.moveaxis(self.columns[:, index], 0, -1)

    def reshape(self, inputs: int, outputs: int) -> ColumnArray:
        """As a matrix, of an array whose inputs come first. An `outputs` of -1 is what there is."""
        return self.replace(shape=(inputs, math.prod(self.outputs) if outputs == -1 else outputs))

    def as_array(self) -> Float[Array, ...]:
        matrix = self.columns[:, : math.prod(self.outputs)]
        return jnp.moveaxis(matrix.reshape(-1, *self.outputs), 0, self.input_axis)


def columns_where_faster(path: str, array: np.ndarray | Float[Array, ...]) -> Float[Array, ...] | ColumnArray:
    """The parameter at `path` of a target, put on the default device, as that multiplies it fastest by few rows: an
    array, or on a processor with AVX2 a `ColumnArray`. (docs/dev/performance.md)

    Eigen, which multiplies there, reads a few columns of all of a weight's rows at a time. Where a row is a multiple of
    1 KiB these fall on few places of the first cache, and push each other out. Tables, whose outputs come first, XLA
    multiplies without vectors.
    """
    axis = input_axis(path, array.ndim)
    on_avx2 = jax.default_backend() == "cpu" and processor.vectors_are_avx2()
    if axis is None or array.nbytes < _LARGE or not on_avx2:
        return jnp.asarray(array)
    line = _LINE // array.dtype.itemsize
    lines = -(-array.size // array.shape[axis] // line)
    if axis == 0 and lines % _CROWDED:
        return jnp.asarray(array)
    # numpy, which sees an array on a CPU where it is: XLA would compile programs of one use.
    matrix = np.moveaxis(np.asarray(array), axis, 0).reshape(array.shape[axis], -1)
    columns = _aligned_zeros((len(matrix), (lines | 1) * line), array.dtype)
    columns[:, : matrix.shape[1]] = matrix
    return ColumnArray(jax.device_put(columns, may_alias=True), array.shape, axis)


def _aligned_zeros(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Of which JAX makes an array on a CPU without a copy: from the beginning of a cache line on."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)
