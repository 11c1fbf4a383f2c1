"""How a long measurement says how far it is: it takes a `Progress`, and iterates over what that returns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Gives back the items one by one, and may show how many of them are done."""

    def __call__(self, items: Iterable[Item], description: str, unit: str) -> Iterable[Item]: ...


def silent(items: Iterable[Item], description: str, unit: str) -> Iterable[Item]:
    """Shows nothing."""
    return items
