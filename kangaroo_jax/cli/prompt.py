"""The prompt of one command: from a flag, a file or standard input."""

from __future__ import annotations

import os
import select
import stat
import sys

from kangaroo_jax import json_text, paths
from kangaroo_jax.errors import InputError

_PIPE_PATIENCE = 5.0  # seconds


def read_prompt(command: str, prompt: str | None, prompt_file: str | None, built_in: str | None) -> str:
    """The prompt that was given, or read from a file (- is standard input), or piped to the command, or built in.

    Raises:
      InputError: where two are given, none is, or the text cannot be read.
    """
    if prompt is not None and prompt_file is not None:
        raise InputError("--prompt and --prompt_file were both given; give one")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        return _read_text(prompt_file)
    if (piped := _piped_text(command)) is not None:
        return piped
    if built_in is not None:
        return built_in
    raise InputError("no prompt; give --prompt, --prompt_file or text on standard input")


def read_messages(path: str) -> list[dict[str, str]]:
    """The messages in a file (- is standard input), a JSON list; what is in it is not checked.

    Raises:
      InputError: for a file that cannot be read, or that holds no list.
    """
    try:
        messages = json_text.parse(_read_text(path))
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--messages={path}: not JSON ({error})") from None
    if not isinstance(messages, list):
        raise InputError(f'--messages={path}: expected a list like [{{"role": "user", "content": "..."}}]')
    return messages


def _piped_text(command: str) -> str | None:
    """The text of a file or pipe on standard input. None for an empty pipe, which many launchers leave open."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    mode = os.fstat(sys.stdin.fileno()).st_mode
    # A pipe that nobody writes to must not make the command wait for ever.
    if stat.S_ISFIFO(mode) and not select.select([sys.stdin], [], [], _PIPE_PATIENCE)[0]:
        print(f"{command}: nothing on standard input for {_PIPE_PATIENCE:.0f} s, not waiting for it", file=sys.stderr)
        return None
    if stat.S_ISREG(mode):
        return _read_text("-")
    return (_read_text("-") or None) if stat.S_ISFIFO(mode) else None


def _read_text(path: str) -> str:
    name = "standard input" if path == "-" else path
    paths.check_not_named_pipe(path, name)
    try:
        if path == "-":
            if sys.stdin is None or sys.stdin.closed:
                raise InputError("standard input is closed; give a file")
            return sys.stdin.buffer.read().decode()
        with open(path, "rb") as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start}); save the prompt as UTF-8") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None
