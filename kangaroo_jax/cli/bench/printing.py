"""How several bench commands print."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


def lookup_column(draft: DraftConfig) -> str:
    """A column that names a setting's look-up; `lookup_note` says how to read it."""
    return f"{'' if draft.lookup is None else f'{draft.lookup.max_tokens}, {draft.lookup.min_ngram}':>9}"


LOOKUP_COLUMN = f"{'look-up':>9}"


def lookup_note(drafts: Sequence[DraftConfig]) -> str:
    """What the column of look-ups says of these settings, the best of what was considered."""
    if any(draft.lookup is not None for draft in drafts):
        return "look-up: tokens that are looked up, and how many last tokens have to be found"
    return "no look-up is predicted to be faster than the best single sequence"
