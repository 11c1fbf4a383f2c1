"""How several bench commands print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from kangaroo_jax.config import DraftConfig

Item = TypeVar("Item")


def progress_bar(items: Iterable[Item], description: str, unit: str) -> Iterable[Item]:
    """A `Progress` that draws a bar on standard error, and removes it at the end."""
    return tqdm(items, desc=description, unit=unit, leave=False)


def tree_columns(draft: DraftConfig) -> str:
    """Three columns that name a setting: single sequence or tree, K, budget."""
    name, topk, budget = ("single", "", "") if draft.tree is None else ("tree", draft.tree.topk, draft.tree.budget)
    return f"{name:8}{topk:>4}{budget:>8}"


TREE_COLUMNS = f"{'':8}{'K':>4}{'budget':>8}"
