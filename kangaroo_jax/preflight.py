"""Will it fit: compiles the real programs for a machine, from shapes alone, and says what they need there.

The machine is a TPU topology that need not be attached (its compiler comes with the libtpu package), or `local`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags
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
from kangaroo_jax.model.drafts.kangaroo import abstract_adapter
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel

PREFLIGHT = flags.DEFINE_string(
    "preflight",
    None,
    "Compile for this machine, print what it needs there against what there is, and stop: a TPU topology such as "
    "v5e:4x4 (pip install -r requirements-preflight.txt; no TPU needed), or local. No weights are read.",
)
_LOCAL = "local"
_GIB = 2**30
# Memory of one device of each kind, as the runtime counts devices (a chip of TPU7x is two).
_HBM = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32, "TPU7x": 96}
_NAMES = ("v5e", "v5p", "v6e", "tpu7x")


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a preflight compiles for.

    Attributes:
      name: as the user gave it.
      devices: to make a mesh of; they need not be attached.
      memory: bytes of each; None where it is not known.
    """

    name: str
    devices: Sequence[Any]
    memory: int | None

    def __str__(self) -> str:
        return f"{self.name} ({len(self.devices)} x {self.devices[0].device_kind})"


def find_machine(name: str) -> Machine:
    """The machine that `--preflight` names. Must come before anything that asks JAX for its devices.

    Raises:
      InputError: for a name that is none.
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
            f"--preflight={name}: expected local, or a TPU topology: one of {', '.join(_NAMES)}, a colon and the "
            "chips along each axis, such as v5e:4x4 or v5p:2x2x2"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise MachineError(
            f"--preflight={name} needs TPU's compiler, which no TPU is needed for: "
            "pip install -r requirements-preflight.txt"
        )
    jax.config.update("jax_platforms", "cpu")  # nothing here runs on a device
    # libtpu would look for a TPU, and say at length that there is none.
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
    small = {} if max(chips) > 1 else {"chips_per_host_bounds": [1, 1, 1]}  # a host has more than one by default
    try:
        devices = topologies.get_topology_desc(name, "tpu", **small).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        if "INVALID_ARGUMENT" not in reason:
            raise MachineError(f"--preflight={name}: TPU's compiler could not be loaded ({reason})") from None
        raise InputError(f"--preflight={name}: no such topology ({reason})") from None
    return Machine(name, devices, _HBM[devices[0].device_kind] * _GIB)


def abstract(tree: PyTree, mesh: Mesh) -> PyTree:
    """Weights as shapes, placed as loading places them."""
    leaves, structure = jax.tree.flatten(tree)
    placed = [
        _placed(x, sharding.placement(path, x.shape, NamedSharding(mesh, sharding.partition(path, x.shape, mesh))))
        for path, x in zip(parameter_paths(tree), leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, placed)


def abstract_target(config: ModelConfig, dtype: str, mesh: Mesh) -> TargetModel:
    """The target as shapes."""
    return abstract(nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype))), mesh)


def _placed(x: Any, where: Sharding | Format) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


def training(config: TrainConfig, machine: Machine) -> bool:
    """Prints what a training step of a configuration needs on a machine; says whether it fits.

    Raises:
      InputError: for settings that are wrong, do not fit the machine's devices, or name a target of unknown shape.
    """
    # Training's packages are not needed to decode.
    from kangaroo_jax.checkpoint.adapter import check_exit_layer
    from kangaroo_jax.checkpoint.known_models import model_config
    from kangaroo_jax.train import settings as training_settings
    from kangaroo_jax.train import step as training_step
    from kangaroo_jax.train import teacher

    shape = model_config(config.target)
    check_exit_layer(config.exit_layer, shape)
    training_settings.check_context(config, shape, config.target)
    mesh = training_settings.make_mesh(config, machine.devices)
    target = abstract_target(shape, config.dtype, mesh)
    optimizer = training_step.make_optimizer(config)
    state = training_step.abstract_state(optimizer, shape, mesh)
    batch = training_step.abstract_batch(config, shape, mesh)
    step, _ = training_step.compiled(optimizer, shape, config, mesh)
    print(f"{machine}: {_describe(mesh)}")
    print(
        f"training step: {config.target}, exit layer {config.exit_layer}, batch {config.batch_size} x "
        f"{config.sequence_length}, {config.dtype}"
    )
    for note in sharding.undivided(dict(zip(parameter_paths(target), jax.tree.leaves(target), strict=True)), mesh):
        print(f"note: {note}")
    reports = [_report("training step", step, (*state, target, batch), machine)]
    if config.teacher == "cached":
        inputs = target, {name: x for name, x in batch.items() if name != "teacher"}
        reports.append(_report("teacher's pass", teacher.program(config, mesh), inputs, machine))
    return _conclude(reports, machine)


def decoding(
    target_name: str,
    dtype: str,
    draft: DraftConfig,
    prompt_tokens: int,
    max_new_tokens: int,
    model_parallel: int,
    machine: Machine,
) -> bool:
    """Prints what decoding one sequence needs on a machine: prefill, and rounds of draft and verification; says
    whether it fits. `draft` names its exit layer.

    Raises:
      InputError: as `training`.
    """
    from kangaroo_jax.checkpoint.adapter import check_exit_layer
    from kangaroo_jax.checkpoint.known_models import model_config
    from kangaroo_jax.decode import generate, host_loop
    from kangaroo_jax.decode.prefill import bucket, prefill

    shape = model_config(target_name)
    check_exit_layer(draft.exit_layer, shape)
    mesh = sharding.decoding_mesh(model_parallel, machine.devices)
    target = abstract_target(shape, dtype, mesh)
    adapter = abstract(abstract_adapter(shape, jnp.dtype(dtype)), mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(dimensions: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, kind, sharding=everywhere)

    # As host_loop.run rounds them.
    time_ = bucket(prompt_tokens, host_loop.PROMPT_STEP)
    room = bucket(max_new_tokens + draft.max_draft_len + 1, host_loop.CACHE_STEP)
    slots = generate.cache_slots(adapter, draft)
    capacity = bucket(max(time_, prompt_tokens + max_new_tokens + slots), host_loop.CACHE_STEP)
    ends = host_loop.EOS_STEP
    print(f"{machine}: {_describe(mesh)}")
    print(
        f"decoding one sequence: {target_name}, exit layer {draft.exit_layer}, {draft}, prompt of {prompt_tokens} "
        f"tokens, {max_new_tokens} new, {dtype}"
    )
    first = jax.jit(functools.partial(prefill, exit_layer=draft.exit_layer, capacity=capacity, room=room))
    inputs = (target, adapter, array((1, time_)), array((1,)), array((1,)), array((ends,)))
    reports = [_report("prefill", first, inputs, machine)]
    state = reports[0].outputs
    if state is not None:
        one_round = functools.partial(
            generate.kangaroo_round,
            exit_layer=draft.exit_layer,
            max_draft_len=draft.max_draft_len,
            widths=generate.verification_widths(draft)[-1:],  # a round runs one; narrower ones need less
            tree=draft.tree,
        )
        rounds = jax.jit(
            functools.partial(host_loop.advance_rounds, one_round),
            donate_argnums=2,
            out_shardings=jax.tree.map(lambda x: x.sharding, state),
        )
        inputs = (target, adapter, state, array(()), array((ends,)), array((), jnp.float32))
        reports.append(_report("rounds (operations and communication of one)", rounds, inputs, machine))
    return _conclude(reports, machine)


@dataclasses.dataclass(frozen=True)
class _Report:
    peak: float  # bytes of one device
    outputs: PyTree  # shapes and shardings; None where it could not be compiled


def _report(name: str, function: Callable[..., Any], inputs: tuple[Any, ...], machine: Machine) -> _Report:
    """Compiles, prints the table, and gives the peak."""
    traced = function.trace(*inputs)
    operations = program.matmul_operations(traced.jaxpr.jaxpr)
    start = time.perf_counter()
    print(f"\n{name}")
    try:
        with _quiet():
            compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).split("RESOURCE_EXHAUSTED:")[-1].strip().splitlines()[0]
        print(f"  the compiler found no room: {reason}")
        return _Report(float("inf"), None)
    memory = compiled.memory_analysis()
    if machine.devices[0].platform == "tpu":
        peak = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    else:  # not all compilers know when which buffer is alive
        results = memory.output_size_in_bytes - memory.alias_size_in_bytes
        peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    rows = {
        "arguments, per device": _gib(memory.argument_size_in_bytes),
        "temporary, per device": _gib(memory.temp_size_in_bytes),
        "peak, per device": _gib(peak),
        "matrix products, all devices": f"{operations:.3g} FLOPs",
        "compiled in": f"{time.perf_counter() - start:.0f} s",
    }
    try:
        with _quiet():
            text = compiled.as_text()
        for kind, found in program.collectives(text).items():
            rows[f"{kind}, per device"] = f"{_gib(found.num_bytes)} in {found.count}"
    except jax.errors.JaxRuntimeError:
        rows["communication"] = "unreadable; install the libtpu that goes with this JAX: requirements-preflight.txt"
    for row, value in rows.items():
        print(f"  {row:30}{value:>24}")
    outputs = jax.tree.map(_placed, traced.out_info, compiled.output_shardings)
    return _Report(peak, outputs)


def _conclude(reports: list[_Report], machine: Machine) -> bool:
    peak = max(report.peak for report in reports)
    if machine.memory is None:
        print("\nthe memory of this device is not known; compare the peak with it")
        return True
    fits = peak <= machine.memory
    share = "" if peak == float("inf") else f": {_gib(peak)} of {_gib(machine.memory)} ({peak / machine.memory:.0%})"
    print(f"\n{'fits' if fits else 'does not fit'}{share}")
    return fits


def _describe(mesh: Mesh) -> str:
    return "mesh " + ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the lines that compilers write straight to standard error."""
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)
