"""The folder of a run, which one run at a time writes to."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from kangaroo_jax.errors import InputError

_LOCK = "run.lock"


@contextlib.contextmanager
def held(output: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made where it is missing. The system ends the hold however the process
    ends. Of several processes the first one holds it; where files cannot be locked or written, none does.

    Raises:
      InputError: where another run holds it, or it cannot be made a folder.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: {output} cannot be made a folder ({error.strerror}); name another") from None
    path = output / _LOCK
    descriptor = _locked(path) if jax.process_index() == 0 else None
    if descriptor is None:
        yield
        return
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: pathlib.Path) -> int | None:
    """The open and locked file; None where the file system has no locks, or nothing can be written to it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(
                f"output: {path.parent} is being written by {holder}; wait for its end, or name another folder"
            ) from None
        except OSError:  # some Lustre mounts
            os.close(descriptor)
            return None
        if _is(path, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder has removed it in between


def _is(path: pathlib.Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
