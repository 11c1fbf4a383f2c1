"""The folder of a run in a bucket.

Orbax and TensorBoard write to a folder on this machine; a step goes into the bucket when Orbax has finished it, with
`COMMITTED` last, and leaves the bucket when Orbax removes it. At the start, the newest step is fetched, and of the
others what says how good they are, so that the best one is kept. Orbax can write to gs:// itself, but not to s3://,
where it renames object by object, and each of the three libraries that it does so with has its own login, environment
variables and retries.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from typing import Any

import jax

from kangaroo_jax import buckets, json_text
from kangaroo_jax.checkpoint.adapter import COMMITTED, has_arrays, of_step, send_folder, stored_steps
from kangaroo_jax.errors import InputError, MachineError

LOCK = "run.lock"
_RENEWAL = 10.0  # seconds after which a run that goes on writes its lock again
_DEAD = 45.0  # a lock that nobody has written for so long is that of a run that was killed


class BucketRun(buckets.Copy):
    """`RunFolder` of a folder in a bucket. `path` is this process's own."""

    shared = False

    def __init__(self, bucket: buckets.Bucket):
        super().__init__(bucket)
        self._lock: _Lock | None = None
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
        """By an object that the holder writes again every few seconds, so that the lock of a run that was killed can be
        told from that of one that goes on."""
        if jax.process_index() != 0:
            yield
            return
        with _Lock(self.bucket) as self._lock:
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


class _Lock:
    """`LOCK` in a run's folder, held by this process; a context manager."""

    def __init__(self, bucket: buckets.Bucket):
        self._bucket = bucket
        self._mine = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "id": uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> _Lock:
        while not self._bucket.create(LOCK, self._content(0)):
            self._wait_for_its_end()
        _HELD.add(self._mine["id"])
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        _HELD.discard(self._mine["id"])
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(InputError, MachineError):  # it looks dead after a while
            if self._is_mine():
                self._bucket.remove([LOCK])

    def check(self) -> None:
        """Raises `MachineError` where another run has taken the lock, because this one could not renew it."""
        if not self._is_mine():
            raise MachineError(f"{self._bucket}: another run has taken it over; let that one go on")

    def _is_mine(self) -> bool:
        return (self._read() or {}).get("id") == self._mine["id"]

    def _content(self, renewals: int) -> bytes:
        return json.dumps(self._mine | {"renewals": renewals}).encode()

    def _read(self) -> dict[str, Any] | None:
        """What the lock says; None where there is none."""
        try:
            found = json_text.parse(self._bucket.read(LOCK))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _wait_for_its_end(self) -> None:
        """Until there is no lock, or it looks dead, which removes it. `InputError` where its holder goes on."""
        first, since = self._read(), time.monotonic()
        same_machine = (first or {}).get("machine") == self._mine["machine"]
        killed = same_machine and first["id"] not in _HELD and not _runs(first["process"])
        while not killed and time.monotonic() < since + _DEAD:
            now = self._read()
            if now is None:
                return
            if now != first:
                raise InputError(
                    f"output: {self._bucket} is being written by process {now.get('process')} on {now.get('host')}; "
                    "wait for its end, or name another folder"
                )
            time.sleep(min(1.0, _DEAD / 10))
        if self._read() == first:
            self._bucket.remove([LOCK])

    def _renew(self) -> None:
        renewals = 0
        while not self._stop.wait(_RENEWAL):
            with contextlib.suppress(InputError, MachineError):  # publishing says what is wrong
                if not self._is_mine():
                    return
                renewals += 1
                self._bucket.write(LOCK, self._content(renewals))


_HELD: set[str] = set()  # ids of this process's own


def _machine() -> str:
    """Where process numbers mean the same: this machine until it starts again, or a container on it."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return uuid.uuid4().hex


def _runs(process: Any) -> bool:
    return isinstance(process, int) and process != os.getpid() and pathlib.Path(f"/proc/{process}").exists()
