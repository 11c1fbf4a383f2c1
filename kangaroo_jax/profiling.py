"""Traces of the device's work, for Perfetto and XProf."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax

from kangaroo_jax import paths
from kangaroo_jax.errors import InputError


def check(folder: str | None) -> None:
    """Makes the folder of a trace, so that a path that cannot be one is found before the work.

    Raises:
      InputError: for a path that cannot be made a folder.
    """
    if folder is not None:
        try:
            paths.expanded(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"profile {folder}: cannot be made a folder ({error.strerror})") from None


@contextlib.contextmanager
def trace(folder: str | None, say: Callable[[str], None]) -> Iterator[None]:
    """Traces the device's work inside the `with` block into `folder`, and says where; None traces nothing.

    Compile beforehand what runs inside. XProf shows each operation under its named scopes (draft, verify, commit,
    shallow, adapter, head, deep, prefill); Perfetto shows them on accelerators only.
    """
    if folder is None:
        yield
        return
    path = paths.expanded(folder)
    with jax.profiler.trace(str(path), create_perfetto_trace=True):
        yield
    newest = max(path.rglob("perfetto_trace.json.gz"), key=lambda file: file.stat().st_mtime)
    say(f"profile: {newest}, for https://ui.perfetto.dev; {path} is a log folder for XProf")
