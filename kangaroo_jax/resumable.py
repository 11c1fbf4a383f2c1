"""Files of JSON lines that stay usable when the process that writes them is killed at any moment."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from kangaroo_jax import json_text
from kangaroo_jax.errors import InputError

_SYNC_SECONDS = 1.0


class LineWriter:
    """Appends JSON values to a file, one line each, each with one write: after a kill, only the last line can be
    incomplete, and then it has no line break. After a loss of power, the lines of the last second can be missing."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise _stopped(path, error) from None
        self._synced = time.monotonic()

    def __enter__(self) -> LineWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            os.fsync(self._file)
        except OSError as error:
            if kind is None:  # else the first error counts
                raise _stopped(self._path, error) from None
        finally:
            os.close(self._file)

    def write(self, value: Any) -> None:
        """Appends one value.

        Raises:
          InputError: for a full disk, or a file that cannot be written to.
        """
        left = json.dumps(value).encode() + b"\n"
        try:
            while left:  # a disk that fills up takes part of a line, and fails at the next write
                left = left[os.write(self._file, left) :]
            if time.monotonic() > self._synced + _SYNC_SECONDS:
                os.fsync(self._file)
                self._synced = time.monotonic()
        except OSError as error:
            raise _stopped(self._path, error) from None


def _stopped(path: pathlib.Path, error: OSError) -> InputError:
    return InputError(f"{path}: {error.strerror}; when this is fixed, the same command continues")


def whole_lines(path: pathlib.Path) -> list[bytes]:
    """The complete lines of a file, each with its line break; none if the file is missing. Left out are a last line
    without a line break, from a kill, and everything from the first NUL byte, from a loss of power."""
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().partition(b"\0")[0].split(b"\n")
    return [line + b"\n" for line in lines]


def replace(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that it has the old or the new content, whenever the process is killed or power is lost.

    Raises:
      InputError: for a full disk, or a file that cannot be written to.
    """
    if path.exists() and path.read_bytes() == content:
        return
    temporary = path.with_name(path.name + ".new")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise _stopped(path, error) from None


@contextlib.contextmanager
def locked(path: pathlib.Path, answers: pathlib.Path, flag: str) -> Iterator[None]:
    """Keeps a second run from writing the same answers: the lock is on their file of settings, and ends with the
    process.

    Args:
      path: the file of settings, made if it is missing and removed if it is empty in the end.
      answers: the file or folder of answers, for messages.
      flag: the flag that names the answers, for messages.

    Raises:
      InputError: if another process has it.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give another {flag}") from None
    with os.fdopen(descriptor, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{answers}: another run is writing it; wait for its end, or give another {flag}"
            ) from None
        try:
            yield
        finally:
            if not path.stat().st_size:  # nothing was begun
                path.unlink()


def check_settings(
    found: bytes, settings: dict[str, Any], path: pathlib.Path, answers: pathlib.Path, flag: str
) -> None:
    """Checks that new answers would be made with the settings of those that exist.

    Args:
      found: content of the file of settings that the existing answers were made with.
      settings: what new answers are to be made with, JSON values.
      path: the file of settings, for messages.
      answers: the file or folder of answers, for messages.
      flag: the flag that names the answers, for messages.

    Raises:
      InputError: naming the first setting that differs.
    """
    try:
        made_with = json_text.parse(found)
    except ValueError:
        made_with = None
    if not isinstance(made_with, dict):
        raise InputError(f"{path}: expected a JSON object of settings; give another {flag}")
    for name in settings | made_with:
        if (old := made_with.get(name)) != (new := settings.get(name)):
            raise InputError(
                f"{answers}: its answers were made with {name} {old!r}, not {new!r}; "
                f"give another {flag}, or that {name}"
            )
