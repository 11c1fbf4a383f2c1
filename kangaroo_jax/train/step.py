"""The training step: initial parameters, optimizer, and the jitted programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree

from kangaroo_jax.checkpoint import adapter as adapter_checkpoint
from kangaroo_jax.config import AdapterConfig, TrainConfig
from kangaroo_jax.model import sharding
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kinds import KINDS, abstract_adapter
from kangaroo_jax.model.layers import RMSNorm
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.ops import as_arrays
from kangaroo_jax.model.target import TargetModel
from kangaroo_jax.train.objective import adapter_loss, metrics_by_depth

Parameters = dict[str, Array]  # dotted path -> float32 array

# What memory's norm weights start at. Its products start at zero, and AdamW moves all matrices at one rate: inputs
# twice as large make the product grow twice as fast.
_MEMORY_NORM = 2.0


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, with linear warm-up and then a constant or cosine rate.

    Norm weights are not decayed. Betas, warm-up and clipping as in the authors' code.
    """
    rate, warmup = config.optimizer.learning_rate, config.optimizer.warmup_steps
    if config.optimizer.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, config.steps)
    elif warmup:
        schedule = optax.warmup_constant_schedule(0.0, rate, warmup)
    else:  # optax's warm-up of no steps stays at its first value, 0
        schedule = optax.constant_schedule(rate)
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=config.optimizer.weight_decay,
            mask=lambda parameters: {path: x.ndim > 1 for path, x in parameters.items()},
        ),
    )


def initial_parameters(
    target: TargetModel,
    exit_layer: int,
    initialization: str,
    seed: int,
    adapter: AdapterConfig,
) -> Parameters:
    """float32 parameters to start from.

    Args:
      target: the frozen target.
      exit_layer: number of shallow layers.
      initialization: "layer": the attention and input norm of the target's layer
        `exit_layer`, the first that the adapter replaces, and the target's final norm. "zero_output": random attention
        whose output projection is zero, so that it adds nothing at first, and the target's final norm. "random":
        matrices from a normal distribution of deviation 0.02, as usual for such targets; norms of one.
      seed: for random parameters.
      adapter: its shape. Layers after the first take the target's after `exit_layer`. An MLP and what only `memory` has
        add nothing at first, in all cases: their last products are zero.
    """
    parts = {"norm": target.norm}
    ones = RMSNorm(target.config)  # where a layer has no norm before its attention
    for i, layer in enumerate(target.layers[exit_layer : exit_layer + adapter.num_layers]):
        norm = getattr(layer, "input_layernorm", ones)
        parts |= {f"layers.{i}.input_layernorm": norm, f"layers.{i}.self_attn": layer.self_attn}
    # Copies, because the training step donates its parameters and must not donate the target's weights.
    copied = {
        f"{prefix}.{path}": jnp.array(x, jnp.float32, copy=True)
        for prefix, module in parts.items()
        for path, x in adapter_checkpoint.named_leaves(as_arrays(module)).items()
    }
    shapes = adapter_checkpoint.named_leaves(abstract_adapter(target.config, jnp.float32, adapter))
    own_keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), len(shapes))
    own = {
        path: _start(key, path, like, target.config.norm_offset)
        for key, (path, like) in zip(own_keys, shapes.items(), strict=True)
        if path not in copied
    }
    if initialization == "layer":
        return copied | own

    keys = jax.random.split(jax.random.key(seed), len(copied))
    random = {
        path: _drawn(key, path, like, target.config.norm_offset)
        for key, (path, like) in zip(keys, copied.items(), strict=True)
    }
    if initialization == "zero_output":
        outputs = [path for path in random if path.endswith("o_proj")]
        random |= {path: jnp.zeros_like(copied[path]) for path in outputs} | {"norm.weight": copied["norm.weight"]}
    return random | own


def _drawn(key: Array, path: str, like: jax.ShapeDtypeStruct | Array, norm_offset: float) -> Array:
    """A parameter with a random start. `norm_offset`: what norms add to their weights."""
    if path.endswith("norm.weight"):
        return jnp.full(like.shape, 1 - norm_offset, jnp.float32)
    return jnp.zeros(like.shape) if path.endswith("bias") else 0.02 * jax.random.normal(key, like.shape)


def _start(key: Array, path: str, like: jax.ShapeDtypeStruct, norm_offset: float) -> Array:
    """What a parameter without a counterpart in the target starts as."""
    if path == "memory.norm.weight":
        return jnp.full(like.shape, _MEMORY_NORM - norm_offset)
    if path in ("memory.memory_proj", "mlp.mlp.down_proj"):
        return jnp.zeros(like.shape)
    return _drawn(key, path, like, norm_offset)


def loss_of_step(config: TrainConfig, step: int) -> str:
    """The name of the loss that the step after `step` steps trains on. It depends on the step alone, so a run that goes
    on from a checkpoint trains as if it had never stopped."""
    return "cross_entropy" if step < config.cross_entropy_steps else config.loss


def abstract_state(
    optimizer: optax.GradientTransformation, shape: ModelConfig, config: TrainConfig, mesh: Mesh
) -> tuple[Parameters, optax.OptState]:
    """Shapes and shardings of the parameters and of the optimizer's state."""

    def placed(tree: PyTree) -> PyTree:
        leaves = adapter_checkpoint.named_leaves(tree)
        where = sharding.shardings(leaves, mesh)
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[path]) for path, x in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(tree), structs)

    adapter = abstract_adapter(shape, jnp.float32, config.adapter)
    parameters = adapter_checkpoint.named_leaves(adapter)
    parameters = {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in parameters.items()}
    return placed(parameters), placed(jax.eval_shape(optimizer.init, parameters))


def abstract_batch(config: TrainConfig, shape: ModelConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of a training batch."""
    rows = (config.batch_size, config.sequence_length)
    kinds = {"tokens": jnp.int32, "loss_mask": jnp.float32, "segment_ids": jnp.int32, "positions": jnp.int32}
    where = NamedSharding(mesh, sharding.BATCH)
    batch = {name: jax.ShapeDtypeStruct(rows, kind, sharding=where) for name, kind in kinds.items()}
    if config.teacher == "cached":
        batch["teacher"] = jax.ShapeDtypeStruct((*rows, shape.hidden_size), jnp.bfloat16, sharding=where)
    return batch


def compiled(
    optimizer: optax.GradientTransformation, shape: ModelConfig, config: TrainConfig, mesh: Mesh
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The training step and the evaluation of a batch, jitted:

        train_step(parameters, optimizer state, target, batch, drafted, step, loss)
            -> parameters, optimizer state, metrics
        evaluate_batch(parameters, target, batch, drafted) -> metrics

    The target is an argument of both, not a constant in them. `drafted` are the tokens of the draft vocabulary, or
    None; `step`, how many steps were done before, decides with the run's seed which depth of a draft each position is
    trained at; `loss` is static. Where the draft model tells depths apart, each metric of `evaluate_batch` is an array
    of one value per depth. A batch that has the teacher's hidden states (`teacher`) does
    not run the deep layers. XLA sums the gradients over data and fsdp, because the batch is split over both."""
    where = jax.tree.map(lambda x: x.sharding, abstract_state(optimizer, shape, config, mesh))
    num_depths = KINDS[config.adapter.kind].depths

    def example(
        parameters: Parameters, model: TargetModel, batch: dict[str, Array], drafted: Array | None
    ) -> tuple[Any, ...]:
        adapter = adapter_checkpoint.adapter_from_parameters(shape, parameters, config.adapter.kind)
        return (
            sharding.gathered(adapter, parameter_paths(adapter), mesh),
            sharding.gathered(model, parameter_paths(model), mesh),
            batch["tokens"],
            batch["loss_mask"],
            batch["segment_ids"],
            batch["positions"],
            batch.get("teacher"),
            drafted,
        )

    static = {"exit_layer": config.exit_layer, "chunk": config.loss_chunk}

    @functools.partial(jax.jit, donate_argnums=(0, 1), static_argnums=6, out_shardings=(*where, None))
    def train_step(parameters, state, model, batch, drafted, step, loss):
        depths = None
        if num_depths > 1:
            key = jax.random.fold_in(jax.random.key(config.seed), step)
            depths = jax.random.randint(key, batch["positions"].shape, 1, num_depths + 1)

        def objective(parameters):
            return adapter_loss(*example(parameters, model, batch, drafted), depths, **static, loss=loss)

        (_, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state, parameters)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["tokens"] = jnp.sum(batch["segment_ids"] > 0)
        return optax.apply_updates(parameters, updates), state, metrics

    @jax.jit
    def evaluate_batch(parameters, model, batch, drafted):
        arguments = example(parameters, model, batch, drafted)
        if num_depths > 1:
            return metrics_by_depth(*arguments, **static, num_depths=num_depths)
        return adapter_loss(*arguments, **static, loss=config.loss)[1]

    return train_step, evaluate_batch
