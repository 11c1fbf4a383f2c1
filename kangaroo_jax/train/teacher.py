"""The cached teacher: the target's last hidden states on disk, for runs that see their data several times.

The states are the LM head's inputs (after the final norm), in bfloat16, at the positions that count in the loss; for a
draft model that takes them as inputs too, at all positions that hold a token. They
depend on the target and the rows alone, so runs with other exit layers, learning rates or adapters share them. The
cache's folder is named after a hash of all this. It holds parts: ArrayRecord files of consecutive rows, one record per
row. A part gets its final name when it is complete; after a kill, the next run computes the missing parts only.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Int

from kangaroo_jax import resumable
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import TrainConfig
from kangaroo_jax.data.cache import CacheFolder, locked, to_disk
from kangaroo_jax.data.input import Batch, Rows, device_part
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.model import sharding
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel, deep_apply, shallow_apply
from kangaroo_jax.report import SILENT, Report
from kangaroo_jax.train.objective import segment_mask

_VERSION = 1
_ITEM = np.dtype(ml_dtypes.bfloat16)
_PART_BYTES = 64 << 20  # approximate size of a part; a kill loses at most one part per process
_MAX_PARTS = 256  # all are open during training, and a process may usually open 1024 files
_MARGIN = 1 << 30  # bytes to leave free for checkpoints, TensorBoard events and the file format's overhead
_LABEL = "about.json"


class TeacherCache:
    """The teacher's hidden states of a run's training rows.

    Args:
      rows: the training rows.
      target: the target whose states are cached.
      folder: holds the caches of all data. Several processes must share it; one in a bucket is shared.
      everywhere: whether the states are of all positions that hold a token, not only of those that count.
    """

    def __init__(self, rows: Rows, target: Target, folder: CacheFolder, *, everywhere: bool = False):
        self._caches, self._stored_parts = folder, {}
        self._rows, self._everywhere, self._width = rows, everywhere, target.config.hidden_size
        self._counts = rows.lengths if everywhere else rows.counts
        # A cache that was made for the same target under another fingerprint is as good.
        for fingerprint in (*target.other_fingerprints, target.fingerprint):
            self._about = {
                "version": _VERSION,
                "target": fingerprint,
                "computed in": target.model.arithmetic,
                "stored in": _ITEM.name,
                "rows": rows.fingerprint,
            } | ({"positions": "all"} if everywhere else {})
            key = hashlib.sha256(json.dumps(self._about).encode()).hexdigest()[:32]
            self.folder = folder.path / f"teacher-{key}"
            if self.folder.exists():
                break
        self._about["target's name"] = target.name
        row_bytes = rows.sequence_length * self._width * _ITEM.itemsize
        self._part_rows = max(1, _PART_BYTES // row_bytes, -(-len(rows) // _MAX_PARTS))
        self._readers: dict[int, ArrayRecordReader] = {}

    def make(self, target: Target, config: TrainConfig, report: Report = SILENT) -> None:
        """Computes and writes the missing parts, and opens all parts. All processes of a run call this together; each
        writes different parts.

        Args:
          target: the target that the cache was made for, on the run's mesh.
          config: the run's settings; `batch_size` rows are computed at a time.
          report: takes what there is to say about it.

        Raises:
          InputError: for a disk with too little room (before anything is written), a folder that cannot be written, or
            one that the processes do not share.
        """
        with contextlib.ExitStack() as held:
            missing, fits = np.zeros(-(-len(self._rows) // self._part_rows), np.int32), True
            if jax.process_index() == 0:
                self._fetch()
                missing = self._missing(SILENT)
                if missing.any():
                    missing = self._claim(held, report)
                    fits = self._needed(missing) + _MARGIN <= self._free()
            missing, fits = _as_first((missing, np.int32(fits)))
            if missing.any():
                self._say_needed(missing, bool(fits), config, report)
                self._compute(np.flatnonzero(missing), target, config, report)
                # After this, every process sees the parts of all.
                multihost_utils.sync_global_devices("teacher")
            with self._writable():
                self._fetch()
        self._open()

    def extend(self, batch: Batch) -> Batch:
        """A batch of the rows with `teacher` [batch, time, hidden] beside its other arrays: bfloat16, zero where
        none is stored.

        Raises:
          InputError: for a damaged file.
        """
        states = np.zeros((*batch["tokens"].shape, self._width), _ITEM)
        for of_row, counts, row in zip(states, self._stored(batch), batch["row_ids"].tolist(), strict=True):
            if row >= 0:
                of_row[counts] = self._read(row)
        return batch | {"teacher": states}

    def _stored(self, batch: Batch) -> Bool[np.ndarray, "batch time"]:
        """The positions whose states are stored."""
        return batch["segment_ids"] > 0 if self._everywhere else batch["loss_mask"] > 0

    def _read(self, row: int) -> np.ndarray:
        """[positions that are stored, hidden]."""
        part, record = divmod(row, self._part_rows)
        try:
            data = self._readers[part].read([record])[0]
            return np.frombuffer(data, _ITEM).reshape(self._counts[row], self._width)
        except (RuntimeError, IndexError, ValueError) as error:  # ArrayRecord checks its hashes as it reads
            raise InputError(
                f"{self._path(part)}: damaged ({error}); remove it: the same command computes that part again"
            ) from None

    def _fetch(self) -> None:
        """Copies the parts that are in the bucket, if there is one."""
        self._stored_parts = self._caches.fetch(self.folder.name)

    def _path(self, part: int) -> pathlib.Path:
        start = part * self._part_rows
        return self.folder / f"rows-{start:08}-{min(start + self._part_rows, len(self._rows)):08}.array_record"

    def _part(self, part: int) -> range:
        """Its rows."""
        start = part * self._part_rows
        return range(start, min(start + self._part_rows, len(self._rows)))

    def _missing(self, report: Report) -> Int[np.ndarray, " parts"]:
        """1 for each part that does not exist or is damaged, else 0. One that is here and not in the bucket is sent."""
        missing = np.ones(-(-len(self._rows) // self._part_rows), np.int32)
        for part in range(len(missing)):
            path = self._path(part)
            complete = _open(path, len(self._part(part))) is not None
            if not complete and path.exists():
                report.say(f"{path}: damaged; computing it again")
            elif complete and self._caches.bucket is not None and path.name not in self._stored_parts:
                self._caches.send(self.folder.name, [path.name])
                self._stored_parts[path.name] = path.stat().st_size
            missing[part] = not complete
        return missing

    def _claim(self, held: contextlib.ExitStack, report: Report) -> Int[np.ndarray, " parts"]:
        """Waits for other runs that write the same cache, and returns what is missing after that. Only the first
        process of this run calls it; the others wait for the result."""
        lock = self.folder.with_name(f"{self.folder.name}.lock")
        with self._writable():
            lock.parent.mkdir(parents=True, exist_ok=True)
            if held.enter_context(locked(lock, "the teacher's hidden states", report)):
                for left in self.folder.glob("*.tmp"):  # of processes that were killed
                    left.unlink()
        return self._missing(report)

    def _needed(self, missing: Int[np.ndarray, " parts"]) -> int:
        """Bytes that the missing parts take."""
        rows = np.repeat(missing, self._part_rows)[: len(self._rows)] > 0
        return int(self._counts[rows].sum()) * self._width * _ITEM.itemsize

    def _free(self) -> int:
        self.folder.parent.mkdir(parents=True, exist_ok=True)  # another machine's copies may be its first
        return shutil.disk_usage(self.folder.parent).free

    def _say_needed(self, missing: Int[np.ndarray, " parts"], fits: bool, config: TrainConfig, report: Report) -> None:
        needed, free = self._needed(missing), self._free()
        if not fits:
            raise InputError(
                f"teacher=cached: {self.folder} needs {_size(needed)}, and {_size(_MARGIN)} to spare, of which "
                f"{_size(free)} are free; make room, name a folder on another disk with data.cache, or take "
                "teacher=online"
            )
        report.say(
            f"teacher: {_size(needed)} to compute ({needed} bytes; {_size(free)} are free), "
            f"{missing.sum()} of {len(missing)} parts, into {self._caches}/{self.folder.name}",
        )
        epochs = config.steps * config.batch_size / len(self._rows)
        if epochs <= 1:
            report.say(f"note: {config.steps} steps see {epochs:.0%} of the rows; teacher=online costs less")

    def _compute(self, todo: np.ndarray, target: Target, config: TrainConfig, report: Report) -> None:
        """Runs the target over the rows of the parts in `todo`, and writes those of this process."""
        owners = _owners(config.batch_size, target.mesh)
        here = sharding.rows_here(config.batch_size, target.mesh).tolist()
        done, total = 0, sum(len(self._part(part)) for part in todo)
        with self._writing() as write, report.bar("teacher", total, "row") as bar:
            for rows, counts, states in self._computed(self._schedule(todo, owners), here, target, config):
                for place, of_row in _local_rows(states):
                    if owners[place] == jax.process_index() and rows[place] >= 0:
                        write(int(rows[place]), of_row[counts[here.index(place)]])
                done += int((rows >= 0).sum())
                bar.show(done)

    def _computed(
        self, schedule: Iterator[np.ndarray], here: list[int], target: Target, config: TrainConfig
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Array]]:
        """For each batch: its rows, which positions are stored in the rows of this process (`here`), and the states.
        Yields a batch after the next one is dispatched, so that writing overlaps with computing."""
        states, before = program(config, target.mesh), None
        for rows in schedule:
            batch = device_part(self._rows.batch(rows[here]))
            on_devices = sharding.put_batch(batch, config.batch_size, target.mesh)
            computed = rows, self._stored(batch), states(target.model, on_devices)
            if before is not None:
                yield before
            before = computed
        yield before

    def _schedule(self, todo: np.ndarray, owners: Int[np.ndarray, " batch"]) -> Iterator[Int[np.ndarray, " batch"]]:
        """The rows of each batch; -1 is padding. Each part is assigned to one process, whose places in the batches
        (`owners`) hold the part's rows in order."""
        writers = np.unique(owners)
        queues = [
            np.concatenate([np.zeros(0, np.int64), *(self._part(part) for part in todo[i :: len(writers)])])
            for i in range(len(writers))
        ]
        places = [np.flatnonzero(owners == writer) for writer in writers]
        for turn in range(max(-(-len(rows) // len(at)) for rows, at in zip(queues, places, strict=True))):
            batch = np.full(len(owners), -1, np.int64)
            for rows, at in zip(queues, places, strict=True):
                some = rows[turn * len(at) : (turn + 1) * len(at)]
                batch[at[: len(some)]] = some
            yield batch

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Callable[[int, np.ndarray], None]]:
        """Yields a function that writes a row's states. It must be called for all rows of a part, in order."""
        writer, unfinished = None, None

        def write(row: int, states: np.ndarray) -> None:
            nonlocal writer, unfinished
            part = row // self._part_rows
            with self._writable():
                if row == self._part(part).start:
                    unfinished = self._path(part).with_suffix(f".{socket.gethostname()}.{os.getpid()}.tmp")
                    # Uncompressed: hidden states hardly shrink, and every step reads them.
                    writer = ArrayRecordWriter(str(unfinished), "group_size:1,uncompressed")
                writer.write(states.tobytes())
                if row == self._part(part).stop - 1:
                    writer.close()
                    if _open(unfinished, len(self._part(part))) is None:
                        raise RuntimeError("what was written cannot be read back")
                    to_disk(unfinished)
                    unfinished.replace(self._path(part))
                    self._caches.send(self.folder.name, [self._path(part).name])

        with self._writable():
            self.folder.mkdir(exist_ok=True)
            if jax.process_index() == 0:
                resumable.replace(self.folder / _LABEL, json.dumps(self._about, indent=1).encode() + b"\n")
                self._caches.send(self.folder.name, [_LABEL])
        try:
            yield write
        finally:
            if writer is not None and writer.is_open():
                with contextlib.suppress(RuntimeError):
                    writer.close()
            if unfinished is not None:
                unfinished.unlink(missing_ok=True)

    def _open(self) -> None:
        """Opens all parts."""
        for part in range(-(-len(self._rows) // self._part_rows)):
            reader = _open(self._path(part), len(self._part(part)))
            if reader is None:
                raise InputError(
                    f"data.cache: {self._path(part)} is not there for process {jax.process_index()}; expected a folder "
                    "that all processes share"
                )
            self._readers[part] = reader

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Turns errors of writing to the folder into an `InputError`."""
        try:
            yield
        except MachineError:
            raise
        except (OSError, RuntimeError) as error:  # RuntimeError: ArrayRecord's error for a full disk
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"data.cache: {self.folder} cannot be written ({reason}); make room or name another folder: the same "
                "command goes on from the parts that are complete"
            ) from None


def program(config: TrainConfig, mesh: Mesh) -> Callable[[TargetModel, dict[str, Array]], Array]:
    """(target, batch) -> the target's normed hidden states [batch, time, hidden] in bfloat16, jitted."""

    @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, sharding.BATCH))
    def states(model: TargetModel, batch: dict[str, Array]) -> Array:
        model = sharding.gathered(model, parameter_paths(model), mesh)
        mask, positions, exit_layer = segment_mask(batch["segment_ids"]), batch["positions"], config.exit_layer
        hidden, _ = shallow_apply(model, batch["tokens"], positions, exit_layer=exit_layer, mask=mask)
        hidden, _ = deep_apply(model, hidden, positions, exit_layer=exit_layer, mask=mask)
        return hidden.astype(jnp.bfloat16)

    return states


def _owners(batch_size: int, mesh: Mesh) -> Int[np.ndarray, " batch"]:
    """The process that writes each row of a batch: the first of those that hold it."""
    owners = np.full(batch_size, jax.process_count())
    indices = NamedSharding(mesh, sharding.BATCH).devices_indices_map((batch_size,))
    for device, (index,) in indices.items():
        owners[index] = np.minimum(owners[index], device.process_index)
    return owners


def _local_rows(array: Array) -> Iterator[tuple[int, np.ndarray]]:
    """(index, row) of the rows that this process's devices hold, each once, in ascending order."""
    shards = {shard.index[0].indices(array.shape[0])[0]: shard.data for shard in array.addressable_shards}
    for start in sorted(shards):
        for offset, row in enumerate(np.asarray(shards[start])):
            yield start + offset, row


def _open(path: pathlib.Path, records: int) -> ArrayRecordReader | None:
    """A reader of a part; None if the file is missing, damaged or does not hold `records` records."""
    if not path.is_file():
        return None
    try:
        # The options of ArrayRecord's own data source for random access.
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0", file_reader_buffer_size=32_768)
        return reader if reader.num_records() == records else None
    except (RuntimeError, ValueError):
        return None


def _as_first(tree: Any) -> Any:
    """The first process's values, on every process."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def _size(num_bytes: int) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1e6:.1f} MB"
