"""Packs examples of any length into rows of one length, from the lengths alone.

A record longer than a row is cut into pieces of a row's length and a rest; each piece is an example of its own, which
does not see the others. Pieces without anything to learn are left out.

grain's packers (such as grain.experimental.BestFitPackIterDataset) are not used: they pack a stream, within a window
of bins. Here the rows are known beforehand and have numbers, so that they can be shuffled across the complete data,
read in any order, cached by row (train/teacher.py) and traced back to their records in messages.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which pieces of records each row holds. Row r holds pieces row_starts[r] .. row_starts[r + 1] - 1.

    Attributes:
      records: the record that each piece is of.
      offsets: its first token in the record.
      lengths: its tokens.
      row_starts: first piece of each row, and the number of pieces.
    """

    records: Int[np.ndarray, " pieces"]
    offsets: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, " pieces"]
    row_starts: Int[np.ndarray, " rows_and_end"]

    def __len__(self) -> int:
        return len(self.row_starts) - 1

    def padding(self, sequence_length: int) -> float:
        """Share of positions that hold no token."""
        return 1 - int(self.lengths.sum()) / max(1, len(self) * sequence_length)


def pack(
    records: Int[np.ndarray, " records"],
    lengths: Int[np.ndarray, " records"],
    starts: Int[np.ndarray, " records"],
    counted: Int[np.ndarray, "runs 2"],
    sequence_length: int,
) -> Packing:
    """Cuts records into pieces and packs these into rows of `sequence_length` tokens.

    Args:
      records: the records to use, in order.
      lengths: tokens of each of them.
      starts: where each of them starts in the concatenation of all records.
      counted: runs of positions in it that count in the loss, [start, end), sorted.
      sequence_length: tokens in a row.
    """
    pieces = -(-lengths // sequence_length)
    owner = np.repeat(np.arange(len(records)), pieces)
    offsets = (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * sequence_length
    sizes = np.minimum(lengths[owner] - offsets, sequence_length)
    first = starts[owner] + offsets
    run = np.searchsorted(counted[:, 1], first, side="right")  # the first one that ends after the piece's start
    run_starts = np.append(counted[:, 0], np.iinfo(np.int64).max)
    kept = np.flatnonzero(run_starts[run] < first + sizes)
    rows = best_fit(sizes[kept], sequence_length)
    order = kept[np.argsort(rows, kind="stable")]
    counts = np.bincount(rows)
    return Packing(records[owner[order]], offsets[order], sizes[order], np.concatenate([[0], np.cumsum(counts)]))


def best_fit(lengths: Int[np.ndarray, " pieces"], capacity: int) -> Int[np.ndarray, " pieces"]:
    """The row of each piece by best fit decreasing: the longest piece first, each into the fullest row that it fits in.

    The free space of the open rows is a bit set, one integer of `capacity` bits, so that finding the row takes a few
    operations.
    """
    rows = np.empty(len(lengths), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    some, count = 0, 0  # bit r: some row has room for exactly r tokens
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = some >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                some ^= 1 << room
        else:
            row, room = count, capacity
            count += 1
        rows[piece] = row
        if room > length:
            by_room[room - length].append(row)
            some |= 1 << (room - length)
    return rows
