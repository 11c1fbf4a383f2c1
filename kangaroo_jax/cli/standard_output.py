"""Standard output whose failures are told from other files': its reader has left, or what it is sent to is full."""

from __future__ import annotations

import io
import sys


class OutputError(Exception):
    """Standard output cannot be written to. The message is the system's reason."""

    def __init__(self, error: OSError):
        super().__init__(error.strerror)
        self.reader_left = isinstance(error, BrokenPipeError)


class _Output(io.FileIO):
    """Writes until the first failure, and then nothing: Python writes again what is left when it ends."""

    failed = False

    def write(self, data: bytes) -> int:
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            raise OutputError(error) from None


def guard() -> None:
    """Makes writing to standard output raise `OutputError`, and characters that its encoding lacks escapes.

    Where something else stands in its place already, it is left as it is.
    """
    before = sys.stdout
    if before is None or before is not sys.__stdout__ or not isinstance(before, io.TextIOWrapper):
        return
    before.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Output(before.fileno(), "w", closefd=False)),
        encoding=before.encoding,
        errors="backslashreplace",
        line_buffering=before.line_buffering,
        write_through=before.write_through,
    )
