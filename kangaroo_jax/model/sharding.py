"""Which device holds what, and in which order of axes: the mesh, and tables from parameter paths to both.

Axes of the mesh: `data` (batch alone), `fsdp` (batch and weights: a weight is gathered where it is used), `model`
(weights: tensor parallelism over key/value heads, the MLP's width and the vocabulary).
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.layout import Format, Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from kangaroo_jax.errors import InputError
from kangaroo_jax.model.families import all_families
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.quantized import parameter_of

AXES = ("data", "fsdp", "model")
BATCH = P(("data", "fsdp"))

# The end of a parameter's path -> mesh axes of each of its dimensions; a family has rows of its own for parameters that
# no other has. `model` splits what can be computed separately; `fsdp` only what is stored separately, along rows of the
# checkpoint's tensors, so that a process reads them in long runs.
_TABLE: tuple[tuple[str, tuple[Any, ...]], ...] = (
    (r"embed_tokens|lm_head", (("model", "fsdp"), None)),  # [vocab, hidden]
    (r"draft_vocabulary\.weight", (None, None)),  # [drafted, hidden]; rows taken from the head are on all devices
    (r"qkv_proj", (None, "model", None, "fsdp")),  # [hidden, kv_heads, q_per_kv + 2, head_dim]
    (r"qkv_bias", ("model", None, None)),
    (r"o_proj", ("model", "fsdp")),  # [heads * head_dim, hidden]
    (r"memory_proj", ("fsdp", None, "model")),  # [hidden, depths, hidden]
    (r"gate_up_proj", (None, None, ("model", "fsdp"))),  # [hidden, 2, intermediate]
    (r"gate_up_bias", (None, "model")),
    (r"down_proj", ("model", "fsdp")),  # [intermediate, hidden]
    (r"norm\.weight|layernorm\.weight|o_bias|down_bias|token_ids", (None,)),
)

_LANES = 128  # of a TPU: elements along an array's fastest axis that lie and are worked on together


def _tpu_order(path: str, part: Sequence[int]) -> tuple[int, ...] | None:
    """A parameter's axes in memory, from the slowest to the fastest, where the products take it otherwise than it is
    written: XLA would copy all such weights at the start of each program. Found by letting XLA for TPU choose
    (Layout.AUTO) for rounds of decoding. `part` is the shape that one device holds."""
    path = parameter_of(path)
    if path.endswith("qkv_proj"):
        return (1, 2, 3, 0)
    if path.endswith("gate_up_proj"):
        return (1, 0, 2) if part[2] % _LANES == 0 else (1, 2, 0)
    return None


_ORDERS = {"tpu": _tpu_order}


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The devices as a mesh with the axes data, fsdp, model.

    Args:
      sizes: devices along each axis; -1, for at most one of them, is what the others leave.
      devices: all of the run's by default.

    Raises:
      InputError: for sizes that do not multiply to the number of devices, or devices that form no grid.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: sizes[axis] for axis in AXES}
    shown = ", ".join(f"mesh.{axis} {size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise InputError(f"{shown}: expected 1 or more each, and at most one -1 (the rest)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        kind = "a divisor of" if free else "exactly"
        raise InputError(
            f"{shown}: expected sizes whose product is {kind} {len(devices)}, the number of devices; found {fixed}"
        )
    shape = [len(devices) // fixed if size == -1 else size for size in sizes.values()]
    try:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):  # chips of a TPU that form no rectangle
        raise InputError(
            f"{shown}: {len(devices)} of these devices form no grid; give as many as are along one or more axes"
        ) from None
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def decoding_mesh(model_parallel: int, devices: Sequence[Any], data_parallel: int = 1) -> Mesh:
    """The first `data_parallel` * `model_parallel` of `devices`: each layer is split over `model_parallel` of them, and
    the sequences of a batch over `data_parallel` groups of those.

    Raises:
      InputError: for more than there are.
    """
    for name, count in (("model_parallel", model_parallel), ("data_parallel", data_parallel)):
        if not 1 <= count <= len(devices):
            raise InputError(f"{name}: expected 1 to {len(devices)}, the number of devices, found {count}")
    count = data_parallel * model_parallel
    if count > len(devices):
        raise InputError(
            f"data_parallel {data_parallel} x model_parallel {model_parallel}: {count} devices are needed, found "
            f"{len(devices)}"
        )
    return make_mesh({"data": data_parallel, "fsdp": 1, "model": model_parallel}, devices[:count])


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises `InputError` unless each device gets as many sequences as every other."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % parts:
        raise InputError(
            f"batch_size: expected a multiple of {parts}, the devices along mesh.data and mesh.fsdp, found "
            f"{batch_size}; change it, or give devices to mesh.model"
        )


def partition(path: str, shape: Sequence[int], mesh: Mesh, axes: Sequence[str] = AXES) -> P:
    """The partition of the parameter at `path`, or of the optimizer's state for it (its path ends in the same way).

    A dimension that an axis does not divide stays whole along that axis. The scales of a quantized parameter are split
    as its values: the dimension of its inputs, which is 1, is not split.

    Args:
      path: dotted, as `parameter_paths` gives it.
      shape: of the parameter.
      mesh: its axes' sizes are what has to divide.
      axes: those to split along.

    Raises:
      ValueError: for a path that neither the table nor a family knows.
    """
    if not shape:
        return P()
    path = parameter_of(path)
    rows = itertools.chain(_TABLE, *(family.partitions for family in all_families()))
    fitting = (x for pattern, x in rows if len(x) == len(shape) and re.search(rf"(^|\.)(\w*{pattern})$", path))
    names = next(fitting, None)
    if names is None:
        raise ValueError(f"no partition is known for {path} of shape {tuple(shape)}")
    spec = []
    for size, wanted in zip(shape, names, strict=True):
        kept, parts = [], 1
        for axis in (wanted,) if isinstance(wanted, str) else wanted or ():
            if axis in axes and mesh.shape[axis] > 1 and size % (parts * mesh.shape[axis]) == 0:
                kept.append(axis)
                parts *= mesh.shape[axis]
        spec.append(tuple(kept) if len(kept) > 1 else kept[0] if kept else None)
    return P(*spec)


def shardings(shapes: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """Path -> anything with a shape in, path -> sharding out."""
    return {path: NamedSharding(mesh, partition(path, x.shape, mesh)) for path, x in shapes.items()}


def placement(path: str, shape: Sequence[int], where: Sharding) -> Sharding | Format:
    """Where the parameter at `path` of a target or a trained adapter lies, given its shape and sharding: with the order
    of its axes in memory, where that is not the default."""
    platform = next(iter(where.device_set)).platform
    order = _ORDERS[platform](path, where.shard_shape(tuple(shape))) if platform in _ORDERS else None
    return where if order is None else Format(Layout(order), where)


def in_order(tree: PyTree, platform: str | None) -> PyTree:
    """Inside jit, on one device: weights whose axes are stated to be in memory as `placement` has them. Left to choose,
    XLA for TPU takes another order for products with one row in the loop of draft steps, and copies the shallow layers'
    weights at the start of each chunk of rounds. Of split weights a statement makes it copy more.

    Args:
      tree: weights, of one layer or more.
      platform: of the device; None where it is not known.
    """
    if platform not in _ORDERS:
        return tree

    def stated(path: str, x: jax.Array) -> jax.Array:
        order = _ORDERS[platform](path, x.shape)
        return x if order is None else with_layout_constraint(x, Layout(order))

    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, map(stated, parameter_paths(tree), leaves))


def arranged(path: str, array: jax.Array) -> jax.Array:
    """A parameter as `placement` wants it, on the devices where it is."""
    where = placement(path, array.shape, array.sharding)
    return _rearranging(where)(array) if isinstance(where, Format) else array


@functools.cache
def _rearranging(where: Format) -> Callable[[jax.Array], jax.Array]:
    # A program, not device_put, which takes no array that other processes hold parts of.
    return jax.jit(lambda x: x, out_shardings=where)


def undivided(shapes: Mapping[str, Any], mesh: Mesh) -> list[str]:
    """A line for each kind of parameter that an axis of the mesh should split and does not divide."""
    notes = {}
    for path, x in shapes.items():
        if path.endswith(".scales"):  # they follow the values
            continue
        spec = partition(path, x.shape, mesh)
        ideal = partition(path, [size * mesh.size for size in x.shape], mesh)
        for axis in ("model", "fsdp"):
            if axis in _axes(ideal) and axis not in _axes(spec):
                name = parameter_of(path).rpartition(".")[2]
                notes[name, axis] = (
                    f"mesh.{axis} {mesh.shape[axis]} divides no dimension of {name} {list(x.shape)} that it should "
                    f"split: each device along it holds all of that"
                )
    return list(notes.values())


def _axes(spec: P) -> set[str]:
    return {axis for names in spec for axis in ((names,) if isinstance(names, str) else names or ())}


def gathered(tree: PyTree, paths: Sequence[str], mesh: Mesh) -> PyTree:
    """Inside jit: weights as a computation takes them, split along `model` alone. The compiler gathers each along
    `fsdp` just before its use.

    Args:
      tree: weights.
      paths: of its leaves.
      mesh: where they are.
    """
    leaves, structure = jax.tree.flatten(tree)
    whole = [
        NamedSharding(mesh, partition(path, x.shape, mesh, ("model",))) for path, x in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, leaves, whole))


def rows_here(batch_size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch this process's devices hold, ascending. Processes that share them hold the same."""
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in indices.values()]))


def put_batch(batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the mesh, its first axis split over data and fsdp.

    Args:
      batch: name -> array, with the rows that `rows_here` names, or all of them.
      batch_size: rows of the whole batch.
      mesh: where to put it.
    """
    sharding = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(sharding, x, (batch_size, *x.shape[1:]))
        for name, x in batch.items()
    }


def put(tree: PyTree, where: PyTree) -> PyTree:
    """Arrays that every process holds whole, split as the shardings in `where` say."""
    return jax.tree.map(
        lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: np.asarray(x[index])),
        tree,
        where,
    )
