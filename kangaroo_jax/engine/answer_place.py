"""Where a file of answers is: on a disk, or in a bucket, of which a run works on a copy that it sends now and then."""

from __future__ import annotations

import contextlib
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator

from kangaroo_jax.bucket_lock import BucketLock
from kangaroo_jax.buckets import Bucket, is_bucket
from kangaroo_jax.engine.answer_file import check_place
from kangaroo_jax.errors import InputError

_EVERY = 30.0  # seconds between copies that are sent: what a kill loses


class AnswerPlace:
    """A file of answers on a disk.

    Attributes:
      path: the file that answers are written to.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path

    def sent(self) -> None:
        """Call now and then while answers are written."""

    def met(self, barrier: Callable[[str], None], name: str) -> None:
        """`barrier`, after which each process sees what all have written."""
        barrier(name)


@contextlib.contextmanager
def opened(output: str, source: str, first: bool) -> Iterator[AnswerPlace]:
    """The place of a file of answers.

    Args:
      output: the file, or the object in a bucket.
      source: the prompts' file, for messages.
      first: whether this is the first of a run's processes.

    Raises:
      InputError: for a place that cannot be written to, or to which another run writes.
    """
    if not is_bucket(output):
        yield AnswerPlace(check_place(output, source))
        return
    if output.rstrip("/") == source.rstrip("/"):
        raise InputError(f"--output={output}: is the --input too; give another file")
    bucket, name = Bucket(output).parent
    folder = pathlib.Path(tempfile.mkdtemp(prefix="kangaroo_jax-")).resolve()
    lock = BucketLock(bucket, f"{name}.lock", f"--output={output}", "give another --output") if first else None
    try:
        with bucket.named(folder), lock or contextlib.nullcontext():
            place = _BucketPlace(bucket, folder / name, lock)
            try:
                yield place
            finally:
                place.send()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _BucketPlace(AnswerPlace):
    def __init__(self, bucket: Bucket, path: pathlib.Path, lock: BucketLock | None):
        super().__init__(path)
        self._bucket, self._lock = bucket, lock
        self._ours = re.compile(re.escape(path.name) + r"(\.settings\.json|\.part-\d+-of-\d+)?")
        self._there: dict[str, tuple[int, int]] = {}  # files that are the same here and in the bucket
        self._last = time.monotonic()
        self._fetch()

    def sent(self) -> None:
        if time.monotonic() > self._last + _EVERY:
            self.send()

    def met(self, barrier: Callable[[str], None], name: str) -> None:
        self.send()
        barrier(name)
        self._fetch()

    def send(self) -> None:
        """Makes the bucket hold what is here."""
        if self._lock is not None:
            self._lock.check()
        here = self._here()
        self._bucket.send(
            self.path.parent, [name for name, version in here.items() if self._there.get(name) != version]
        )
        if self._lock is not None:
            self._bucket.remove(self._there.keys() - here.keys())
        self._there, self._last = here, time.monotonic()

    def _fetch(self) -> None:
        """Copies what other processes, or earlier runs, have sent and is not here."""
        stored = {name: size for name, size in self._bucket.list().items() if self._ours.fullmatch(name)}
        here = self._here()
        newer = {
            name: size
            for name, size in stored.items()
            if name not in here or (self._there.get(name) == here[name] and size != here[name][0])
        }
        self._bucket.fetch(self.path.parent, newer)
        self._there = self._here()

    def _here(self) -> dict[str, tuple[int, int]]:
        files = (path for path in self.path.parent.iterdir() if self._ours.fullmatch(path.name))
        return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
