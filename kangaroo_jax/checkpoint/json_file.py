"""JSON files that a user gave."""

from __future__ import annotations

import pathlib
from typing import Any

from kangaroo_jax import json_text
from kangaroo_jax.errors import InputError, one_line


def read_json(path: pathlib.Path, fix: str) -> dict[str, Any]:
    """A JSON object from a file, or `InputError` naming the file and `fix`."""
    try:
        value = json_text.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {fix}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:  # bad UTF-8, bad JSON, a number of thousands of digits
        raise InputError(f"{path}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
