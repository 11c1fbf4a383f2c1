"""The checkpoints of a training run: written completely or not at all, and verified before they are used.

Neither Orbax's arrays nor its JSON items have checksums, so a bit that flipped on disk would go unnoticed. The item
`position` holds checksums: one for each array, and one for the two JSON items.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array, UInt32
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from kangaroo_jax.checkpoint import adapter as adapter_checkpoint
from kangaroo_jax.checkpoint.adapter import DamagedError
from kangaroo_jax.errors import MachineError
from kangaroo_jax.report import SILENT, Report
from kangaroo_jax.train.run_folder import RunFolder

Arrays = dict[str, Any]  # dotted path -> array of 4-byte numbers

_BESIDE_ARRAYS = 100_000  # bytes of a checkpoint: metadata, TensorStore's index
_NONE = -1  # instead of a step: there is no checkpoint


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint's contents.

    Attributes:
      folder: the checkpoint's folder.
      step: steps done.
      metadata: its `metadata` item.
      parameters: of the adapter, and the tokens of its draft vocabulary where it has one.
      optimizer: the optimizer's state.
      input: the state of the batches' iterator.
    """

    folder: pathlib.Path
    step: int
    metadata: dict[str, Any]
    parameters: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    input: Any


class Writer:
    """Writes the checkpoints of a run: Orbax into the run's folder or a copy of it, a thread from there to where the
    run's folder is."""

    def __init__(self, output: RunFolder, manager: ocp.CheckpointManager | None):
        self.output, self._manager = output, manager  # None where another process writes for all
        self._publisher = concurrent.futures.ThreadPoolExecutor(1)
        self._publishing: concurrent.futures.Future[None] | None = None

    def wait(self) -> None:
        """Until the last checkpoint is where it belongs."""
        if self._manager is not None:
            self._manager.wait_until_finished()
        if self._publishing is not None:
            self._publishing.result()

    def write(self, step: int, args: ocp.args.CheckpointArgs, metrics: dict[str, float]) -> None:
        if self._manager is None:
            return
        self._manager.save(step, args=args, metrics=metrics)
        if not self.output.shared:
            self._manager.wait_until_finished()
            self._publishing = self._publisher.submit(self.output.publish)

    def close(self) -> None:
        try:
            if self._manager is not None:
                self._manager.close()
            self.wait()
            if self._manager is not None:
                self.output.publish()
        finally:
            self._publisher.shutdown()


@contextlib.contextmanager
def opened(output: RunFolder, keep: int) -> Iterator[Writer]:
    """What writes a run's checkpoints; on exit it waits until the last one is written. It keeps the newest `keep`
    checkpoints and the best: the one with the highest held-out expected acceptance. Checkpoints that an earlier process
    left half-written are removed.

    Raises:
      MachineError: at the end, where the last checkpoint cannot be written.
    """

    def acceptance(metrics: dict[str, float]) -> float:
        return metrics.get(adapter_checkpoint.BEST_BY, -1.0)  # missing in one saved at SIGTERM, without evaluation

    manager = None
    if output.shared or jax.process_index() == 0:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(keep), BestN(get_metric_fn=acceptance, n=1)]),
            best_fn=acceptance,
            cleanup_tmp_directories=True,
            **_alone(output),
        )
        handlers = adapter_checkpoint.item_handlers()
        manager = ocp.CheckpointManager(output.path, options=options, item_handlers=handlers)
    writer = Writer(output, manager)
    try:
        yield writer
    finally:
        try:
            with _writing(output):
                writer.close()
        finally:
            if jax.process_index() == 0:
                _remove_unfinished(output.path)


def _alone(output: RunFolder) -> dict[str, Any]:
    """Options for the first process that writes for all, without waiting for the others."""
    if output.shared or jax.process_count() == 1:
        return {}
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")
    return {"multiprocessing_options": alone, "create": False}


def _remove_unfinished(output: pathlib.Path) -> None:
    """Removes what is left of a checkpoint that could not be written. Repeats, because TensorStore's threads may go on
    writing for a moment."""
    for _ in range(20):
        left = list(output.glob("*.orbax-checkpoint-tmp*"))
        if not left:
            return
        for path in left:
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)


def save(
    writer: Writer,
    step: int,
    parameters: Arrays,
    optimizer: Arrays,
    metadata: dict[str, Any],
    input_state: Any,
) -> None:
    """Starts to write a checkpoint, which a background thread finishes. Until then the arrays must not be donated.

    Args:
      writer: of `opened`.
      step: steps done, its name.
      parameters: of the adapter, and the tokens of its draft vocabulary where it has one.
      optimizer: the optimizer's state.
      metadata: the `metadata` item; its `training.held_out` are the held-out metrics at this step, or None.
      input_state: of the batches' iterator.

    Raises:
      MachineError: where this checkpoint or the one before it cannot be written.
    """
    output = writer.output
    size = sum(x.nbytes for x in (*parameters.values(), *optimizer.values()))
    with _writing(output):
        writer.wait()  # so that no other checkpoint takes the room
    if jax.process_index() == 0:
        _check_room(output, size)
    position = {"step": step, "input": input_state}
    sums = jax.device_get(_checksums({"adapter": parameters, "optimizer": optimizer}))
    position["checksums"] = {item: {path: int(x) for path, x in arrays.items()} for item, arrays in sums.items()}
    position["digest"] = _digest(metadata, position)
    if not output.shared and jax.process_count() > 1:
        parameters, optimizer = multihost_utils.process_allgather((parameters, optimizer), tiled=True)
    args = ocp.args.Composite(
        adapter=ocp.args.PyTreeSave(parameters),
        metadata=ocp.args.JsonSave(metadata),
        optimizer=ocp.args.PyTreeSave(optimizer),
        position=ocp.args.JsonSave(position),
    )
    with _writing(output):
        writer.write(step, args, metadata["training"]["held_out"] or {})


def _check_room(output: RunFolder, size: int) -> None:
    """Takes up the room that a checkpoint needs, and gives it back: a full disk, a quota or a limit is then one error,
    where several of Orbax's and TensorStore's threads would each print theirs."""
    path = output.path / "room.orbax-checkpoint-tmp"  # a name that is removed with what a kill leaves half-written
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size + _BESIDE_ARRAYS)
    except OSError as error:
        raise _not_written(output, f"{size / 1e6:.1f} MB: {error.strerror}") from None
    finally:
        path.unlink(missing_ok=True)


def newest(
    output: RunFolder,
    parameters: dict[str, Any],
    optimizer: dict[str, Any],
    check: Callable[[dict[str, Any], pathlib.Path], None],
    report: Report = SILENT,
) -> Saved | None:
    """The newest undamaged checkpoint of a run; None if there is no checkpoint. Damaged ones are named and renamed.
    Several processes take the same one: a checkpoint that one of them finds damaged is damaged for all.

    Args:
      output: the run's folder.
      parameters: path -> anything with a shape, of the adapter.
      optimizer: the same for the optimizer's state.
      check: takes a checkpoint's metadata and folder, and raises `InputError` if the run must not continue from it.
      report: takes what there is to say, of the first process.

    Raises:
      InputError: by `check`, or for parameters of other shapes.
      MachineError: for a damaged checkpoint that cannot be renamed.
    """
    while True:
        step = output.newest()
        # The first process decides which is the newest; another may see a shared folder later.
        step = int(multihost_utils.broadcast_one_to_all(np.int32(_NONE if step is None else step)))
        if step == _NONE:
            return None
        folder, saved = output.fetch(step), None
        try:
            saved = _read(folder, parameters, optimizer, check)
        except DamagedError as error:
            damage = str(error)
        else:
            damage = f"{folder}: damaged, as another process reads it"
        if np.all(multihost_utils.process_allgather(np.bool_(saved is not None))):
            return saved
        if jax.process_index() == 0:
            aside = output.set_aside(step)
            report.say(output.shown(f"{damage}; set aside as {aside}"))
        multihost_utils.sync_global_devices("checkpoint set aside")


@contextlib.contextmanager
def _writing(output: RunFolder) -> Iterator[None]:
    """Turns any failure to write a checkpoint into a `MachineError`. Finished checkpoints are not touched."""
    try:
        yield
    except Exception as error:  # of many kinds, from Orbax, TensorStore and the system
        raise _not_written(output, adapter_checkpoint.reason(error)) from None


def _not_written(output: RunFolder, reason: str) -> MachineError:
    newest = output.newest()
    fix = "make room" if output.shared else "when that is fixed"
    return MachineError(
        f"{output}: a checkpoint could not be written ({reason}); {fix}, then the same command goes on from "
        + ("the start" if newest is None else f"step {newest}")
    )


def _read(
    folder: pathlib.Path,
    parameters: dict[str, Any],
    optimizer: dict[str, Any],
    check: Callable[[dict[str, Any], pathlib.Path], None],
) -> Saved:
    metadata = adapter_checkpoint.read_json(folder, "metadata")
    position = adapter_checkpoint.read_json(folder, "position")
    # Verified before any of their values is used.
    if not isinstance(position, dict) or position.pop("digest", None) != _digest(metadata, position):
        raise DamagedError(f"{folder}: damaged (metadata and position are not as they were written)")
    adapter_checkpoint.check_format(metadata, folder)
    check(metadata, folder)
    found = {}
    parameters = parameters | adapter_checkpoint.drafted_tokens(metadata)
    for item, expected in (("adapter", parameters), ("optimizer", optimizer)):
        found[item] = adapter_checkpoint.read_arrays(folder, item, expected)
        adapter_checkpoint.check_arrays(found[item], position["checksums"][item], folder / item)
    return Saved(folder, position["step"], metadata, found["adapter"], found["optimizer"], position["input"])


@jax.jit
def _checksums(arrays: dict[str, Arrays]) -> dict[str, Arrays]:
    return jax.tree.map(_checksum, arrays)


def _checksum(x: Array) -> UInt32[Array, ""]:
    """`adapter_checkpoint.checksum` of an array of 4-byte numbers. Integer arithmetic, so the sum does not depend on
    how the array is split over devices."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    places, size = jnp.zeros(x.shape, jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        places += jnp.uint32(size) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        size *= x.shape[axis]
    return jnp.sum(words * (2 * places + 1), dtype=jnp.uint32)


def _digest(metadata: Any, position: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([metadata, position], sort_keys=True).encode()).hexdigest()
