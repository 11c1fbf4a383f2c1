"""Programs compiled from shapes alone, and what their compiler says of them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, Sharding
from jaxtyping import PyTree

from kangaroo_jax import program
from kangaroo_jax.errors import MachineError, one_line
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.quantized import abstract_quantized
from kangaroo_jax.model.target import TargetModel
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.report import Program

# Memory of a kernel's own, which runs out by what is in one program: no matter how much of the device's there is.
_OWN_MEMORY = re.compile("vmem|smem|shared memory", re.IGNORECASE)


def placed(x: Any, where: Sharding | Format) -> jax.ShapeDtypeStruct:
    """An array as a shape."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Weights as shapes, with the placement that loading gives them."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [
        placed(x, sharding.placement(path, x.shape, NamedSharding(mesh, sharding.partition(path, x.shape, mesh))))
        for path, x in zip(parameter_paths(tree), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, shapes)


def abstract_target(config: ModelConfig, dtype: str, mesh: Mesh, weights: str = "float") -> TargetModel:
    """The target as shapes. Arguments as for `load_target`."""
    model = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    if weights == "int8":
        leaves, structure = jax.tree.flatten(model)
        names = parameter_paths(model)
        devices = mesh.devices.ravel()
        leaves = [abstract_quantized(path, x, devices) for path, x in zip(names, leaves, strict=True)]
        model = jax.tree.unflatten(structure, leaves)
    return abstract(model, mesh)


def in_dtype(tree: PyTree, dtype: jnp.dtype) -> PyTree:
    """Weights as shapes, floats in `dtype`: as loading gives them for a target of that dtype."""
    kind = lambda x: dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype  # noqa: E731
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, kind(x)), tree)


def numbers(dtype: str, weights: str) -> str:
    """What is computed in, and stored as, in words."""
    return dtype if weights == "float" else f"{dtype}, {weights} weights"


def compiled(
    name: str,
    function: Callable[..., Any],
    inputs: tuple[Any, ...],
    machine: Machine,
    options: dict[str, Any] | None = None,
) -> Program:
    """A jitted function, compiled for a machine.

    Args:
      name: what it is.
      function: jitted.
      inputs: shapes, placed on the machine's devices.
      machine: compiled for.
      options: of the compiler.

    Raises:
      MachineError: where the compiler fails, but for want of memory.
    """
    traced = function.trace(*inputs)
    operations = program.matmul_operations(traced.jaxpr.jaxpr)
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or _OWN_MEMORY.search(str(error)):
            raise MachineError(f"preflight {machine.name}: {name} could not be compiled ({one_line(error)})") from None
        reason = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0]
        return Program(name, 0, 0, float("inf"), operations, 0.0, None, reason, None, None)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if machine.platform == "tpu":
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    else:  # other compilers do not know which buffers are alive at the same time
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    try:
        text = compiled.as_text()
        collectives, body = program.collectives(text), program.body(text)
    except jax.errors.JaxRuntimeError:
        collectives = body = None
    outputs = jax.tree.map(placed, traced.out_info, compiled.output_shardings)
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Program(name, arguments, temporary, peak, operations, seconds, collectives, None, outputs, body)
