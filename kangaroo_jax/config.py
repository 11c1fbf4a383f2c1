"""Settings as frozen dataclasses, validated on construction.

`DraftConfig` says how to draft (with `TreeConfig`, a tree), `DraftOverrides` what of it a user changes,
`SamplingConfig` how to choose tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from kangaroo_jax.checks import check_count, is_number
from kangaroo_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class TreeConfig:
    """The shape of a drafted tree (paper, NeurIPS version).

    Attributes:
      topk: K, the most nodes of a level that are drafted on from, and the children that each of them gets.
      budget: M, the most drafted tokens that a round verifies: the likeliest of the tree.

    Raises:
      InputError: for a value out of range.
    """

    topk: int = 10
    budget: int = 32

    def __post_init__(self) -> None:
        check_count("tree_topk", self.topk)
        check_count("tree_budget", self.budget)

    def drafted(self, levels: int) -> int:
        """The most tokens of a tree of so many levels that are verified: what a draft holds, what verification passes
        over and what the caches reserve room for. The first level has K candidates, each later one K^2."""
        return min(self.budget, self.topk + (levels - 1) * self.topk**2)


@dataclasses.dataclass(frozen=True)
class DraftConfig:
    """How a round drafts (paper, section 3.2).

    Attributes:
      exit_layer: number of shallow layers l; None means the one the adapter was trained for.
      max_draft_len: gamma, the most tokens drafted in a round one after another: the depth of a tree.
      threshold: eta; drafting stops after a token whose top-1 draft probability was below it, and in a tree at a depth
        where no path has this probability. 0 never stops early.
      tree: None drafts a single sequence.

    Raises:
      InputError: for a value out of range.
    """

    exit_layer: int | None = None
    max_draft_len: int = 6
    threshold: float = 0.6
    tree: TreeConfig | None = None

    def __post_init__(self) -> None:
        if self.exit_layer is not None:
            check_count("exit_layer", self.exit_layer)
        check_count("max_draft_len", self.max_draft_len)
        if not is_number(self.threshold) or not 0.0 <= self.threshold <= 1.0:
            raise InputError(f"threshold must be between 0 and 1, found {self.threshold!r}")
        if self.tree is not None and self.tree.budget < self.max_draft_len:
            raise InputError(
                f"tree_budget must be at least max_draft_len ({self.max_draft_len}), or the deepest path cannot be "
                f"verified; found {self.tree.budget}"
            )

    def __str__(self) -> str:
        """How a report names it: gamma, eta, and a tree's shape."""
        shape = "" if self.tree is None else f", trees of K {self.tree.topk} and budget {self.tree.budget}"
        return f"gamma {self.max_draft_len}, eta {self.threshold}{shape}"


# The paper's threshold for trees, which compares with the probability of whole paths.
TREE_THRESHOLD = 0.4


@dataclasses.dataclass(frozen=True)
class DraftOverrides:
    """What a user says of drafting, in place of what lies beside the adapter; None where nothing is said.

    Attributes:
      exit_layer: l.
      max_draft_len: gamma.
      threshold: eta.
      tree: whether to draft a tree.
      tree_topk: K.
      tree_budget: M.

    Raises:
      InputError: for a value out of range, or a tree's shape where no tree is wanted.
    """

    exit_layer: int | None = None
    max_draft_len: int | None = None
    threshold: float | None = None
    tree: bool | None = None
    tree_topk: int | None = None
    tree_budget: int | None = None

    def __post_init__(self) -> None:
        if self.tree is False and self._shape():
            raise InputError("--tree_topk and --tree_budget change nothing with --notree; leave them out")
        tree = TreeConfig(**self._shape())
        DraftConfig(**self._of_rounds())
        if self.tree and self.max_draft_len is not None and self.tree_budget is not None:
            DraftConfig(**self._of_rounds(), tree=tree)

    def over(self, written: DraftConfig) -> DraftConfig:
        """`written` with what is said here. A threshold means another thing for a tree than for a single sequence: from
        the one to the other, it is the paper's where none is said.

        Raises:
          InputError: for settings that do not go together, or a tree's shape where there is no tree.
        """
        wants_tree = written.tree is not None if self.tree is None else self.tree
        if not wants_tree and self._shape():
            raise InputError("--tree_topk and --tree_budget change nothing without --tree; give it")
        tree = dataclasses.replace(written.tree or TreeConfig(), **self._shape()) if wants_tree else None
        changed = {"tree": tree}
        if wants_tree != (written.tree is not None):
            changed["threshold"] = TREE_THRESHOLD if wants_tree else DraftConfig().threshold
        return dataclasses.replace(written, **(changed | self._of_rounds()))

    def _of_rounds(self) -> dict[str, Any]:
        return self._said(exit_layer=self.exit_layer, max_draft_len=self.max_draft_len, threshold=self.threshold)

    def _shape(self) -> dict[str, Any]:
        return self._said(topk=self.tree_topk, budget=self.tree_budget)

    @staticmethod
    def _said(**values: Any) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen from the target's distribution. The default is greedy decoding.

    The same prompt and seed give the same text whatever else is in the batch; so prompts that are equal, with one
    seed, give equal texts. For several samples of one prompt, give it several times, with a seed for each.

    Attributes:
      temperature: logits are divided by it; 0 is greedy, and the other settings then have no effect.
      top_p: the fewest most probable tokens that have this much probability together are kept; 1 keeps all.
      top_k: this many most probable tokens are kept; 0 keeps all. Comes before top_p, as in transformers.
      seed: one for all prompts, or a sequence of one per prompt; 0 to 2**32 - 1.

    Raises:
      InputError: for a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number, 0 or above, found {self.temperature!r}")
        if not is_number(self.top_p) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, found {self.top_p!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise InputError(f"top_k must be an integer, 0 or above, found {self.top_k!r}")
        several = isinstance(self.seed, Sequence) and not isinstance(self.seed, str)
        for seed in self.seed if several else (self.seed,):
            if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
                raise InputError(f"seed must be an integer from 0 to 2**32 - 1, found {seed!r}")
        if several:
            object.__setattr__(self, "seed", tuple(self.seed))  # hashable, whatever sequence was given


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """How much an engine takes on at a time.

    Attributes:
      max_batch: slots: sequences that are decoded together.
      max_length: most tokens of a prompt and its answer together; None means the target's max_position_embeddings.

    Raises:
      InputError: for a value out of range.
    """

    max_batch: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_count("max_batch", self.max_batch)
        if self.max_length is not None:
            check_count("max_length", self.max_length)
