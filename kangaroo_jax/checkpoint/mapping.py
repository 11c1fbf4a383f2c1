"""Hugging Face tensors and our parameters: which is made of which, and how.

The rule between the two is `parameter_rule`: module and parameter names are Hugging Face's, but projections that read
the same input are one matrix here, stored input axis first.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from kangaroo_jax.checkpoint.weights import DTYPES, Index, Int8Blocks, Pieces, join_pieces
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.columns import columns_where_faster
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.quantized import QuantizedArray, input_axis, product_on, quantize_rows

_BAND = 1 << 22  # values of a tensor that are read at a time, to be rounded


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """How one of our parameters is made from Hugging Face tensors.

    Attributes:
      names: the tensors, as Hugging Face names them, without a prefix ("layers.0.mlp.up_proj.weight").
      shapes: their shapes.
      join: tensors -> our array. The rule of a part's shape joins the parts that `locate` names.
      split: our array -> tensors.
      locate: a part of our array -> for each tensor, the pieces (runs of rows) that it is made of.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    join: Callable[..., np.ndarray]
    split: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    locate: Callable[[Index], tuple[Pieces, ...]]


def parameter_rule(path: str, shape: tuple[int, ...]) -> ParameterRule:
    """The rule for our parameter at `path` ("layers.0.self_attn.qkv_proj") of `shape`."""
    parent, _, name = path.rpartition(".")
    if name in ("qkv_proj", "qkv_bias"):
        kind = "weight" if name == "qkv_proj" else "bias"
        *inputs, kv_heads, rows, head_dim = shape
        groups = rows - 2
        counts = (kv_heads * groups, kv_heads, kv_heads)

        def join(*parts: np.ndarray) -> np.ndarray:
            parts = [x.reshape(kv_heads, -1, head_dim, *inputs) for x in parts]
            fused = np.concatenate(parts, axis=1)
            return np.moveaxis(fused, -1, 0) if inputs else fused

        def split(fused: np.ndarray) -> tuple[np.ndarray, ...]:
            fused = np.moveaxis(fused, 0, -1) if inputs else fused
            parts = (fused[:, :groups], fused[:, groups : groups + 1], fused[:, groups + 1 :])
            return tuple(x.reshape(-1, *inputs) for x in parts)

        def locate(index: Index) -> tuple[Pieces, ...]:
            *columns, heads, whole, dims = index
            if (whole.start, whole.stop) != (0, rows):
                raise ValueError(f"{path}: queries, keys and values of a head stay together")

            def runs(count: int) -> Pieces:  # `count` heads of this tensor per key/value head
                if dims.stop - dims.start == head_dim:
                    size = count * head_dim
                    return ((slice(heads.start * size, heads.stop * size), *columns),)
                starts = (head * head_dim for head in range(heads.start * count, heads.stop * count))
                return tuple((slice(start + dims.start, start + dims.stop), *columns) for start in starts)

            return tuple(runs(count) for count in (groups, 1, 1))

        names = tuple(f"{parent}.{letter}_proj.{kind}" for letter in "qkv")
        return ParameterRule(names, tuple((count * head_dim, *inputs) for count in counts), join, split, locate)
    if name in ("gate_up_proj", "gate_up_bias"):
        kind = "weight" if name == "gate_up_proj" else "bias"
        *inputs, _, width = shape
        names = tuple(f"{parent}.{part}_proj.{kind}" for part in ("gate", "up"))
        axis = len(inputs)  # where gate and up sit side by side
        return ParameterRule(
            names,
            ((width, *inputs),) * 2,
            lambda gate, up: np.stack([gate.T, up.T], axis=axis),
            lambda fused: tuple(x.T for x in np.moveaxis(fused, axis, 0)),
            lambda index: (((index[-1], *index[:axis]),),) * 2,
        )
    if name.endswith(("o_proj", "down_proj")):
        return ParameterRule(
            (f"{path}.weight",), (shape[::-1],), lambda x: x.T, lambda x: (x.T,), lambda i: ((i[::-1],),)
        )
    if name.endswith("_bias"):
        same = f"{path.removesuffix('_bias')}_proj.bias"
    else:
        same = path if name == "weight" else f"{path}.weight"
    return ParameterRule((same,), (shape,), lambda x: x, lambda x: (x,), lambda i: ((i,),))


def fill_module(
    abstract: PyTree,
    read: Callable[[str, Pieces], np.ndarray],
    dtype: jnp.dtype,
    tensor_name: Callable[[str], str] = str,
    files: Mapping[str, str] | None = None,
    mesh: Mesh | None = None,
    weights: str = "float",
    int8: Int8Blocks | None = None,
) -> PyTree:
    """Builds a module from tensors read one parameter at a time, each put on the device in `dtype` before the next
    is read.

    Args:
      abstract: the module from `nnx.eval_shape`.
      read: tensor name and pieces of it -> those, joined.
      dtype: of the weights on the device.
      tensor_name: a name of `ParameterRule` -> the tensor's name in the checkpoint.
      files: tensor name -> file, for messages.
      mesh: to split the weights over; only the parts of this process's devices are then read.
      weights: one of `quantized.WEIGHTS`. In int8, matrices are `QuantizedArray`s of the values that were read, in
        whichever dtype; of those whose inputs are split, all are read, as the scales depend on them.
      int8: tensors that the file holds in int8, for one device. A matrix of such alone is taken as it is.

    Raises:
      InputError: if a value is beyond the range of `dtype`.
    """

    def cast(name: str, pieces: Pieces) -> np.ndarray:
        tensor = read(name, pieces)
        if tensor.dtype == dtype:
            return tensor
        with np.errstate(over="ignore"):
            converted = tensor.astype(dtype)
        # float16 alone has a smaller range than the others: an overflow would decode nonsense without a word.
        if dtype == np.float16 and np.isinf(converted).any():
            raise InputError(
                f"{(files or {}).get(name, 'checkpoint')}: tensor {name} has values beyond float16; "
                f"expected at most {np.finfo(np.float16).max}, "
                f"found {np.abs(tensor.astype(np.float32)).max():.6g}; load in bfloat16 or float32"
            )
        return converted

    def part(path: str, shape: tuple[int, ...], index: Index) -> np.ndarray:
        index = tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))
        rule = parameter_rule(path, shape)
        pieces = zip(rule.names, rule.locate(index), strict=True)
        of_part = parameter_rule(path, tuple(x.stop - x.start for x in index))
        return of_part.join(*(cast(tensor_name(name), where) for name, where in pieces))

    def int8_rows(name: str, pieces: Pieces, stored: bool) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of rows of a tensor, of which a band at a time is read; those that are `stored`, or
        rounded."""
        done = []
        for rows, *columns in pieces:
            step = max(1, _BAND // math.prod(x.stop - x.start for x in columns))
            for start in range(rows.start, rows.stop, step):
                band = slice(start, min(start + step, rows.stop))
                done.append(int8.read(name, band) if stored else quantize_rows(read(name, ((band, *columns),))))
        return join_pieces([values for values, _ in done]), join_pieces([scales for _, scales in done])

    def int8_part(path: str, shape: tuple[int, ...], index: Index, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of the output channels that `index` names."""
        index = tuple(slice(*x.indices(size)[:2]) for x, size in zip(index, shape, strict=True))
        rule, num_scales = parameter_rule(path, shape), scales_per_output(path, shape, axis)
        pieces = zip(map(tensor_name, rule.names), rule.locate(index), strict=True)
        # Hugging Face's matrices have a row for each output.
        values, scales = zip(*(int8_rows(name, where, num_scales is not None) for name, where in pieces), strict=True)
        of_values = tuple(x.stop - x.start for x in index)
        of_scales = _replaced(of_values, axis, num_scales or 1)
        return parameter_rule(path, of_values).join(*values), parameter_rule(path, of_scales).join(*scales)

    def scales_per_output(path: str, shape: tuple[int, ...], axis: int) -> int | None:
        """Of a matrix whose values are stored in int8; None for one that has to be rounded."""
        block = _block_of(path, shape, tensor_name, int8)
        return None if block is None else shape[axis] // block

    def quantized(path: str, shape: tuple[int, ...], axis: int) -> QuantizedArray:
        if mesh is None:
            values, scales = map(jnp.asarray, int8_part(path, shape, (slice(None),) * len(shape), axis))
            return QuantizedArray(values, scales, product_on(values.devices()))
        parts = functools.cache(lambda *bounds: int8_part(path, shape, _slices(bounds), axis))

        def part_of(index: Index) -> tuple[np.ndarray, np.ndarray]:
            return parts(*((x.start, x.stop) for x in _replaced(index, axis, slice(None))))

        def placed(of_shape: tuple[int, ...], take: Callable[[Index], np.ndarray]) -> jax.Array:
            where = NamedSharding(mesh, sharding.partition(path, of_shape, mesh))
            return jax.make_array_from_callback(of_shape, where, take)

        everything = (slice(None),) * len(shape)
        values = placed(shape, lambda index: part_of(index)[0][_replaced(everything, axis, index[axis])])
        scales_shape = _replaced(shape, axis, scales_per_output(path, shape, axis) or 1)
        scales = placed(scales_shape, lambda index: part_of(index)[1])
        return QuantizedArray(values, scales, product_on(mesh.devices.ravel()))

    leaves, structure = jax.tree.flatten(abstract)
    for i, path in enumerate(parameter_paths(abstract)):
        shape = leaves[i].shape
        axis = input_axis(path, len(shape)) if weights == "int8" else None
        if axis is not None:
            array = quantized(path, shape, axis)
        elif mesh is None:
            array = columns_where_faster(path, part(path, shape, (slice(None),) * len(shape)))
        else:
            # Devices that hold the same part share one reading of it.
            parts = functools.cache(lambda *bounds, path=path, shape=shape: part(path, shape, _slices(bounds)))
            array = jax.make_array_from_callback(
                shape,
                NamedSharding(mesh, sharding.partition(path, shape, mesh)),
                lambda index, parts=parts: parts(*((x.start, x.stop) for x in index)),
            )
        leaves[i] = jax.block_until_ready(jax.tree.map(functools.partial(sharding.arranged, path), array))
    return jax.tree.unflatten(structure, leaves)


def is_stored_in_int8(abstract: PyTree, tensor_name: Callable[[str], str], int8: Int8Blocks | None) -> bool:
    """Whether a module in int8 has the checkpoint's own values: the file has all of its matrices so."""
    leaves = zip(parameter_paths(abstract), jax.tree.leaves(abstract), strict=True)
    matrices = [(path, x.shape) for path, x in leaves if input_axis(path, len(x.shape)) is not None]
    return all(_block_of(path, shape, tensor_name, int8) is not None for path, shape in matrices)


def _block_of(
    path: str, shape: tuple[int, ...], tensor_name: Callable[[str], str], int8: Int8Blocks | None
) -> int | None:
    """How many inputs share a scale in the tensors of which our parameter is made, where all of them are in int8."""
    sizes = {int8 and int8.sizes.get(tensor_name(name)) for name in parameter_rule(path, shape).names}
    return sizes.pop() if len(sizes) == 1 else None


def _replaced(x: tuple[Any, ...], place: int, value: Any) -> tuple[Any, ...]:
    return (*x[:place], value, *x[place + 1 :])


def _slices(bounds: Iterable[tuple[int | None, int | None]]) -> Index:
    return tuple(slice(start, stop) for start, stop in bounds)


def check_tensors(
    abstract: PyTree,
    found: Mapping[str, tuple[tuple[int, ...], str]],
    files: Mapping[str, str],
    tensor_name: Callable[[str], str] = str,
) -> None:
    """Compares a checkpoint's tensors with what a module needs, before anything is read.

    Args:
      abstract: the module.
      found: tensor name -> (shape, dtype name as safetensors spells it).
      files: tensor name -> file, for messages.
      tensor_name: a name of `ParameterRule` -> the tensor's name in the checkpoint.

    Raises:
      InputError: one line naming file, tensor, expected and found.
    """
    where = ", ".join(sorted(set(files.values()))[:3]) or "checkpoint"
    expected = {}
    for path, leaf in zip(parameter_paths(abstract), jax.tree.leaves(abstract), strict=True):
        rule = parameter_rule(path, leaf.shape)
        expected |= {tensor_name(n): shape for n, shape in zip(rule.names, rule.shapes, strict=True)}
    for name, shape in expected.items():
        if name not in found:
            raise InputError(f"{where}: tensor {name} is missing; expected shape {list(shape)}, found nothing")
        if tuple(found[name][0]) != tuple(shape):
            raise InputError(
                f"{files[name]}: tensor {name} has the wrong shape; "
                f"expected {list(shape)}, found {list(found[name][0])}"
            )
        if found[name][1] not in DTYPES:
            raise InputError(
                f"{files[name]}: tensor {name} has an unsupported dtype; expected {', '.join(DTYPES)}, "
                f"found {found[name][1]}"
            )
    # Old checkpoints store the rotary frequencies, which follow from the config; tied ones may repeat the head.
    ignored = re.compile(r"\.rotary_emb\.inv_freq$|^lm_head\.weight$")
    surplus = [name for name in found if name not in expected and not ignored.search(name)]
    if surplus:
        name = sorted(surplus)[0]
        raise InputError(
            f"{files[name]}: tensor {name} is surplus ({len(surplus)} in all); expected nothing of that name, "
            f"found shape {list(found[name][0])}"
        )
