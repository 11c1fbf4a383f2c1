"""Training an adapter, from a configuration to the checkpoints of a run.

A run folder holds numbered checkpoints (see checkpoint/adapter.py) and TensorBoard events. Training with the same
configuration again continues from the newest undamaged checkpoint, with the same results as an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX
from jax.sharding import Mesh
from jaxtyping import Array

from kangaroo_jax import profiling
from kangaroo_jax.checkpoint import adapter as adapter_checkpoint
from kangaroo_jax.checkpoint.target import Target, load_target
from kangaroo_jax.config import TrainConfig
from kangaroo_jax.data.cache import cache_folder
from kangaroo_jax.data.input import (
    Batch,
    Rows,
    check_files,
    device_part,
    evaluation_batches,
    load_rows,
    training_batches,
)
from kangaroo_jax.data.synthesize.run import Tally
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kinds import KINDS
from kangaroo_jax.report import SILENT, Report
from kangaroo_jax.train import checkpoints, draft_vocabulary, own_data, preemption, run_folder
from kangaroo_jax.train.settings import (
    check_adapter,
    check_context,
    check_same_run,
    check_target_folder,
    flat,
    make_mesh,
)
from kangaroo_jax.train.step import abstract_state, compiled, initial_parameters, loss_of_step, make_optimizer
from kangaroo_jax.train.teacher import TeacherCache

# Steps that `profile` traces, counted from the first of this process, which compiles.
_PROFILED = range(2, 5)


def train(
    config: TrainConfig,
    profile: str | None = None,
    report: Report = SILENT,
    on_data: Callable[[Tally], None] = lambda _: None,
) -> dict[str, float] | None:
    """Trains an adapter, or continues a run that was interrupted.

    Args:
      config: of the run.
      profile: folder for a trace of a few steps.
      report: takes what there is to say. Of several processes, only the first one's is used.
      on_data: called after each record that the target writes itself, where `data.files` is self.

    Returns:
      The held-out `loss` (nats), `expected_acceptance` and `top1_agreement` at the last step; of a draft model that
      tells the depths of a draft apart, their means over depths, and each depth's as `loss_depth_1` and so on. None if
      SIGTERM came before the last step: the run was saved, and the next call continues it.

    Raises:
      InputError: for a wrong setting, target or text, an output folder that holds a run with other settings or that
        another run is writing to, or a loss that is no longer finite. Nothing is written to `output` before all of the
        input has been read, but for the name of the run that is writing to it.
      MachineError: for a checkpoint that cannot be written.
    """
    report = report if jax.process_index() == 0 else SILENT
    # Before the data files are looked for, so that the first of two mistakes is the first to be named.
    check_target_folder(config)
    check_files(config.data)
    own_data.check(config.data, config.output)
    with contextlib.ExitStack() as stack:
        return _train(config, profile, report, on_data, stack)


def _train(
    config: TrainConfig,
    profile: str | None,
    report: Report,
    on_data: Callable[[Tally], None],
    holding: contextlib.ExitStack,
) -> dict[str, float] | None:
    """`train`, but for the first checks. `holding` ends with the run."""
    mesh = make_mesh(config)
    target = load_target(config.target, config.dtype, mesh, weights=config.weights)
    check_adapter(config, target.config)
    check_context(config, target.config, target.name)
    draft_vocabulary.check_setting(config.draft_vocabulary, target.config)
    output = holding.enter_context(run_folder.opened(config.output))
    run = _Run(config, target, report)

    def check(metadata: dict[str, Any], folder: pathlib.Path) -> None:
        adapter_checkpoint.check_target(metadata, target, folder)
        check_same_run(config, metadata["training"]["settings"], folder)

    if found := output.exists():
        holding.enter_context(output.held())
    saved = checkpoints.newest(output, run.parameters, run.named_state(), check, report)
    if saved is not None and saved.step >= config.steps:
        held_out = saved.metadata["training"]["held_out"]
        report.say(f"{output}: complete, {saved.step} steps" + (f"; {_describe(held_out)}" if held_out else ""))
        return held_out

    if config.data.template and getattr(target.tokenizer, "chat_template", None):
        report.say(
            f"note: where the data are conversations, they are read by data.template={config.data.template}, and "
            "decoding takes the tokenizer's own template; give --config.data.template= to train with that"
        )
    process = _process(config.batch_size, mesh)
    data = own_data.write(config, target, output.path, on_data) if config.data.is_self else config.data
    rows, held_out = load_rows(data, target, config.sequence_length, config.seed, report)
    if saved is not None and saved.metadata["training"]["data_fingerprint"] != rows.fingerprint:
        raise InputError(
            f"{saved.folder}: trained on other data; expected data with fingerprint {rows.fingerprint}, found "
            f"{saved.metadata['training']['data_fingerprint']}; give the same files, or another output"
        )
    if target.mesh.size > 1:
        report.say(
            f"{target.mesh.size} devices: " + ", ".join(f"{axis} {size}" for axis, size in target.mesh.shape.items())
        )
        for note in sharding.undivided(adapter_checkpoint.named_leaves(target.model), target.mesh):
            report.say(f"note: {note}")
    if saved is None:
        chosen = draft_vocabulary.choose_for_run(config, target, rows, held_out)
        if chosen is not None:
            run.draft_from(chosen.token_ids)
            report.say(
                f"draft vocabulary: {len(chosen.token_ids)} of {target.config.vocab_size} tokens, "
                f"{chosen.coverage:.2%} of the held-out ones; {chosen.speed:.2f} times the predicted speed with all"
            )
    batches = training_batches(rows, config.batch_size, config.seed, **process)
    evaluation = evaluation_batches(held_out, config.batch_size, config.evaluation_windows, **process)
    if config.teacher == "cached":
        teacher = TeacherCache(
            rows,
            target,
            cache_folder(config.data.cache),
            everywhere=KINDS[config.adapter.kind].depths > 1,
        )
        teacher.make(target, config, report)
        batches = training_batches(rows, config.batch_size, config.seed, **process, extend=teacher.extend)
    if not found:
        holding.enter_context(output.held())
        if output.newest() is not None:
            raise InputError(f"output: another run has written to {output} meanwhile; run the command again")
    if saved is not None:
        run.restore(saved)
        batches.set_state(saved.input)
    return run.run(rows, batches, evaluation, output, profile)


def _process(batch_size: int, mesh: Mesh) -> dict[str, int]:
    """Which part of each batch this process reads, as arguments of `training_batches`: one range of rows, or the
    complete batch if this process's devices hold other rows than that (with a model axis across processes, several
    processes hold the same rows)."""
    index, count = jax.process_index(), jax.process_count()
    rows = np.arange(batch_size).reshape(count, -1)[index] if batch_size % count == 0 else []
    if not np.array_equal(sharding.rows_here(batch_size, mesh), rows):
        return {"process_index": 0, "process_count": 1}
    return {"process_index": index, "process_count": count}


class _Run:
    """A run in memory: its parameters, optimizer state, step count and compiled programs."""

    def __init__(self, config: TrainConfig, target: Target, report: Report = SILENT):
        self.config, self.target, self._report = config, target, report
        self.optimizer = make_optimizer(config)
        self.step = 0
        shapes = abstract_state(self.optimizer, target.config, config, target.mesh)
        self._where = jax.tree.map(lambda x: x.sharding, shapes)
        start = jax.jit(initial_parameters, static_argnums=(1, 2, 4), out_shardings=self._where[0])
        self.parameters = start(
            target.model,
            config.exit_layer,
            config.initialization,
            config.seed,
            config.adapter,
        )
        self.state = jax.jit(self.optimizer.init, out_shardings=self._where[1])(self.parameters)
        self._train_step, self._evaluate_batch = compiled(self.optimizer, target.config, config, target.mesh)
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
        self._all_finite = jax.jit(
            lambda tree: jnp.all(jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]))
        )
        self._drafted: dict[str, Array] = {}  # the tokens of the draft vocabulary, by their name in checkpoints

    def named_state(self) -> dict[str, Array]:
        """The optimizer's state by dotted path."""
        return adapter_checkpoint.named_leaves(self.state)

    def draft_from(self, token_ids: np.ndarray) -> None:
        """Sets the draft vocabulary, which is all tokens otherwise."""
        drafted = {adapter_checkpoint.TOKEN_IDS: token_ids.astype(np.int32)}
        self._drafted = sharding.put(drafted, sharding.shardings(drafted, self.target.mesh))

    def restore(self, saved: checkpoints.Saved) -> None:
        """Sets parameters, draft vocabulary, optimizer state and step to those of a checkpoint."""
        parameters = dict(saved.parameters)
        if (token_ids := parameters.pop(adapter_checkpoint.TOKEN_IDS, None)) is not None:
            self.draft_from(token_ids)
        parameters = sharding.put(parameters, self._where[0])
        state = [saved.optimizer[path] for path in self.named_state()]
        state = sharding.put(jax.tree.unflatten(jax.tree.structure(self.state), state), self._where[1])
        # Copies, because the step donates them: JAX must own the memory, not the checkpoint's reader.
        self.parameters, self.state = self._copy((parameters, state))
        self.step = saved.step

    def run(
        self,
        rows: Rows,
        batches: grain.DatasetIterator,
        evaluation: list[Batch],
        output: run_folder.RunFolder,
        profile: str | None,
    ) -> dict[str, float] | None:
        """Trains to the last step, or until SIGTERM. `batches` continues at the run's step."""
        config, steps = self.config, self.config.steps
        training = {"settings": flat(config), "data_fingerprint": rows.fingerprint}
        if self.step:
            self._report.say(f"{output}: going on from step {self.step}")
        with contextlib.ExitStack() as stack:
            # Until the last checkpoint is written: a second SIGTERM must not break that off.
            preempted = stack.enter_context(preemption.notice())
            saver = stack.enter_context(checkpoints.opened(output, config.keep_checkpoints))
            writer = tensorboardX.SummaryWriter(
                str(output.path), purge_step=self.step + 1, write_to_disk=jax.process_index() == 0
            )
            stack.enter_context(writer)
            bar = stack.enter_context(self._report.bar("", steps, "step", self.step))
            tracing = stack.enter_context(contextlib.ExitStack())
            held_out = None
            if self.step == 0:
                self._evaluate(evaluation, writer)
            pending, since = [], time.monotonic()
            first = self.step
            while self.step < steps:
                if self.step == first + _PROFILED.start:
                    tracing.enter_context(profiling.trace(profile, self._report.say))
                batch = next(batches)
                self.parameters, self.state, metrics = self._train_step(
                    self.parameters,
                    self.state,
                    self.target.model,
                    self._put(batch),
                    self._drafted.get(adapter_checkpoint.TOKEN_IDS),
                    np.int32(self.step),
                    loss_of_step(config, self.step),
                )
                self.step += 1
                pending.append((batch["row_ids"], metrics))
                if self.step == first + _PROFILED.stop or self.step == steps:
                    jax.block_until_ready(metrics)
                    tracing.close()
                stops = preempted(self.step) and self.step < steps
                saves = stops or self.step % config.save_every == 0 or self.step == steps
                # Every checkpoint has held-out metrics, unless SIGTERM leaves no time for them.
                evaluates = not stops and (saves or self.step % config.evaluate_every == 0)
                note = ""
                if self.step % config.log_every == 0 or saves or evaluates:
                    means = self._means(pending, rows)
                    means["tokens_per_second"] = means.pop("tokens") / (time.monotonic() - since)
                    for name, value in means.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                    note = (
                        f"loss {means['loss']:.3f}, acceptance {means['expected_acceptance']:.3f}, "
                        f"{means['tokens_per_second']:.0f} tokens/s"
                    )
                    pending, since = [], time.monotonic()
                bar.show(self.step, note)
                held_out = self._evaluate(evaluation, writer) if evaluates else None
                if saves:
                    writer.flush()  # what is in the bucket goes there with a checkpoint
                    self._save(saver, training | {"step": self.step, "held_out": held_out}, batches.get_state())
                if evaluates:
                    since = time.monotonic()
                if stops:
                    break
        if self.step < steps:
            self._report.say(f"{output}: SIGTERM; saved step {self.step}, and the same command goes on from there")
        return held_out

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Array]:
        return sharding.put_batch(device_part(batch), self.config.batch_size, self.target.mesh)

    def _means(self, pending: list[tuple[np.ndarray, dict[str, Array]]], rows: Rows) -> dict[str, float]:
        """Means of the metrics over the steps since the last report, and the sum of their `tokens`. Waits for the
        steps. Raises `InputError` where a loss or gradient is not finite."""
        fetched = jax.device_get([metrics for _, metrics in pending])
        for i, (metrics, (row_ids, _)) in enumerate(zip(fetched, pending, strict=True)):
            if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
                raise InputError(
                    f"step {self.step - len(pending) + 1 + i}: the loss or its gradient is not finite (loss "
                    f"{metrics['loss']}, gradient norm {metrics['gradient_norm']}); lower optimizer.learning_rate, "
                    "lengthen optimizer.warmup_steps, or look at the records of its batch: "
                    + ", ".join(rows.record_ids(row_ids))
                )
        sums = {name: sum(float(metrics[name]) for metrics in fetched) for name in fetched[0]}
        del sums["positions"]
        return {name: value if name == "tokens" else value / len(fetched) for name, value in sums.items()}

    def _evaluate(self, evaluation: list[Batch], writer: tensorboardX.SummaryWriter) -> dict[str, float]:
        drafted = self._drafted.get(adapter_checkpoint.TOKEN_IDS)
        results = jax.device_get(
            [
                self._evaluate_batch(self.parameters, self.target.model, self._put(batch), drafted)
                for batch in evaluation
            ]
        )
        weights = [float(np.max(batch.pop("positions"))) for batch in results]  # the same at each depth
        means = {
            name: sum(w * batch[name] for w, batch in zip(weights, results, strict=True)) / sum(weights)
            for name in results[0]
        }
        held_out = {name: float(np.mean(value)) for name, value in means.items()}
        for name, value in means.items():
            if np.ndim(value):
                held_out |= {f"{name}_depth_{depth}": float(x) for depth, x in enumerate(value, 1)}
        for name, value in held_out.items():
            writer.add_scalar(f"held_out/{name}", value, self.step)
        self._report.say(f"step {self.step}: {_describe(held_out)}")
        return held_out

    def _save(self, saver: checkpoints.Writer, training: dict[str, Any], input_state: Any) -> None:
        # The step's loss was that of the parameters before it, so these may be the first that overflow.
        held_out = (training["held_out"] or {}).values()
        if not self._all_finite(self.parameters) or not all(map(math.isfinite, held_out)):
            raise InputError(
                f"step {self.step}: the adapter's weights or held-out figures are not finite after it, and it is not "
                "saved; lower optimizer.learning_rate, or lengthen optimizer.warmup_steps"
            )
        # Copies, because a background thread writes them while the next steps donate the originals.
        parameters, state = self._copy((self.parameters | self._drafted, self.named_state()))
        config = self.config
        metadata = adapter_checkpoint.adapter_metadata(
            parameters, self.target, config.exit_layer, training, config.adapter.kind
        )
        checkpoints.save(saver, self.step, parameters, state, metadata, input_state)


def _describe(held_out: dict[str, float]) -> str:
    text = (
        f"held-out loss {held_out['loss']:.4f}, expected acceptance {held_out['expected_acceptance']:.4f}, "
        f"top-1 agreement {held_out['top1_agreement']:.4f}"
    )
    for name, shown in (("expected_acceptance", "expected acceptance"), ("top1_agreement", "top-1 agreement")):
        by_depth = [held_out[key] for key in held_out if key.startswith(f"{name}_depth_")]
        if by_depth:
            text += f"; {shown} at depth 1 to {len(by_depth)}: " + " ".join(f"{value:.4f}" for value in by_depth)
    return text
