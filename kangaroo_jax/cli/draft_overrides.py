"""What the drafting flags change of an adapter's own settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from kangaroo_jax.config import DecideConfig, DraftConfig, LookupConfig, TreeConfig
from kangaroo_jax.errors import InputError

# The paper's threshold for trees, which compares with the probability of whole paths.
TREE_THRESHOLD = 0.4


@dataclasses.dataclass(frozen=True)
class DraftOverrides:
    """The drafting flags that a user gave, which override what the adapter was tuned to; None for a flag not given.

    Attributes:
      exit_layer: l.
      max_draft_len: gamma.
      threshold: eta.
      tree: whether to draft a tree.
      tree_topk: K.
      tree_budget: M.
      lookup_tokens: tokens that a look-up drafts; 0 looks nothing up.
      lookup_min_ngram: shortest n-gram that is looked up.
      lookup_max_ngram: longest n-gram that is looked up.
      decide: whether each sequence decides how far to draft.

    Raises:
      InputError: for a value out of range, a tree's shape together with no tree, n-grams together with no look-ups, a
        tree together with look-ups or deciding, or a threshold together with deciding.
    """

    exit_layer: int | None = None
    max_draft_len: int | None = None
    threshold: float | None = None
    tree: bool | None = None
    tree_topk: int | None = None
    tree_budget: int | None = None
    lookup_tokens: int | None = None
    lookup_min_ngram: int | None = None
    lookup_max_ngram: int | None = None
    decide: bool | None = None

    def __post_init__(self) -> None:
        if self.tree is False and self._shape():
            raise InputError("--tree_topk and --tree_budget change nothing with --notree; leave them out")
        tree = TreeConfig(**self._shape())
        DraftConfig(**self._of_rounds())
        if self.tree and self.max_draft_len is not None and self.tree_budget is not None:
            DraftConfig(**self._of_rounds(), tree=tree)
        if self.lookup_tokens == 0 and self._ngrams():
            raise InputError(
                "--lookup_min_ngram and --lookup_max_ngram change nothing with --lookup_tokens=0; leave them out"
            )
        # The length that is not given is one that goes with the other.
        lookup = LookupConfig(**({"min_ngram": 1, "max_ngram": self.lookup_min_ngram or 1} | self._lookup()))
        if self.tree and self.lookup_tokens:
            DraftConfig(tree=tree, lookup=lookup)
        if self.decide and self.threshold is not None:
            raise InputError("--threshold changes nothing with --decide; leave one out")
        if self.decide and self.tree:
            DraftConfig(tree=tree, decide=DecideConfig())

    def over(self, written: DraftConfig) -> DraftConfig:
        """`written` with the flags' values. A threshold means something else for a tree than for a single sequence, so
        where the flags change the one to the other without a threshold, it is the paper's. Where `written` decides how
        far to draft, a threshold or a tree that is given goes before that.

        Raises:
          InputError: for settings that do not go together, a tree's shape where there is no tree, or n-grams where
            there are no look-ups.
        """
        wants_tree = written.tree is not None if self.tree is None else self.tree
        if not wants_tree and self._shape():
            raise InputError("--tree_topk and --tree_budget change nothing without --tree; give it")
        tree = dataclasses.replace(written.tree or TreeConfig(), **self._shape()) if wants_tree else None
        looks_up = written.lookup is not None and not self.tree
        if self.lookup_tokens is not None:
            looks_up = self.lookup_tokens != 0
        if not looks_up and self._ngrams():
            raise InputError(
                "--lookup_min_ngram and --lookup_max_ngram change nothing without --lookup_tokens; give it"
            )
        lookup = dataclasses.replace(written.lookup or LookupConfig(), **self._lookup()) if looks_up else None
        decide = None if self.threshold is not None or wants_tree else written.decide
        if self.decide is not None:
            # Asked for, it is done in an engine of any size.
            decide = dataclasses.replace(written.decide or DecideConfig(), from_slots=1) if self.decide else None
        changed = {"tree": tree, "lookup": lookup, "decide": decide}
        if wants_tree != (written.tree is not None):
            changed["threshold"] = TREE_THRESHOLD if wants_tree else DraftConfig().threshold
        return dataclasses.replace(written, **(changed | self._of_rounds()))

    def _of_rounds(self) -> dict[str, Any]:
        return self._given(exit_layer=self.exit_layer, max_draft_len=self.max_draft_len, threshold=self.threshold)

    def _shape(self) -> dict[str, Any]:
        return self._given(topk=self.tree_topk, budget=self.tree_budget)

    def _lookup(self) -> dict[str, Any]:
        return self._given(max_tokens=self.lookup_tokens or None) | self._ngrams()

    def _ngrams(self) -> dict[str, Any]:
        return self._given(min_ngram=self.lookup_min_ngram, max_ngram=self.lookup_max_ngram)

    @staticmethod
    def _given(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}
