"""The file of synthesized records, and what a killed run leaves of it.

A run appends a line for each index that is done to OUTPUT.part: its record, or why there is none. In the end the
records become OUTPUT, in the order of their indices; until then there is no such file, or that of an earlier, smaller
run. OUTPUT.settings.json says what they were made with.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

from kangaroo_jax import json_text, paths, resumable
from kangaroo_jax.buckets import is_bucket
from kangaroo_jax.data.records import Source
from kangaroo_jax.errors import InputError

Record = dict[str, Any]


def check_place(path: str | os.PathLike[str], flag: str) -> pathlib.Path:
    """Where records are to go, if they can: raises `InputError` for a folder that is missing, and the like."""
    if is_bucket(path):
        raise InputError(f"{flag}={path}: is in a bucket; write to a disk, and copy the file when it is complete")
    output = paths.expanded(path)
    if not Source(output.name).holds_records:
        raise InputError(f"{flag}={path}: training would read it as one text; give it a name that ends in .jsonl")
    if not output.parent.is_dir():
        raise InputError(f"{flag}={path}: there is no folder {output.parent}; create it")
    if output.is_dir():
        raise InputError(f"{flag}={path}: is a folder; give a file")
    if output.exists() and not output.is_file():
        raise InputError(f"{flag}={path}: is a pipe or a device; give a file")
    if not os.access(output.parent, os.W_OK) or (output.exists() and not os.access(output, os.W_OK)):
        raise InputError(f"{flag}={path}: cannot be written to; give another")
    return output


class RecordFile:
    """Records by index; a context manager, which keeps other runs away.

    Args:
      output: the file.
      settings: what records depend on, JSON values.
      key: of a record: of those with equal keys, the one with the smallest index is kept, others are duplicates.
      flag: that names the file, for messages.

    Raises:
      InputError: on entry, for records of other settings, or a file that is not one of records; nothing is changed.
    """

    def __init__(self, output: pathlib.Path, settings: dict[str, Any], key: Callable[[Record], Hashable], flag: str):
        self.output, self._settings, self._key, self._flag = output, settings, key, flag
        self._part = output.with_name(output.name + ".part")
        self._about = output.with_name(output.name + ".settings.json")
        self._kept: dict[Hashable, int] = {}  # key -> index of its record
        self._done: set[int] = set()
        self._complete = 0  # indices below it are in the output, or have no record
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RecordFile:
        with contextlib.ExitStack() as stack:
            stack.enter_context(resumable.locked(self._about, self.output, self._flag))
            self._check()
            for record, _ in self._lines(self.output):
                self._note(record)
                self._complete = record["index"] + 1
            self.before = len(self)
            for record, _ in self._lines(self._part):
                self._note(record)
            content = (json.dumps(self._settings, indent=1) + "\n").encode()
            # Not replaced, for the lock is on it. It changes only before there are records.
            if self._about.read_bytes() != content:
                self._about.write_bytes(content)
            if self._part.exists():  # a line that was cut by a kill goes away, so that the next one begins a line
                resumable.replace(self._part, b"".join(resumable.whole_lines(self._part)))
            self._writer = stack.enter_context(resumable.LineWriter(self._part))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def __len__(self) -> int:
        """How many records there are, duplicates not counted."""
        return len(self._kept)

    def __contains__(self, index: int) -> bool:
        """Whether an index is done, with a record or without."""
        return index < self._complete or index in self._done

    def is_duplicate(self, index: int, key: Hashable) -> bool:
        """Whether a record of a smaller index has this key."""
        return self._kept.get(key, index) < index

    def last(self, count: int) -> int:
        """The index of the last of the first `count` records; 0 where there are fewer."""
        return sorted(self._kept.values())[count - 1] if count <= len(self) else 0

    def add(self, record: Record) -> None:
        """Appends a record, or {"index": ..., "dropped": reason}."""
        self._writer.write(record)
        self._note(record)

    def settle(self, count: int) -> None:
        """Makes the first `count` records the content of the output. All indices before the last one are done."""
        kept = sorted(self._kept.values())[:count]
        last, wanted, lines, rest = kept[-1] if kept else -1, set(kept), {}, []
        for path in (self.output, self._part):
            for record, line in self._lines(path):
                if record["index"] in wanted:
                    lines[record["index"]] = line
                elif record["index"] > last:
                    rest.append(line)
        resumable.replace(self.output, b"".join(lines[index] for index in kept))
        if rest:
            resumable.replace(self._part, b"".join(rest))
        else:
            self._part.unlink()

    def _note(self, record: Record) -> None:
        index = record["index"]
        self._done.add(index)
        if "dropped" not in record:
            key = self._key(record)
            self._kept[key] = min(index, self._kept.get(key, index))

    def _check(self) -> None:
        there = [path for path in (self.output, self._part) if path.exists() and path.stat().st_size]
        if not there:
            return
        if not self._about.stat().st_size:
            raise InputError(
                f"{there[0]}: there already, and not made by this command (no {self._about.name}); "
                f"give another {self._flag}"
            )
        resumable.check_settings(self._about.read_bytes(), self._settings, self._about, self.output, self._flag)

    def _lines(self, path: pathlib.Path) -> Iterator[tuple[Record, bytes]]:
        for number, line in enumerate(resumable.whole_lines(path), 1):
            try:
                record = json_text.parse(line)
                if "dropped" not in record:
                    self._key(record)
                if not isinstance(record["index"], int):
                    raise TypeError
            except (ValueError, KeyError, TypeError, IndexError):
                raise InputError(
                    f"{path} line {number}: not as this command writes it; remove the line, or give another "
                    f"{self._flag}"
                ) from None
            yield record, line
