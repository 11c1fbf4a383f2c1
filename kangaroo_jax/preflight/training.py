"""What a training run's programs need on a machine, and how fast a step would be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.config import TrainConfig
from kangaroo_jax.model import sharding
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.preflight.compiling import abstract_target, compiled, numbers, placed
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.prediction import Prediction, part
from kangaroo_jax.preflight.report import Report
from kangaroo_jax.train import draft_vocabulary, teacher
from kangaroo_jax.train import settings as training_settings
from kangaroo_jax.train import step as training_step


def training(config: TrainConfig, machine: Machine) -> Report:
    """What a training step of a configuration needs on a machine.

    Raises:
      InputError: for settings that are wrong, do not fit the machine's devices, or name a target of unknown shape.
      MachineError: as `compiled`.
    """
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
    drafted = placed(jax.ShapeDtypeStruct((size,), jnp.int32), NamedSharding(mesh, PartitionSpec())) if size else None
    step_count = jax.ShapeDtypeStruct((), jnp.int32)
    programs = [compiled("training step", step, (*state, target, batch, drafted, step_count, config.loss), machine)]
    prediction = None
    if machine.limits is not None and programs[0].outputs is not None:
        # What a step reads at least: its arguments once.
        each = programs[0].arguments, programs[0].operations // mesh.size
        launched = None if programs[0].body is None else programs[0].body.without_loops
        parts = [part("training step", *each, machine.limits, config.dtype, launched)]
        tokens = config.batch_size * config.sequence_length
        prediction = Prediction(machine.limits, config.dtype, parts, None, None, 0, tokens)
    if config.teacher == "cached":
        inputs = target, {name: x for name, x in batch.items() if name != "teacher"}
        programs.append(compiled("teacher's pass", teacher.program(config, mesh), inputs, machine))
    return Report(
        machine,
        dict(mesh.shape),
        f"training step: {config.target}, exit layer {config.exit_layer}, batch {config.batch_size} x "
        f"{config.sequence_length}, {numbers(config.dtype, config.weights)}",
        sharding.undivided(dict(zip(parameter_paths(target), jax.tree.leaves(target), strict=True)), mesh),
        programs,
        prediction,
    )
