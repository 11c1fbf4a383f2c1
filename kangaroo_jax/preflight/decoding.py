"""What decoding needs on a machine, prefill and rounds of draft and verification, and how fast it would be."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from kangaroo_jax.checkpoint.adapter import check_exit_layer
from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.config import AdapterConfig, DraftConfig
from kangaroo_jax.decode.prefill import Admission, empty_prompts, empty_slots, prefill_and_admit
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.engine.part_costs import PartCounts, size_on_device
from kangaroo_jax.engine.programs import compiler_options
from kangaroo_jax.engine.shapes import CHUNK, MAX_EOS, PIECE, Shapes
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.attention.backend import choose_backend
from kangaroo_jax.model.cache import batch_shardings
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.kinds import abstract_adapter
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.preflight.compiling import abstract, abstract_target, compiled, in_dtype, numbers
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.prediction import Part, PartPredictor, RoundWork, decoding_prediction, part
from kangaroo_jax.preflight.report import Program, Report
from kangaroo_jax.program import Launched


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
    long_context: bool = False,
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
      long_context: as `load_target`.

    Raises:
      InputError: for settings that are wrong, do not fit the machine's devices, or name a target of unknown shape.
      MachineError: as `compiled`.
    """
    config = model_config(target_name)
    if long_context:
        config = config.for_long_texts()
    check_exit_layer(draft.exit_layer, config)
    longest = config.context - max_new_tokens
    if prompt_tokens > longest:
        raise InputError(
            f"context: {prompt_tokens} tokens and {max_new_tokens} new ones are more than the target's "
            f"{config.context}; give at most {longest}"
        )
    mesh = sharding.decoding_mesh(model_parallel, machine.devices, data_parallel)
    sharding.check_batch_size(batch_size, mesh)
    work = Work(config, None, dtype, draft, prompt_tokens, max_new_tokens, machine, mesh, batch_size, weights)
    programs = [work.no_room() or work.prefill()]
    prediction, notes = None, work.undivided
    if programs[0].outputs is not None:
        programs.append(work.rounds())
    if machine.limits is not None and programs[-1].outputs is not None:
        launched = RoundWork.of(work.plain_rounds().body, programs[-1].body)
        if launched is None:
            notes.append(
                "the parts of a round were not found in the compiled program: predicted without the start of its "
                "kernels and without cycles"
            )
        prediction = decoding_prediction(
            work.predictor(launched),
            work.predicted_prefill(None if programs[0].body is None else programs[0].body.without_loops),
            width=work.shape.widths[-1],
            rows=1 if draft.tree is None else draft.tree.topk,
            max_draft_len=draft.max_draft_len,
            batch=batch_size,
            cached=sum(work.plain_cached) * jnp.dtype(dtype).itemsize,
        )
    return Report(
        machine,
        dict(mesh.shape),
        f"decoding {'one sequence' if batch_size == 1 else f'{batch_size} sequences'}: {target_name}, exit layer "
        f"{draft.exit_layer}, {draft}, prompt of {prompt_tokens} tokens, {max_new_tokens} new, "
        f"{numbers(dtype, weights)}",
        notes,
        programs,
        prediction,
    )


@dataclasses.dataclass(frozen=True)
class Work:
    """Decoding a batch on a machine, as shapes: its programs, and what their parts read and multiply.

    Attributes:
      config: of the target.
      adapter: the draft model or its shapes, in any dtype; None is the paper's, without a draft vocabulary.
      dtype: of weights and caches.
      draft: how to draft; names its exit layer.
      prompt_tokens: of each prompt.
      max_new_tokens: of each answer.
      machine: to compile for.
      mesh: of its devices.
      batch_size: sequences decoded together.
      weights: as `load_target`.
    """

    config: ModelConfig
    adapter: Adapter | None
    dtype: str
    draft: DraftConfig
    prompt_tokens: int
    max_new_tokens: int
    machine: Machine
    mesh: Mesh
    batch_size: int = 1
    weights: str = "float"

    @functools.cached_property
    def models(self) -> tuple[Any, Adapter]:
        """Target and draft model."""
        dtype = jnp.dtype(self.dtype)
        if self.adapter is None:
            adapter = abstract_adapter(self.config, dtype, AdapterConfig(Adapter.kind))
        else:
            adapter = in_dtype(self.adapter, dtype)
        return abstract_target(self.config, self.dtype, self.mesh, self.weights), abstract(adapter, self.mesh)

    @property
    def undivided(self) -> list[str]:
        """A line for each kind of parameter that each device holds all of, where it should have a part."""
        target = self.models[0]
        return sharding.undivided(dict(zip(parameter_paths(target), jax.tree.leaves(target), strict=True)), self.mesh)

    @functools.cached_property
    def shape(self) -> RoundShape:
        """Of a round. Where sequences decide how far to draft, rounds need as much, or less; but the draft model's
        caches have room for a few positions more."""
        draft = dataclasses.replace(self.draft, decide=None)
        num_tokens = self.models[1].num_tokens(self.config.vocab_size)
        shape = RoundShape.kangaroo(draft.exit_layer, draft, num_tokens, self.machine.platform)
        return dataclasses.replace(shape, widths=shape.widths[-1:])  # a round runs one; narrower ones need less

    @functools.cached_property
    def _shapes(self) -> Shapes:
        return Shapes(self.shape, accelerator=self.machine.platform != "cpu")

    @functools.cached_property
    def _plan(self) -> Any:
        return self._shapes.plan(self.prompt_tokens, self.max_new_tokens)

    @property
    def _capacity(self) -> int:
        # As large as the answer's end needs. In a batch of several, prompts are prefilled in caches of their own.
        return self._shapes.room(self._plan, self._plan.positions, 0, begins=True)

    @functools.cached_property
    def _plain_shape(self) -> RoundShape:
        return RoundShape.plain(platform=self.machine.platform)

    @property
    def _plain_capacity(self) -> int:
        """Of plain decoding, whose rounds fill one position."""
        shapes = dataclasses.replace(self._shapes, round=self._plain_shape)
        plan = shapes.plan(self.prompt_tokens, self.max_new_tokens)
        return shapes.room(plan, plan.positions, 0, begins=True)

    @functools.cached_property
    def _rings(self) -> tuple[int | None, ...]:
        return self._shapes.rings(self.config.attention_kinds)

    @property
    def _static(self) -> dict[str, Any]:
        alone = self.mesh.size == 1 and self.machine.platform == "cpu"
        backend = choose_backend(None if alone else self.mesh, self.machine.devices)
        return {"exit_layer": self.draft.exit_layer, "backend": backend, "rings": self._rings}

    @property
    def _everywhere(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def _array(self, dimensions: tuple[int, ...], kind: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dimensions, kind, sharding=self._everywhere)

    def _rows_of(self, tree: PyTree) -> PyTree:
        """A batch, where the engine has it; a single row of a mesh's data axis is on all its devices."""
        mesh, everywhere = self.mesh, self._everywhere

        def place(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
            splits = "data" in where.spec and x.shape[0] % mesh.shape["data"] == 0
            where = where if splits or "data" not in where.spec else everywhere
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        where = batch_shardings(tree, mesh) if mesh.size > 1 else jax.tree.map(lambda _: everywhere, tree)
        return jax.tree.map(place, tree, where)

    def _empty(self, models: PyTree, **static: Any) -> PyTree:
        """Slots as the engine has them."""
        static = self._static | {"looks_up": self._looks_up, "capacity": self._capacity} | static
        empty = functools.partial(empty_slots, batch=self.batch_size, max_eos=MAX_EOS, **static)
        return self._rows_of(jax.eval_shape(empty, *models))

    @property
    def _looks_up(self) -> bool:
        return self.draft.lookup is not None

    @functools.cached_property
    def _state(self) -> PyTree:
        return self._empty(self.models)

    @property
    def _prompt_rows(self) -> int:
        """Prompts that are prefilled together: those of several pieces one at a time."""
        return self._shapes.group(self.batch_size, self.batch_size)[1] if self.prompt_tokens <= PIECE else 1

    @property
    def _alone(self) -> bool:
        """Whether the batch is one long prompt, which is prefilled in the only caches that there are. They grow as its
        answer does."""
        return self.batch_size == 1 and self.prompt_tokens > PIECE

    @property
    def _prompt_capacity(self) -> int:
        if self._alone:
            return self._shapes.room(self._plan, self.prompt_tokens, 1, begins=True)
        return self._plan.prompt_capacity

    @functools.cached_property
    def _prefill_inputs(self) -> tuple[Any, ...]:
        rows, prompts, array = self._prompt_rows, None, self._array
        state = None if self._alone else self._state
        if self.prompt_tokens > PIECE:
            static = self._static | {"capacity": self._prompt_capacity, "looks_up": self._looks_up}
            prompts = self._rows_of(jax.eval_shape(functools.partial(empty_prompts, rows=1, **static), *self.models))
        each = array((rows,))
        admission = Admission(each, array((rows, MAX_EOS)), jax.eval_shape(lambda: Sampling.greedy(rows)))
        admission = jax.tree.map(lambda x: array(x.shape, x.dtype), admission)
        width = PIECE if self.prompt_tokens > PIECE else self._plan.width
        return *self.models, state, prompts, array((rows, width)), each, each, each, admission

    def no_room(self) -> Program | None:
        """Prefill, where weights and caches alone are more than a device holds, which needs no compiler to tell."""
        memory = self.machine.memory
        needed = self._prefill_inputs, (*self.models, self._state)
        least = max(sum(size_on_device(x) * x.dtype.itemsize for x in jax.tree.leaves(x)) for x in needed)
        if memory is None or least <= memory:
            return None
        why = f"weights and caches alone take {least / 2**30:.2f} GiB of a device's {memory / 2**30:.2f}"
        return Program("prefill", least, 0, float("inf"), 0, 0.0, None, why, None, None)

    def prefill(self) -> Program:
        """Prompts prefilled and admitted to their slots; of a long one, its last piece, as wide as the others are."""
        function = functools.partial(prefill_and_admit, sampled=False, **self._static)
        state = self._state
        if self._alone:
            state = self._rows_of(jax.eval_shape(function, *self._prefill_inputs)[0])
        first = jax.jit(
            function,
            donate_argnums=3 if self._alone else 2,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), self._everywhere),
        )
        name = "prefill, its last piece" if self.prompt_tokens > PIECE else "prefill"
        return compiled(name, first, self._prefill_inputs, self.machine, compiler_options(self.machine.platform))

    def rounds(self) -> Program:
        """Rounds with drafts."""
        name = "rounds (operations and communication of one)"
        return self._rounds(name, self.models, self._state, self.shape)

    def plain_rounds(self) -> Program:
        """Rounds of plain decoding."""
        return self._rounds("plain rounds", (self.models[0], None), self._plain_state, self._plain_shape)

    def _rounds(self, name: str, models: PyTree, state: PyTree, shape: RoundShape) -> Program:
        run = jax.jit(
            functools.partial(run_rounds, shape=shape, sampled=False, tokens=CHUNK),
            donate_argnums=2,
            out_shardings=(jax.tree.map(lambda x: x.sharding, state), None),
        )
        array = self._array
        inputs = (*models, state, array((self.batch_size,), jnp.bool_), array((), jnp.float32), array(()), array(()))
        return compiled(name, run, inputs, self.machine, compiler_options(self.machine.platform))

    @functools.cached_property
    def _plain_state(self) -> PyTree:
        static = {"exit_layer": self._plain_shape.exit_layer, "capacity": self._plain_capacity, "looks_up": False}
        return self._empty((self.models[0], None), **static)

    @functools.cached_property
    def cached(self) -> list[int]:
        """Of each layer of the target: numbers in its buffers on one device, keys and values together."""
        return _numbers_cached(self._state)

    @functools.cached_property
    def plain_cached(self) -> list[int]:
        """The same in plain decoding."""
        return _numbers_cached(self._plain_state)

    @property
    def _batch(self) -> int:
        """Sequences on one device."""
        groups = self.mesh.shape["data"]
        return self.batch_size // groups if self.batch_size % groups == 0 else self.batch_size

    @functools.cached_property
    def num_bytes(self) -> PartCounts:
        """That each part reads on one device."""
        plain, others = (
            PartCounts.of_bytes(*self.models, self.draft.exit_layer, cached)
            for cached in (self.plain_cached, self.cached)
        )
        return dataclasses.replace(others, plain_step=plain.plain_step)

    def _operations(self, batch: int, cached: list[int]) -> PartCounts:
        return PartCounts.of_operations(*self.models, self.draft.exit_layer, batch, cached)

    def predictor(self, launched: RoundWork | None) -> PartPredictor:
        """Of the parts of a round. `launched`: by the compiled ones; the machine's limits must be known."""
        plain, others = (self._operations(self._batch, cached) for cached in (self.plain_cached, self.cached))
        operations = dataclasses.replace(others, plain_step=plain.plain_step)
        return PartPredictor(self.machine.limits, self.dtype, self.num_bytes, operations, launched)

    def predicted_prefill(self, launched: Launched | None = None) -> Part:
        """All prompts that are prefilled together, in all their pieces. The machine's limits must be known. `launched`:
        by the compiled piece."""
        groups, capacity = self.mesh.shape["data"], self._prompt_capacity
        # On one device.
        rows = self._prompt_rows // groups if self._prompt_rows % groups == 0 else self._prompt_rows
        pieces = -(-self.prompt_tokens // PIECE)

        def in_caches(places: Callable[[int], int]) -> list[int]:
            """Numbers of these prompts in each layer's caches, of which `places` says how many places count, given how
            many there are."""
            found = zip(self.cached, self._rings or (None,) * len(self.cached), strict=True)
            return [
                rows
                * numbers
                // self._batch
                * places(min(ring or capacity, capacity))
                // min(ring or self._capacity, self._capacity)
                for numbers, ring in found
            ]

        def attended(held: int) -> int:
            """Places that each token attends to: in a ring, also those of the piece behind it."""
            return held if held == capacity else held + (self._plan.width if self.prompt_tokens <= PIECE else PIECE)

        read = PartCounts.of_bytes(*self.models, self.draft.exit_layer, in_caches(lambda held: held))
        # Of the head, a prompt needs one row.
        multiplied = self._operations(rows, in_caches(attended))
        return part(
            f"prefill of {self._prompt_rows} x {self.prompt_tokens}",
            pieces * (read.plain_step - read.head) + read.head,
            ((pieces - 1) * PIECE + self._plan.width) * (multiplied.plain_step - multiplied.head) + multiplied.head,
            self.machine.limits,
            self.dtype,
            None if launched is None else launched * pieces,
        )


def _numbers_cached(state: DecodeState) -> list[int]:
    keys = state.shallow.keys + state.deep.keys
    return [2 * math.prod(layer.sharding.shard_shape(layer.shape)) for layer in keys]
