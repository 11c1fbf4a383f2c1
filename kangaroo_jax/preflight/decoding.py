"""What decoding needs on a machine, prefill and rounds of draft and verification, and how fast it would be."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kangaroo_jax.checkpoint.adapter import check_exit_layer
from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.decode.prefill import Admission, empty_prompts, empty_slots, prefill_and_admit
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.engine.part_costs import PartCounts
from kangaroo_jax.engine.programs import compiler_options
from kangaroo_jax.engine.shapes import CHUNK, MAX_EOS, PIECE, Shapes, capacity_class
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.attention.backend import choose_backend
from kangaroo_jax.model.cache import batch_shardings
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.preflight.compiling import abstract, abstract_target, compiled, numbers
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.prediction import RoundWork, decoding_prediction, part
from kangaroo_jax.preflight.report import Program, Report


def decoding(
    target_name: str,
    dtype: str,
    draft: DraftConfig,
    prompt_tokens: int,
    max_new_tokens: int,
    model_parallel: int,
    machine: Machine,
    *,
    weights: str = "float",
    batch_size: int = 1,
    data_parallel: int = 1,
) -> Report:
    """What decoding needs on a machine: prefill, and rounds of draft and verification.

    Args:
      target_name: as for `model_config`.
      dtype: of weights and caches.
      draft: how to draft; must name its exit layer.
      prompt_tokens: of each prompt.
      max_new_tokens: of each answer.
      model_parallel: devices that each layer is split over.
      machine: to compile for.
      weights: as `load_target`.
      batch_size: sequences decoded together.
      data_parallel: groups of such devices that the sequences are split over.

    Raises:
      InputError: for settings that are wrong, do not fit the machine's devices, or name a target of unknown shape.
      MachineError: as `compiled`.
    """
    config = model_config(target_name)
    check_exit_layer(draft.exit_layer, config)
    longest = config.context - max_new_tokens
    if prompt_tokens > longest:
        raise InputError(
            f"context: {prompt_tokens} tokens and {max_new_tokens} new ones are more than the target's "
            f"{config.context}; give at most {longest}"
        )
    mesh = sharding.decoding_mesh(model_parallel, machine.devices, data_parallel)
    sharding.check_batch_size(batch_size, mesh)
    models = (
        abstract_target(config, dtype, mesh, weights),
        abstract(abstract_adapter(config, jnp.dtype(dtype)), mesh),
    )
    # Where sequences decide how far to draft, rounds need as much, or less.
    shape = RoundShape.kangaroo(
        draft.exit_layer, dataclasses.replace(draft, decide=None), config.vocab_size, machine.platform
    )
    shape = dataclasses.replace(shape, widths=shape.widths[-1:])  # a round runs one; narrower ones need less
    shapes = Shapes(shape, accelerator=machine.platform != "cpu")
    plan = shapes.plan(prompt_tokens, max_new_tokens)
    backend = choose_backend(mesh if mesh.size > 1 or machine.platform != "cpu" else None, machine.devices)
    rings = shapes.rings(config.attention_kinds)
    static = {"exit_layer": draft.exit_layer, "backend": backend, "rings": rings}
    looks_up = draft.lookup is not None
    everywhere = NamedSharding(mesh, PartitionSpec())

    def array(dimensions: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, kind, sharding=everywhere)

    def rows_of(tree: PyTree) -> PyTree:
        """A batch, where the engine has it; a single row of a mesh's data axis is on all its devices."""

        def place(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
            splits = "data" in where.spec and x.shape[0] % mesh.shape["data"] == 0
            where = where if splits or "data" not in where.spec else everywhere
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        where = batch_shardings(tree, mesh) if mesh.size > 1 else jax.tree.map(lambda _: everywhere, tree)
        return jax.tree.map(place, tree, where)

    # Caches as large as the answer's end needs; prompts are prefilled in caches of their own beside them.
    capacity = capacity_class(max(plan.positions, plan.prompt_capacity))
    empty = functools.partial(
        empty_slots, batch=batch_size, max_eos=MAX_EOS, capacity=capacity, looks_up=looks_up, **static
    )
    state = rows_of(jax.eval_shape(empty, *models))
    # Prompts of several pieces are prefilled one at a time, shorter ones together.
    rows, prompts = 1, None
    if prompt_tokens <= PIECE:
        _, rows = shapes.group(batch_size, batch_size)
    else:
        prompts = functools.partial(empty_prompts, rows=1, capacity=plan.prompt_capacity, looks_up=looks_up, **static)
        prompts = rows_of(jax.eval_shape(prompts, *models))
    admission = Admission(array((rows,)), array((rows, MAX_EOS)), jax.eval_shape(lambda: Sampling.greedy(rows)))
    admission = jax.tree.map(lambda x: array(x.shape, x.dtype), admission)
    first = jax.jit(
        functools.partial(prefill_and_admit, sampled=False, **static),
        donate_argnums=2,
        out_shardings=(jax.tree.map(lambda x: x.sharding, state), everywhere),
    )
    each = array((rows,))
    inputs = (*models, state, prompts, array((rows, plan.width)), each, each, each, admission)
    name = "prefill" if prompts is None else "prefill, its last piece"
    options = compiler_options(machine.platform)
    programs = [compiled(name, first, inputs, machine, options)]

    def rounds(name: str, models: PyTree, state: PyTree, shape: RoundShape) -> Program:
        run = jax.jit(
            functools.partial(run_rounds, shape=shape, sampled=False, tokens=CHUNK),
            donate_argnums=2,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
        )
        inputs = (*models, state, array((batch_size,), jnp.bool_), array((), jnp.float32), array(()), array(()))
        return compiled(name, run, inputs, machine, options)

    prediction = None
    if programs[0].outputs is not None:
        programs.append(rounds("rounds (operations and communication of one)", models, state, shape))
    if machine.limits is not None and programs[-1].outputs is not None:
        plain, alone = RoundShape.plain(platform=machine.platform), (models[0], None)
        empty = functools.partial(empty, exit_layer=plain.exit_layer, looks_up=False)
        baseline = rounds("plain rounds", alone, rows_of(jax.eval_shape(empty, *alone)), plain)
        layers = [keys.sharding.shard_shape(keys.shape) for keys in state.shallow.keys + state.deep.keys]
        cached, batch = [2 * math.prod(layer) for layer in layers], layers[0][0]
        counted = (*models, draft.exit_layer)
        num_bytes = PartCounts.of_bytes(*counted, cached)
        operations = PartCounts.of_operations(*counted, batch, cached)
        pieces = -(-prompt_tokens // PIECE)

        def attended(ring: int | None) -> int:
            """Places that each token of the prompt attends to in a layer: in a ring's, also the piece behind it."""
            if ring is None or ring >= plan.prompt_capacity:
                return plan.prompt_capacity
            return ring + (plan.width if prompts is None else PIECE)

        # Of the head, a prompt needs one row.
        multiplied = PartCounts.of_operations(
            *counted,
            rows,
            [
                rows * numbers // batch * attended(ring) // min(ring or capacity, capacity)
                for numbers, ring in zip(cached, rings or (None,) * len(cached), strict=True)
            ],
        )
        prefill = part(
            f"prefill of {rows} x {prompt_tokens}",
            pieces * (num_bytes.plain_step - num_bytes.head) + num_bytes.head,
            prompt_tokens * (multiplied.plain_step - multiplied.head) + multiplied.head,
            machine.limits,
            dtype,
        )
        prediction = decoding_prediction(
            machine.limits,
            dtype,
            num_bytes,
            operations,
            RoundWork.of(baseline.body, programs[-1].body),
            prefill,
            width=shape.widths[-1],
            rows=1 if draft.tree is None else draft.tree.topk,
            max_draft_len=draft.max_draft_len,
            batch=batch_size,
        )
    return Report(
        machine,
        dict(mesh.shape),
        f"decoding {'one sequence' if batch_size == 1 else f'{batch_size} sequences'}: {target_name}, exit layer "
        f"{draft.exit_layer}, {draft}, prompt of {prompt_tokens} tokens, {max_new_tokens} new, "
        f"{numbers(dtype, weights)}",
        [],
        programs,
        prediction,
    )
