"""Batches: packed rows of tokens, in an order that depends on the seed alone.

A batch is a dict of arrays [batch, time]: `tokens`; `loss_mask`, the weight of each position in the loss;
`segment_ids`, from 1 in each row and 0 for padding, where positions attend within their segment only; `positions`, from
0 in each segment. With a cached teacher (train/teacher.py) also `teacher` [batch, time, hidden]. `row_ids` stays on the
host and names the records of a batch in messages (`Rows.record_ids`); every process has those of the complete global
batch.

The order is an order of global batches, of which each process takes its rows. So neither the batches nor the iterator's
state depend on the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import grain
import numpy as np
from jaxtyping import Int

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.cache import TokenCache, cache_folder, open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.packing import pack
from kangaroo_jax.data.records import check_sources, find_sources, is_function
from kangaroo_jax.errors import InputError
from kangaroo_jax.report import SILENT, Report

Batch = dict[str, np.ndarray]

_VERSION = 1  # increase when packing changes: a run that was started before cannot continue then


class Rows:
    """Packed rows of the given records of a cache, with random access.

    Args:
      cache: the tokens.
      records: indices of the records to use.
      sequence_length: tokens in a row.
    """

    def __init__(self, cache: TokenCache, records: np.ndarray, sequence_length: int):
        self.cache, self.records, self.sequence_length = cache, records, sequence_length
        self._starts = cache.starts
        self._packing = pack(records, cache.lengths[records], self._starts[records], cache.counted, sequence_length)
        digest = hashlib.sha256(f"{_VERSION} {sequence_length} {cache.fingerprint}".encode())
        digest.update(records.astype("<i8").tobytes())
        # Identifies the rows: a run that continues must see the same ones.
        self.fingerprint = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._packing)

    @property
    def counts(self) -> Int[np.ndarray, " rows"]:
        """The number of positions of each row that count in the loss."""
        packing, runs = self._packing, self.cache.counted
        starts, ends = np.append(runs[:, 0], np.iinfo(np.int64).max), runs[:, 1]
        in_runs = np.concatenate([[0], np.cumsum(ends - runs[:, 0])])

        def before(token: np.ndarray) -> np.ndarray:  # counted positions before it, in the concatenation of all records
            run = np.searchsorted(ends, token, side="right")  # the first that does not end before it
            return in_runs[run] + np.maximum(token - starts[run], 0)

        first = self._starts[packing.records] + packing.offsets
        return np.add.reduceat(before(first + packing.lengths) - before(first), packing.row_starts[:-1])

    @property
    def lengths(self) -> Int[np.ndarray, " rows"]:
        """The number of positions of each row that hold a token."""
        return np.add.reduceat(self._packing.lengths, self._packing.row_starts[:-1])

    @property
    def padding(self) -> float:
        """Share of positions that hold no token."""
        return self._packing.padding(self.sequence_length)

    def __getitem__(self, row: int) -> Batch:
        """One row, without the batch axis. Row -1 is padding only."""
        packing, counted = self._packing, self.cache.counted
        tokens, segment_ids, positions = np.zeros((3, self.sequence_length), np.int32)
        loss_mask = np.zeros(self.sequence_length, np.float32)
        at, pieces = 0, range(packing.row_starts[row], packing.row_starts[row + 1]) if row >= 0 else ()
        for segment, piece in enumerate(pieces, 1):
            record, offset, length = packing.records[piece], packing.offsets[piece], packing.lengths[piece]
            tokens[at : at + length] = self.cache.tokens(record)[offset : offset + length]
            segment_ids[at : at + length] = segment
            positions[at : at + length] = np.arange(length)
            first = self._starts[record] + offset
            run = np.searchsorted(counted[:, 1], first, side="right")
            while run < len(counted) and counted[run, 0] < first + length:
                start, end = counted[run] - first
                loss_mask[at + max(start, 0) : at + min(end, length)] = 1
                run += 1
            at += length
        return {
            "tokens": tokens,
            "loss_mask": loss_mask,
            "segment_ids": segment_ids,
            "positions": positions,
            "row_ids": np.asarray(row, np.int64),
        }

    def batch(self, rows: Iterable[int]) -> Batch:
        """Rows side by side."""
        parts = [self[int(row)] for row in rows]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def record_ids(self, row_ids: Iterable[int]) -> list[str]:
        """File and line of each record in the given rows (a batch's `row_ids`), each once, in order."""
        starts = self._packing.row_starts
        pieces = (self._packing.records[starts[row] : starts[row + 1]] for row in row_ids if row >= 0)
        return list(dict.fromkeys(self.cache.describe(record) for records in pieces for record in records))


def check_files(data: DataConfig) -> None:
    """Raises `InputError` for data that cannot be found or a cache folder that cannot be used; reads no data."""
    cache_folder(data.cache)
    if not data.is_self:
        check_sources(data.files)
    if data.evaluation_files:
        check_sources(data.evaluation_files)


def load_rows(
    data: DataConfig, target: Target, sequence_length: int, seed: int, report: Report = SILENT
) -> tuple[Rows, Rows]:
    """Training and held-out rows, of different records.

    Args:
      data: which data, and how to read it.
      target: its tokenizer is used.
      sequence_length: tokens in a row.
      seed: decides which records are held out.
      report: takes what there is to say about the data.

    Raises:
      InputError: for files that are missing or malformed, or too few records to hold some out.
    """
    folder, encoder = cache_folder(data.cache), Encoder(target, data.template)

    def cached(files: str, held_out: bool) -> TokenCache:
        return open_cache(folder, find_sources(files, held_out), encoder, data.max_bad_share, report)

    training = cached(data.files, held_out=False)
    everything = np.arange(len(training))
    if data.evaluation_files or is_function(data.files):
        evaluation = cached(data.evaluation_files or data.files, held_out=True)
        held_out = Rows(evaluation, np.arange(len(evaluation)), sequence_length)
        return Rows(training, everything, sequence_length), held_out
    if len(training) < 2:
        raise InputError(
            "data.files: one record, of which none can be held out; expected at least 2, or data.evaluation_files"
        )
    shuffled = np.random.default_rng(seed).permutation(everything)
    count = max(1, round(data.held_out * len(training)))
    kept = np.sort(shuffled[:count])
    return Rows(training, np.setdiff1d(everything, kept), sequence_length), Rows(training, kept, sequence_length)


def training_batches(
    rows: Rows,
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    extend: Callable[[Batch], Batch] = lambda batch: batch,
) -> grain.DatasetIterator:
    """Endless batches, shuffled again for each epoch. The iterator's `get_state` and `set_state` save and restore the
    position exactly; the state is the same on every process, whatever their number.

    Args:
      rows: the training rows.
      batch_size: rows of a global batch; a multiple of `process_count`.
      seed: decides the order.
      process_index: this process, which gets rows process_index * n .. (process_index + 1) * n - 1 of each global
        batch, n = batch_size / process_count.
      process_count: number of processes.
      extend: applied to each batch on the threads that read ahead.

    Raises:
      InputError: for fewer rows than one batch, or a batch that cannot be divided among the processes.
    """
    mine = _share(batch_size, process_index, process_count)
    if len(rows) < batch_size:
        raise InputError(
            f"data.files: too little data for one batch; expected at least {batch_size} rows of "
            f"{rows.sequence_length} tokens, found {len(rows)}; give more data or a smaller batch_size"
        )
    order = grain.MapDataset.range(len(rows)).shuffle(seed).repeat().batch(batch_size, drop_remainder=True)
    dataset = order.map(lambda batch: extend(rows.batch(batch[mine])) | {"row_ids": batch})
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))


def evaluation_batches(
    rows: Rows, batch_size: int, max_rows: int, process_index: int = 0, process_count: int = 1
) -> list[Batch]:
    """At most `max_rows` rows, evenly spread over `rows` and always the same. The last batch is filled up with padding
    rows. Each process gets its part of each batch, as for `training_batches`.

    Raises:
      InputError: for no rows at all, or a batch that cannot be divided among the processes.
    """
    mine = _share(batch_size, process_index, process_count)
    if not len(rows):
        raise InputError("data.evaluation_files: nothing held out that counts in the loss; give more data")
    count = min(max_rows, len(rows))
    chosen = np.append(np.arange(count) * len(rows) // count, np.full(-count % batch_size, -1))
    return [rows.batch(batch[mine]) | {"row_ids": batch} for batch in chosen.reshape(-1, batch_size)]


def device_part(batch: Batch) -> Batch:
    """The arrays of a batch that the training step takes: all but `row_ids`."""
    return {name: array for name, array in batch.items() if name != "row_ids"}


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    if batch_size % process_count:
        raise InputError(f"batch_size: expected a multiple of the {process_count} processes, found {batch_size}")
    each = batch_size // process_count
    return slice(process_index * each, (process_index + 1) * each)
