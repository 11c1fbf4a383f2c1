"""Training an adapter, from a configuration to the checkpoints of a run.

A run folder holds numbered checkpoints (see checkpoint/adapter.py) and TensorBoard events. Running the same
configuration again goes on from the newest checkpoint, with the same results as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import sys
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import tensorboardX
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from kangaroo_jax import profiling
from kangaroo_jax.checkpoint import adapter as adapter_checkpoint
from kangaroo_jax.checkpoint.huggingface import Target, load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.train.cache import cache_folder
from kangaroo_jax.train.input import (
    DataConfig,
    check_files,
    device_part,
    evaluation_batches,
    load_rows,
    training_batches,
)
from kangaroo_jax.train.settings import check_config, check_context, check_same_run, make_mesh
from kangaroo_jax.train.step import abstract_state, compiled, initial_parameters, make_optimizer
from kangaroo_jax.train.teacher import TeacherCache

# Steps that --profile traces, counted from where the run starts: the first compiles.
_PROFILED = range(2, 5)


def train(config: ml_collections.ConfigDict, profile: str | None = None) -> dict[str, float]:
    """Trains an adapter, or goes on with a run that was interrupted.

    Args:
      config: see configs/demo.py for its keys.
      profile: folder for a trace of a few steps.

    Returns:
      The held-out `loss` (nats), `expected_acceptance` and `top1_agreement` at the last step.

    Raises:
      InputError: for a setting, target or text that is wrong, an output folder that holds a run with other settings,
        or a loss that is no longer finite. Nothing is written before all of the input has been read.
    """
    settings = check_config(config)
    data = DataConfig(
        **{name.removeprefix("data."): value for name, value in settings.items() if name.startswith("data.")}
    )
    check_files(data)
    mesh = make_mesh(settings)
    target = load_target(settings["target"], settings["dtype"], mesh)
    adapter_checkpoint.check_exit_layer(settings["exit_layer"], target.config)
    check_context(settings, target.config, target.name)
    output = pathlib.Path(settings["output"]).expanduser().resolve()
    newest = adapter_checkpoint.newest_step(output)
    stored = None
    if newest is not None:
        stored = adapter_checkpoint.read_metadata(newest)
        adapter_checkpoint.check_target(stored, target, newest)
        check_same_run(settings, stored["training"]["settings"], newest)
        if int(newest.name) >= settings["steps"]:
            _say(f"{output}: complete, {newest.name} steps; {_describe(stored['training']['held_out'])}")
            return stored["training"]["held_out"]

    process = _process(settings["batch_size"], mesh)
    rows, held_out = load_rows(
        data, target, settings["sequence_length"], settings["seed"], quiet=jax.process_index() > 0
    )
    if stored is not None and stored["training"]["data_fingerprint"] != rows.fingerprint:
        raise InputError(
            f"{newest}: trained on other data; expected data with fingerprint {rows.fingerprint}, found "
            f"{stored['training']['data_fingerprint']}; give the same files, or another output"
        )
    if target.mesh.size > 1:
        _say(f"{target.mesh.size} devices: " + ", ".join(f"{axis} {size}" for axis, size in target.mesh.shape.items()))
        for note in sharding.undivided(adapter_checkpoint.named_leaves(target.model), target.mesh):
            _say(f"note: {note}")
    batches = training_batches(rows, settings["batch_size"], settings["seed"], **process)
    evaluation = evaluation_batches(held_out, settings["batch_size"], settings["evaluation_windows"], **process)
    if settings["teacher"] == "cached":
        teacher = TeacherCache(rows, target, cache_folder(data.cache))
        teacher.make(target, settings, quiet=jax.process_index() > 0)
        batches = training_batches(rows, settings["batch_size"], settings["seed"], **process, extend=teacher.extend)
    training = {"settings": settings, "data_fingerprint": rows.fingerprint}
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {output} cannot be made a folder ({error.strerror}); name another") from None
    run = _Run(settings, target, batches, evaluation, training)
    if newest is not None:
        run.restore(newest)
    return run.run(output, profile)


def _process(batch_size: int, mesh: Mesh) -> dict[str, int]:
    """Which part of each batch this process reads. All of it, where the mesh gives processes other rows than one run
    of them each (a model axis over several processes shares rows between them)."""
    index, count = jax.process_index(), jax.process_count()
    rows = np.arange(batch_size).reshape(count, -1)[index] if batch_size % count == 0 else []
    if not np.array_equal(sharding.rows_here(batch_size, mesh), rows):
        return {"process_index": 0, "process_count": 1}
    return {"process_index": index, "process_count": count}


class _Run:
    """A run in memory: what is trained, where it stands, and how it goes on."""

    def __init__(
        self,
        settings: dict[str, Any],
        target: Target,
        batches: grain.DatasetIterator,
        evaluation: list[dict[str, Array]],
        training: dict[str, Any],
    ):
        self.settings, self.target = settings, target
        self.batches, self.evaluation, self.training = batches, evaluation, training
        self.optimizer = make_optimizer(settings)
        self.step = 0
        self._where = jax.tree.map(lambda x: x.sharding, abstract_state(self.optimizer, target.config, target.mesh))
        start = jax.jit(initial_parameters, static_argnums=1, out_shardings=self._where[0])
        self.parameters = start(target.model, settings["exit_layer"])
        self.state = jax.jit(self.optimizer.init, out_shardings=self._where[1])(self.parameters)
        self._train_step, self._evaluate_batch = compiled(self.optimizer, target.config, settings, target.mesh)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def restore(self, folder: pathlib.Path) -> None:
        """Takes over a checkpoint of the run."""
        position = adapter_checkpoint.read_position(folder)
        expected = adapter_checkpoint.named_leaves(self.state)
        self.parameters = sharding.put(
            adapter_checkpoint.read_arrays(folder, "adapter", self.parameters), self._where[0]
        )
        found = adapter_checkpoint.read_arrays(folder, "optimizer", expected)
        state = jax.tree.unflatten(jax.tree.structure(self.state), [found[path] for path in expected])
        # Copies: what is donated must be JAX's own, not the reader's.
        self.parameters, self.state = self._copy((self.parameters, sharding.put(state, self._where[1])))
        self.step = position["step"]
        self.batches.set_state(position["input"])

    def run(self, output: pathlib.Path, profile: str | None) -> dict[str, float]:
        settings, steps = self.settings, self.settings["steps"]
        options = ocp.CheckpointManagerOptions(max_to_keep=settings["keep_checkpoints"], cleanup_tmp_directories=True)
        manager = ocp.CheckpointManager(output, options=options, item_handlers=adapter_checkpoint.item_handlers())
        # Of several processes, the first alone reports.
        main = jax.process_index() == 0
        writer = tensorboardX.SummaryWriter(str(output), purge_step=self.step + 1, write_to_disk=main)
        if self.step:
            _say(f"{output}: going on from step {self.step}")
        # A file or a pipe gets a line now and then instead of a moving bar.
        interval = 0.5 if sys.stderr.isatty() else 30.0
        bar = tqdm(
            total=steps, initial=self.step, unit="step", mininterval=interval, dynamic_ncols=True, disable=not main
        )
        with manager, writer, bar, contextlib.ExitStack() as tracing:
            if self.step == 0:
                self._evaluate(writer)
            pending, since = [], time.monotonic()
            first = self.step
            while self.step < steps:
                if self.step == first + _PROFILED.start:
                    tracing.enter_context(profiling.trace(profile))
                self.parameters, self.state, metrics = self._train_step(
                    self.parameters, self.state, self.target.model, self._put(next(self.batches))
                )
                self.step += 1
                bar.update()
                pending.append(metrics)
                if self.step == first + _PROFILED.stop or self.step == steps:
                    jax.block_until_ready(metrics)
                    tracing.close()
                saves = self.step % settings["save_every"] == 0 or self.step == steps
                # A checkpoint records its own held-out figures.
                evaluates = saves or self.step % settings["evaluate_every"] == 0
                if self.step % settings["log_every"] == 0 or evaluates:
                    means = self._means(pending)
                    seconds = time.monotonic() - since
                    means["tokens_per_second"] = sum(batch["tokens"] for batch in pending) / seconds
                    for name, value in means.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                    bar.set_postfix_str(
                        f"loss {means['loss']:.3f}, acceptance {means['expected_acceptance']:.3f}, "
                        f"{means['tokens_per_second']:.0f} tokens/s",
                        refresh=False,
                    )
                    pending, since = [], time.monotonic()
                if evaluates:
                    self._evaluate(writer)
                if saves:
                    self._save(manager)
                if evaluates:
                    since = time.monotonic()
        return self.training["held_out"]

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        return sharding.put_batch(device_part(batch), self.settings["batch_size"], self.target.mesh)

    def _means(self, pending: list[dict[str, Array]]) -> dict[str, float]:
        """Means over the steps since the last report, whose metrics are fetched here."""
        pending[:] = [{name: float(x) for name, x in metrics.items()} for metrics in jax.device_get(pending)]
        means = {name: sum(batch[name] for batch in pending) / len(pending) for name in pending[0]}
        del means["positions"], means["tokens"]
        if not math.isfinite(means["loss"]) or not math.isfinite(means["gradient_norm"]):
            raise InputError(
                f"the loss or its gradient is not finite between steps {self.step - len(pending) + 1} and {self.step} "
                f"(loss {means['loss']}, gradient norm {means['gradient_norm']}); "
                "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
            )
        return means

    def _evaluate(self, writer: tensorboardX.SummaryWriter) -> None:
        results = jax.device_get(
            [self._evaluate_batch(self.parameters, self.target.model, self._put(batch)) for batch in self.evaluation]
        )
        weights = [float(batch.pop("positions")) for batch in results]
        self.training["held_out"] = {
            name: sum(w * float(batch[name]) for w, batch in zip(weights, results, strict=True)) / sum(weights)
            for name in results[0]
        }
        for name, value in self.training["held_out"].items():
            writer.add_scalar(f"held_out/{name}", value, self.step)
        if jax.process_index() == 0:
            tqdm.write(f"step {self.step}: {_describe(self.training['held_out'])}")

    def _save(self, manager: ocp.CheckpointManager) -> None:
        # Written in the background; the next steps overwrite what they donate, so it gets copies.
        parameters, state = self._copy((self.parameters, adapter_checkpoint.named_leaves(self.state)))
        metadata = adapter_checkpoint.adapter_metadata(
            parameters, self.target, self.settings["exit_layer"], self.training | {"step": self.step}
        )
        manager.save(
            self.step,
            args=ocp.args.Composite(
                adapter=ocp.args.PyTreeSave(parameters),
                metadata=ocp.args.JsonSave(metadata),
                optimizer=ocp.args.PyTreeSave(state),
                position=ocp.args.JsonSave({"step": self.step, "input": self.batches.get_state()}),
            ),
        )


def _say(message: str) -> None:
    """For the user; of several processes, the first alone speaks."""
    if jax.process_index() == 0:
        print(message)


def _describe(held_out: dict[str, float]) -> str:
    return (
        f"held-out loss {held_out['loss']:.4f}, expected acceptance {held_out['expected_acceptance']:.4f}, "
        f"top-1 agreement {held_out['top1_agreement']:.4f}"
    )
