"""Keeps all but one process from writing to a place in a bucket.

The holder writes the object of the lock again every few seconds, so that the lock of one that was killed can be told
from that of one that goes on, whatever their clocks say. Where the holder was on this machine, its process is looked
for instead. A holder that could not write for a while may lose the lock, and finds out before it writes anything else.
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
from typing import Any

from kangaroo_jax import json_text
from kangaroo_jax.buckets import Bucket
from kangaroo_jax.errors import InputError, MachineError

_RENEWAL = 10.0  # seconds after which the holder writes it again
_DEAD = 45.0  # a lock that nobody has written for so long is that of a process that was killed


class BucketLock:
    """An object that one process at a time holds; a context manager.

    Args:
      bucket: the folder that it is in.
      name: of the object.
      title: what it keeps others away from, for messages.
      other: what a user can do instead of waiting, for messages.

    Raises:
      InputError: on entry, where another process holds it; and as `Bucket`.
    """

    def __init__(self, bucket: Bucket, name: str, title: str, other: str):
        self._bucket, self._name, self._title, self._other = bucket, name, title, other
        self._mine = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "id": uuid.uuid4().hex,
        }
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> BucketLock:
        while not self._bucket.create(self._name, self._content(0)):
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
                self._bucket.remove([self._name])

    def check(self) -> None:
        """Raises `MachineError` where another run has taken the lock, because this one could not renew it."""
        if not self._is_mine():
            raise MachineError(f"{self._title}: another run has taken it over; let that one go on")

    def _is_mine(self) -> bool:
        return (self._read() or {}).get("id") == self._mine["id"]

    def _content(self, renewals: int) -> bytes:
        return json.dumps(self._mine | {"renewals": renewals}).encode()

    def _read(self) -> dict[str, Any] | None:
        """What the lock says; None where there is none."""
        try:
            found = json_text.parse(self._bucket.read(self._name))
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
                    f"{self._title} is being written by process {now.get('process')} on {now.get('host')}; "
                    f"wait for its end, or {self._other}"
                )
            time.sleep(min(1.0, _DEAD / 10))
        if self._read() == first:
            self._bucket.remove([self._name])

    def _renew(self) -> None:
        renewals = 0
        while not self._stop.wait(_RENEWAL):
            with contextlib.suppress(InputError, MachineError):  # publishing says what is wrong
                if not self._is_mine():
                    return
                renewals += 1
                self._bucket.write(self._name, self._content(renewals))


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
