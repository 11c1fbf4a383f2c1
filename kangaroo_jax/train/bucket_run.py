"""The folder of a run in a bucket.

Orbax and TensorBoard write to a folder on this machine; a step goes into the bucket when Orbax has finished it, with
`COMMITTED` last, and leaves the bucket when Orbax removes it. At the start, the newest step is fetched, and of the
others what says how good they are, so that the best one is kept. Orbax can write to gs:// itself, but not to s3://,
where it renames object by object, and each of the three libraries that it does so with has its own login, environment
variables and retries.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Collection, Iterator

import jax

from kangaroo_jax import buckets
from kangaroo_jax.bucket_lock import BucketLock
from kangaroo_jax.checkpoint.adapter import COMMITTED, has_arrays, of_step, send_folder, stored_steps
from kangaroo_jax.errors import InputError

LOCK = "run.lock"


class BucketRun(buckets.Copy):
    """`RunFolder` of a folder in a bucket. `path` is this process's own."""

    shared = False

    def __init__(self, bucket: buckets.Bucket):
        super().__init__(bucket)
        self._lock: BucketLock | None = None
        self._sent: dict[str, int] = {}  # events files -> bytes
        self._steps = set(stored_steps(self.sizes)[0])
        try:
            self.fetch_all(lambda name: of_step(name) in self._steps and not has_arrays(name))
        except BaseException:
            self.__exit__()
            raise

    def __str__(self) -> str:
        return str(self.bucket)

    def exists(self) -> bool:
        return bool(self.sizes)

    def newest(self) -> int | None:
        return max(self._steps, default=None)

    def fetch(self, step: int) -> pathlib.Path:
        self.fetch_all(lambda name: of_step(name) == step)
        return self.path / str(step)

    def shown(self, message: str) -> str:
        return self.bucket.shown(message, self.path)

    def set_aside(self, step: int) -> str:
        names = [name for name in self.bucket.list() if of_step(name) == step]
        aside = free_name(step, {name.partition("/")[0] for name in self.sizes})
        self.bucket.remove([f"{step}/{COMMITTED}"])  # whatever happens now, it is no longer taken for a complete one
        for name in names:
            if name != f"{step}/{COMMITTED}":
                self.bucket.copy(name, f"{aside}/{name.partition('/')[2]}")
        self.bucket.remove(names)
        (self.path / str(step)).rename(self.path / aside)
        self._steps.remove(step)
        return aside

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        if jax.process_index() != 0:
            yield
            return
        with BucketLock(self.bucket, LOCK, f"output: {self}", "name another folder") as self._lock:
            names = self.bucket.list()
            complete, unfinished = stored_steps(names)
            if set(complete) != self._steps:
                raise InputError(f"output: another run has written to {self} meanwhile; run the command again")
            self.bucket.remove([name for name in names if of_step(name) in unfinished])
            yield

    def publish(self) -> None:
        self._lock.check()
        local = {int(x.name) for x in self.path.iterdir() if x.name.isdecimal()}
        for step in sorted(local - self._steps):
            send_folder(self.path / str(step), buckets.Bucket(f"{self.bucket}/{step}"))
            self._steps.add(step)
        gone = self._steps - local
        if gone:
            names = [name for name in self.bucket.list() if of_step(name) in gone]
            self.bucket.remove([name for name in names if name.endswith(f"/{COMMITTED}")])
            self.bucket.remove(names)
            self._steps -= gone
        events = {x.name: x.stat().st_size for x in self.path.glob("events.*")}
        changed = [name for name in events if events[name] != self._sent.get(name)]
        self.bucket.send(self.path, changed)
        self._sent |= events


def free_name(step: int, taken: Collection[str]) -> str:
    """What a damaged step is called, given what there is beside it."""
    names = (f"damaged-{step}{suffix}" for suffix in ("", *(f"-{i}" for i in range(2, 1000))))
    return next(name for name in names if name not in taken)
