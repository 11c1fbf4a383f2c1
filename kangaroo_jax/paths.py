"""Paths that a user gave, and the user's own folders."""

from __future__ import annotations

import os
import pathlib
import stat

from kangaroo_jax.errors import InputError


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path, with the home folder in place of `~` or `~USER`.

    Raises:
      InputError: for a user that is not there, or whose home folder is not known.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        user = pathlib.Path(path).parts[0]
        raise InputError(f"{path}: the home folder {user} is not known here; give the full path") from None


def cache_folder() -> pathlib.Path | None:
    """The user's folder for what can be made again; None where no home folder is known."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # stays as it is where none is known
    return None if root.startswith("~") else pathlib.Path(root) / "kangaroo_jax"


def check_not_named_pipe(path: str | os.PathLike[str], name: str) -> None:
    """Raises `InputError`, which calls the path `name`, for a named pipe: reading it waits for a writer, for ever where
    there is none. The pipes of a shell (`/dev/stdin`, `<(...)`) have no name, and are no such files."""
    try:
        mode = os.lstat(os.path.realpath(path)).st_mode
    except (OSError, ValueError):
        return  # reading it says what is wrong
    if stat.S_ISFIFO(mode):
        raise InputError(f"{name}: is a named pipe; give a file")
