"""Whether a run would fit: compiles the real programs for a machine, from shapes alone, and reports what they need.

The machine is a TPU topology that need not be attached (its compiler comes with the libtpu package), or `local`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.experimental.layout import Format
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from kangaroo_jax import program
from kangaroo_jax.config import DraftConfig, TrainConfig
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.quantized import abstract_quantized
from kangaroo_jax.model.target import TargetModel

_LOCAL = "local"
_GIB = 2**30
# Memory of one device in GiB, as the runtime counts devices (a TPU7x chip is two).
_HBM = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 96}
_NAMES = ("v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine a preflight compiles for.

    Attributes:
      name: as the user gave it.
      devices: make the mesh; they need not be attached.
      memory: bytes per device; None where it is not known.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None

    def __str__(self) -> str:
        return f"{self.name} ({len(self.devices)} x {self.devices[0].device_kind})"


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled program needs and does.

    Attributes:
      name: what it is.
      arguments: bytes of its arguments on one device.
      temporary: bytes of everything in between, on one device.
      peak: the largest number of bytes at any moment, on one device; infinite where the compiler found no room.
      operations: floating-point operations of its matrix products, over all devices.
      seconds: time to compile.
      collectives: its communication by kind; None where the compiler's output could not be read.
      no_room: the compiler's reason where it found no room in the device's memory, else None; most fields are then 0.
      outputs: shapes and placements of its results; None where it could not be compiled.
    """

    name: str
    arguments: int
    temporary: int
    peak: float
    operations: int
    seconds: float
    collectives: dict[str, program.Collective] | None
    no_room: str | None
    outputs: PyTree


@dataclasses.dataclass(frozen=True)
class Report:
    """What some work needs on a machine.

    Attributes:
      machine: compiled for.
      mesh: size of each axis of the devices' mesh.
      work: one line that says what was compiled.
      notes: lines about parameters that could not be divided over the mesh.
      programs: in the order they run.
    """

    machine: Machine
    mesh: dict[str, int]
    work: str
    notes: list[str]
    programs: list[Program]

    @property
    def peak(self) -> float:
        """The largest peak of the programs, in bytes per device."""
        return max(program.peak for program in self.programs)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the memory of a device; None where that is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory


def find_machine(name: str) -> Machine:
    """The machine called `name`: local, or a TPU topology such as v5e:4x4. Must be called before JAX is asked for its
    devices.

    Raises:
      InputError: for a name of no machine.
      MachineError: for a TPU topology where libtpu is not installed, or does not load.
    """
    if name == _LOCAL:
        devices = jax.devices()
        limit = (devices[0].memory_stats() or {}).get("bytes_limit")
        if limit is None and devices[0].platform == "cpu":  # the host's memory, shared by its devices
            limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(jax.local_devices())
        return Machine(name, devices, limit)
    kind, _, shape = name.partition(":")
    if kind not in _NAMES or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", shape):
        raise InputError(
            f"preflight {name}: expected local, or a TPU topology: one of {', '.join(_NAMES)}, a colon and the "
            "chips along each axis, such as v5e:4x4 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise MachineError(f"preflight {name} needs the TPU compiler (no TPU): pip install -e '.[preflight]'")
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on a device
    # Without these, libtpu looks for a TPU and prints a page of errors that there is none.
    for variable, value in {
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for TPUs: several preflights may run at once
    }.items():
        os.environ.setdefault(variable, value)
    chips = [int(x) for x in shape.split("x")]
    small = {} if max(chips) > 1 else {"chips_per_host_bounds": [1, 1, 1]}  # the default is several chips per host
    try:
        devices = topologies.get_topology_desc(name, "tpu", **small).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" not in reason:
            raise MachineError(f"preflight {name}: TPU's compiler could not be loaded ({reason})") from None
        raise InputError(f"preflight {name}: no such topology ({reason})") from None
    return Machine(name, devices, _HBM[devices[0].device_kind] * _GIB)


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Weights as shapes, with the placement that loading gives them."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        _placed(x, sharding.placement(path, x.shape, NamedSharding(mesh, sharding.partition(path, x.shape, mesh))))
        for path, x in zip(parameter_paths(tree), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def abstract_target(config: ModelConfig, dtype: str, mesh: Mesh, weights: str = "float") -> TargetModel:
    """The target as shapes. Arguments as for `load_target`."""
    model = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))
    if weights == "int8":
        leaves, structure = jax.tree.flatten(model)
        paths = parameter_paths(model)
        devices = mesh.devices.ravel()
        leaves = [abstract_quantized(path, x, devices) for path, x in zip(paths, leaves, strict=True)]
        model = jax.tree.unflatten(structure, leaves)
    return abstract(model, mesh)


def _placed(x: Any, where: Sharding | Format) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def training(config: TrainConfig, machine: Machine) -> Report:
    """What a training step of a configuration needs on a machine.

    Raises:
      InputError: for settings that are wrong, do not fit the machine's devices, or name a target of unknown shape.
    """
    # Decoding does not need the packages that training needs.
    from kangaroo_jax.checkpoint.known_models import model_config
    from kangaroo_jax.train import draft_vocabulary, teacher
    from kangaroo_jax.train import settings as training_settings
    from kangaroo_jax.train import step as training_step

    shape = model_config(config.target)
    training_settings.check_adapter(config, shape)
    training_settings.check_context(config, shape, config.target)
    size = draft_vocabulary.check_setting(config.draft_vocabulary, shape)
    mesh = training_settings.make_mesh(config, machine.devices)
    target = abstract_target(shape, config.dtype, mesh, config.weights)
    optimizer = training_step.make_optimizer(config)
    state = training_step.abstract_state(optimizer, shape, config, mesh)
    batch = training_step.abstract_batch(config, shape, mesh)
    step, _ = training_step.compiled(optimizer, shape, config, mesh)
    # The data decides what "auto" is; nothing takes more than the complete vocabulary.
    drafted = _placed(jax.ShapeDtypeStruct((size,), jnp.int32), NamedSharding(mesh, PartitionSpec())) if size else None
    step_count = jax.ShapeDtypeStruct((), jnp.int32)
    programs = [_compile("training step", step, (*state, target, batch, drafted, step_count, config.loss), machine)]
    if config.teacher == "cached":
        inputs = target, {name: x for name, x in batch.items() if name != "teacher"}
        programs.append(_compile("teacher's pass", teacher.program(config, mesh), inputs, machine))
    return Report(
        machine,
        dict(mesh.shape),
        f"training step: {config.target}, exit layer {config.exit_layer}, batch {config.batch_size} x "
        f"{config.sequence_length}, {_numbers(config.dtype, config.weights)}",
        sharding.undivided(dict(zip(parameter_paths(target), jax.tree.leaves(target), strict=True)), mesh),
        programs,
    )


def decoding(
    target_name: str,
    dtype: str,
    draft: DraftConfig,
    prompt_tokens: int,
    max_new_tokens: int,
    model_parallel: int,
    machine: Machine,
    weights: str = "float",
) -> Report:
    """What decoding one sequence needs on a machine: prefill, and rounds of draft and verification. `draft` must name
    its exit layer.

    Raises:
      InputError: as `training`.
    """
    from kangaroo_jax.checkpoint.adapter import check_exit_layer
    from kangaroo_jax.checkpoint.known_models import model_config
    from kangaroo_jax.decode.prefill import Admission, empty_prompts, empty_slots, prefill_and_admit
    from kangaroo_jax.decode.rounds import RoundShape, run_rounds
    from kangaroo_jax.decode.sampling import Sampling
    from kangaroo_jax.engine.shapes import CHUNK, MAX_EOS, Shapes, capacity_class
    from kangaroo_jax.model.attention.backend import choose_backend
    from kangaroo_jax.model.cache import batch_shardings

    config = model_config(target_name)
    check_exit_layer(draft.exit_layer, config)
    mesh = sharding.decoding_mesh(model_parallel, machine.devices)
    models = (
        abstract_target(config, dtype, mesh, weights),
        abstract(abstract_adapter(config, jnp.dtype(dtype)), mesh),
    )
    platform = machine.devices[0].platform
    # Where sequences decide how far to draft, rounds need as much, or less.
    shape = RoundShape.kangaroo(draft.exit_layer, dataclasses.replace(draft, decide=None), config.vocab_size, platform)
    shape = dataclasses.replace(shape, widths=shape.widths[-1:])  # a round runs one; narrower ones need less
    plan = Shapes(shape, accelerator=platform != "cpu").plan(prompt_tokens, max_new_tokens)
    backend = choose_backend(mesh if mesh.size > 1 or platform != "cpu" else None, machine.devices)
    static = {"exit_layer": draft.exit_layer, "backend": backend}
    looks_up = draft.lookup is not None
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(tree: PyTree, where: PyTree = None) -> PyTree:
        where = jax.tree.map(lambda _: everywhere, tree) if where is None else where
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, where)

    def array(dimensions: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, kind, sharding=everywhere)

    # Caches as large as the answer's end needs; the prompt is prefilled in a cache of its own beside them.
    capacity = capacity_class(max(plan.positions, plan.prompt_capacity))
    empty = functools.partial(empty_slots, batch=1, max_eos=MAX_EOS, capacity=capacity, looks_up=looks_up, **static)
    state = jax.eval_shape(empty, *models)
    state = placed(state, batch_shardings(state, mesh) if mesh.size > 1 else None)
    kept = (jax.tree.map(lambda x: x.sharding, state), everywhere)
    prompts = None
    if plan.prompt_capacity > plan.width:
        prompts = functools.partial(empty_prompts, rows=1, capacity=plan.prompt_capacity, looks_up=looks_up, **static)
        prompts = jax.eval_shape(prompts, *models)
        prompts = placed(prompts, batch_shardings(prompts, mesh) if mesh.size > 1 else None)
    admission = placed(Admission(array((1,)), array((1, MAX_EOS)), jax.eval_shape(lambda: Sampling.greedy(1))))
    one = array((1,))
    first = jax.jit(functools.partial(prefill_and_admit, sampled=False, **static), donate_argnums=2, out_shardings=kept)
    inputs = (*models, state, prompts, array((1, plan.width)), one, one, one, admission)
    name = "prefill" if prompts is None else "prefill, its last piece"
    programs = [_compile(name, first, inputs, machine)]
    if programs[0].outputs is not None:
        rounds = jax.jit(
            functools.partial(run_rounds, shape=shape, sampled=False, tokens=CHUNK),
            donate_argnums=2,
            out_shardings=(kept[0], None),
        )
        inputs = (*models, state, array((1,), jnp.bool_), array((), jnp.float32), array(()))
        programs.append(_compile("rounds (operations and communication of one)", rounds, inputs, machine))
    return Report(
        machine,
        dict(mesh.shape),
        f"decoding one sequence: {target_name}, exit layer {draft.exit_layer}, {draft}, prompt of {prompt_tokens} "
        f"tokens, {max_new_tokens} new, {_numbers(dtype, weights)}",
        [],
        programs,
    )


def _numbers(dtype: str, weights: str) -> str:
    return dtype if weights == "float" else f"{dtype}, {weights} weights"


def _compile(name: str, function: Callable[..., Any], inputs: tuple[Any, ...], machine: Machine) -> Program:
    traced = function.trace(*inputs)
    operations = program.matmul_operations(traced.jaxpr.jaxpr)
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0]
        return Program(name, 0, 0, float("inf"), operations, 0.0, None, reason, None)
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if machine.devices[0].platform == "tpu":
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    else:  # other compilers do not know which buffers are alive at the same time
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    try:
        collectives = program.collectives(compiled.as_text())
    except jax.errors.JaxRuntimeError:
        collectives = None
    outputs = jax.tree.map(_placed, traced.out_info, compiled.output_shardings)
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    return Program(name, arguments, temporary, peak, operations, seconds, collectives, None, outputs)
