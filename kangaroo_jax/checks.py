"""Checks of single values that a user gave. Each raises `InputError` with the value's name."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import numpy as np

from kangaroo_jax.errors import InputError


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_count(name: str, value: Any) -> None:
    # bool is an int to Python, but `true` in a JSON file is a mistake here.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} must be a positive integer, found {value!r}")


def check_size(name: str, value: Any) -> None:
    """A count of what arrays have: their indices are int32."""
    check_count(name, value)
    if value > np.iinfo(np.int32).max:
        raise InputError(f"{name} must be below 2**31, found {value!r:.40}")


def is_integer(value: Any) -> bool:
    """Whether it is an integer of Python's or numpy's, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_)


def check_positive(name: str, value: Any) -> None:
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise InputError(f"{name} must be a finite number above 0, found {value!r}")


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InputError(f"{name} must be true or false, found {value!r}")
