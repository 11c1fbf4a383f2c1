"""The folder of a run, which one run at a time writes to: on this machine or a shared disk (`LocalRun`), or in a bucket
(`BucketRun`)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import socket
from collections.abc import Iterator
from typing import Protocol

import jax

from kangaroo_jax import paths
from kangaroo_jax.buckets import Bucket, is_bucket
from kangaroo_jax.checkpoint import adapter as adapter_checkpoint
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.train.bucket_run import LOCK, BucketRun, free_name


class RunFolder(Protocol):
    """Where a run's checkpoints and TensorBoard events go. As text, what the user called it.

    Attributes:
      path: the folder that Orbax and TensorBoard write to: the run's, or a copy of it.
      shared: whether all processes of a run see what one of them writes to `path`.
    """

    path: pathlib.Path
    shared: bool

    def exists(self) -> bool:
        """Whether there is anything in it."""

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other runs out of it, which is made where it is missing. Of several processes the first holds it.

        Raises:
          InputError: where another run holds it, or it cannot be written.
        """

    def newest(self) -> int | None:
        """The newest finished step."""

    def fetch(self, step: int) -> pathlib.Path:
        """The folder of a finished step, with all that is in it."""

    def set_aside(self, step: int) -> str:
        """Gives a damaged step another name, which it returns. `MachineError` where that fails."""

    def publish(self) -> None:
        """Makes the run's folder what `path` holds, if it is not the same: finished steps, events, no other steps."""

    def shown(self, message: str) -> str:
        """A message about files in `path`, as one about the run's folder."""


@contextlib.contextmanager
def opened(output: str) -> Iterator[RunFolder]:
    """The run's folder of this name. Inside, messages name what the user named."""
    if not is_bucket(output):
        yield LocalRun(paths.expanded(output).resolve())
        return
    with BucketRun(Bucket(output)) as run, run.bucket.named(run.path):
        yield run


class LocalRun:
    """`RunFolder` of a folder in a file system."""

    shared = True

    def __init__(self, path: pathlib.Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.is_dir()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The system ends the hold however the process ends. Where files cannot be locked or written, nothing is
        held."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output: {self} cannot be made a folder ({error.strerror}); name another") from None
        path = self.path / LOCK
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

    def newest(self) -> int | None:
        step = adapter_checkpoint.newest_step(self.path)
        return None if step is None else int(step.name)

    def fetch(self, step: int) -> pathlib.Path:
        return self.path / str(step)

    def set_aside(self, step: int) -> str:
        folder = self.path / str(step)
        try:
            return folder.rename(folder.with_name(free_name(step, os.listdir(self.path)))).name
        except OSError as error:
            raise MachineError(f"{folder}: damaged, and cannot be renamed ({error.strerror}); move it away") from None

    def publish(self) -> None:
        pass

    def shown(self, message: str) -> str:
        return message


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
