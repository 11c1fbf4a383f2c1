"""Files of JSON lines that a run can be killed over at any moment, and go on from."""

from __future__ import annotations

import json
import os
import pathlib
import time
from typing import Any

from kangaroo_jax.errors import InputError

_SYNC_SECONDS = 1.0


class LineWriter:
    """Appends JSON values to a file, one line each, each with one write: after a kill a line is whole, or the last and
    without its line break. After a loss of power, what was written in the last second may be missing."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._synced = time.monotonic()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def write(self, value: Any) -> None:
        """Raises `InputError` where the disk is full or the file cannot be written to."""
        left = json.dumps(value).encode() + b"\n"
        try:
            while left:  # a full disk takes part of a line, and refuses the rest
                left = left[os.write(self._file, left) :]
            if time.monotonic() > self._synced + _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise InputError(f"{self._path}: {error.strerror}; the same command goes on from what is there") from None


def whole_lines(path: pathlib.Path) -> list[bytes]:
    """The lines of a file, without what a kill left of a last one (no line break) or a loss of power of several (NULs);
    none if there is no file. Lines end with their line break."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().partition(b"\0")[0].split(b"\n")
    return [line + b"\n" for line in lines]


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it is the old or the new one whenever the process dies or power is lost."""
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(path.name + ".new")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_settings(
    found: bytes, settings: dict[str, Any], path: pathlib.Path, answers: pathlib.Path, flag: str
) -> None:
    """Refuses to mix answers of different settings.

    Args:
      found: what `path` holds: the settings that the answers were made with.
      settings: what new answers are to be made with, JSON values.
      path: for messages.
      answers: for messages.
      flag: that names the answers.

    Raises:
      InputError: naming the setting.
    """
    try:
        made_with = json.loads(found)
    except ValueError:
        made_with = None
    if not isinstance(made_with, dict):
        raise InputError(f"{path}: expected a JSON object of settings; give another {flag}")
    for name in settings | made_with:
        if (old := made_with.get(name)) != (new := settings.get(name)):
            raise InputError(
                f"{answers}: its answers were made with {name} {old!r}, not {new!r}; "
                f"give another {flag}, or what they were made with"
            )
