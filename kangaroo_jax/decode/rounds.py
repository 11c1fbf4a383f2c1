"""Rounds of decoding: Kangaroo's, plain decoding's, and runs of them on the device alone.

Plain decoding, the baseline, is made of the same pieces, so that a comparison compares the method and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.config import DraftConfig, LookupConfig, TreeConfig
from kangaroo_jax.decode.decide import Costs
from kangaroo_jax.decode.draft import draft_nothing, draft_sequence
from kangaroo_jax.decode.draft_decided import draft_decided
from kangaroo_jax.decode.draft_lookup import draft_with_lookup
from kangaroo_jax.decode.state import Chunk, DecodeState
from kangaroo_jax.decode.tree import draft_tree
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel

# Where plain decoding splits the layers; the result does not depend on it.
_PLAIN_EXIT_LAYER = 1
# Each width of a verification pass is compiled: the deep layers once more.
_MAX_WIDTHS = 16
# So many positions may go by without the draft model, before it catches up on them.
_UNSEEN = 16


@dataclasses.dataclass(frozen=True)
class RoundShape:
    """What a round is, as far as compiled programs depend on it. Static.

    Attributes:
      exit_layer: l.
      max_draft_len: gamma; 0 without a draft model.
      tree: None drafts a single sequence.
      widths: how many tokens a verification pass may hold (see `verify`).
      lookup: what is looked up before anything else is drafted; None: nothing.
      kept: the most positions that a draft model may not have seen, where sequences decide how far to draft; 0 where
        they do not.
    """

    exit_layer: int
    max_draft_len: int
    tree: TreeConfig | None
    widths: tuple[int, ...]
    lookup: LookupConfig | None = None
    kept: int = 0

    @classmethod
    def plain(cls, lookup: LookupConfig | None = None, platform: str = "cpu", *, decides: bool = False) -> RoundShape:
        """Without a draft model: plain decoding, but for what is looked up; with `decides`, where sequences say so."""
        shape = cls(_PLAIN_EXIT_LAYER, 0, None, _widths([1], lookup, platform, narrowest=decides), lookup)
        return shape._deciding() if decides and lookup is not None else shape

    @classmethod
    def kangaroo(cls, exit_layer: int, draft: DraftConfig, num_tokens: int, platform: str) -> RoundShape:
        """Of drafts as `draft` says.

        Args:
          exit_layer: l.
          draft: gamma, trees, look-ups, and whether sequences decide how far to draft.
          num_tokens: how many tokens can be drafted.
          platform: of the devices, for example "cpu".

        Raises:
          InputError: for a tree with more children per node than there are tokens to draft.
        """
        gamma, tree, lookup = draft.max_draft_len, draft.tree, draft.lookup
        if tree is not None and tree.topk > num_tokens:
            raise InputError(
                f"tree_topk must be at most the {num_tokens} tokens that can be drafted, found {tree.topk}"
            )
        if tree is None:
            widths = [*(width for width in (2, 3, 5, 7, 9, 13) if width <= gamma), gamma + 1]
        else:
            # What a tree of each depth holds.
            widths = sorted({1 + tree.drafted(levels) for levels in range(1, gamma + 1)})
        decides = draft.decide is not None
        widths = _widths([1, *widths] if decides else widths, lookup, platform, narrowest=decides)
        shape = cls(exit_layer, gamma, tree, widths, lookup)
        return shape._deciding() if decides else shape

    def _deciding(self) -> RoundShape:
        return dataclasses.replace(self, kept=_UNSEEN + self.max_commit)

    @property
    def max_commit(self) -> int:
        """The most tokens that a round commits per sequence."""
        return 1 + max(self.max_draft_len, 0 if self.lookup is None else self.lookup.max_tokens)

    @property
    def positions(self) -> int:
        """The most positions from x_n on that a round fills in the caches. (A draft model that catches up may fill more
        of its own, which have room for that: `DraftModel.init`.)"""
        # While a tree grows, each level but the last has its frontier in the caches; then all that is verified.
        growing = 0 if self.tree is None else 1 + self.tree.topk * (self.max_draft_len - 1)
        # While others take draft steps, a sequence whose draft was looked up idles, and writes one position behind it.
        idling = 2 + self.lookup.max_tokens if self.lookup is not None and self.max_draft_len else 0
        return max(growing, idling, self.widths[-1])

    @property
    def beyond_window(self) -> int:
        """How many positions a layer with a window has to hold besides it. The query of x_n sees its window after all
        of its round's positions are written. And the next turn of a conversation goes on from where the draft model has
        seen all, up to `kept` positions before the last one (`Engine._free`): its window has to be there still."""
        return self.positions - 1 + max(1, self.kept)


def run_rounds(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    running: Bool[Array, " batch"],
    threshold: Float[Array, ""],
    at_least: Int[Array, ""],
    limit: Int[Array, ""],
    costs: Costs | None = None,
    *,
    shape: RoundShape,
    sampled: bool,
    tokens: int,
    record: bool = False,
) -> tuple[DecodeState, Chunk]:
    """Rounds until every sequence that goes on has `limit` new tokens, one has twice as many, all have finished, or
    fewer than `at_least` go on.

    Args:
      target: the model.
      draft_model: None for plain decoding.
      state: donated by the caller, so that caches are updated in place.
      running: sequences that are to go on; the others finish here.
      threshold: eta.
      at_least: sequences that must go on for another round; 0 runs on with any.
      limit: at most `tokens`.
      costs: of rounds, where sequences decide how far to draft.
      shape: of a round, static.
      sampled: whether any sequence may sample, static: where none does, no random number is in the program.
      tokens: that there is room for, static.
      record: whether the chunk holds what was drafted, static: where nobody asks, it is not in the program.
    """
    state = state.replace(finished=state.finished | ~running)
    most_drafted = shape.widths[-1] - 1 if record else None
    room, looks_up = max_chunk_tokens(tokens, shape), shape.lookup is not None
    chunk = Chunk.empty(state.finished, room, tokens, most_drafted, looks_up=looks_up)

    def goes_on(loop: tuple[DecodeState, Chunk]) -> Bool[Array, ""]:
        state, chunk = loop
        count = jnp.sum(~state.finished)
        behind = jnp.any(~state.finished & (chunk.num_tokens < limit))
        return behind & (count >= at_least) & (jnp.max(chunk.num_tokens) < 2 * limit)

    return jax.lax.while_loop(
        goes_on,
        lambda loop: one_round(target, draft_model, *loop, threshold, costs, shape=shape, sampled=sampled),
        (state, chunk),
    )


def max_chunk_tokens(tokens: int, shape: RoundShape) -> int:
    """The most tokens that `run_rounds` commits per sequence."""
    return 2 * tokens - 1 + shape.max_commit


def one_round(
    target: TargetModel,
    draft_model: DraftModel | None,
    state: DecodeState,
    chunk: Chunk,
    threshold: Float[Array, ""],
    costs: Costs | None = None,
    *,
    shape: RoundShape,
    sampled: bool,
) -> tuple[DecodeState, Chunk]:
    """One draft, one verification, one commit. Arguments as for `run_rounds`; `chunk` has room for the round."""
    sampling = state.sampling if sampled else None
    static = {"exit_layer": shape.exit_layer, "max_draft_len": shape.max_draft_len}
    if shape.kept:
        deciding = {"lookup": shape.lookup, "kept": shape.kept, "max_commit": shape.max_commit}
        drafted = draft_decided(target, draft_model, state, costs, sampling, **static, **deciding)
    elif shape.lookup is not None:
        drafted = draft_with_lookup(target, draft_model, state, threshold, sampling, **static, lookup=shape.lookup)
    elif draft_model is None:
        drafted = draft_nothing(target, state, sampling, exit_layer=shape.exit_layer)
    elif shape.tree is None:
        drafted = draft_sequence(target, draft_model, state, threshold, sampling, **static)
    else:
        drafted = draft_tree(target, draft_model, state, threshold, **static, tree=shape.tree)
    verdict, hidden, deep = verify(
        target, state.deep, drafted, sampling, exit_layer=shape.exit_layer, widths=shape.widths
    )
    return commit(state, chunk, draft_model, drafted, verdict, hidden, deep, costs)


def _widths(
    widths: list[int], lookup: LookupConfig | None, platform: str, *, narrowest: bool = False
) -> tuple[int, ...]:
    """The widths that are compiled, for a draft model's drafts that need `widths`, ascending, and for look-ups.
    `narrowest`: the first of them is, wherever that is."""
    if lookup is not None and lookup.max_tokens >= widths[-1]:  # else the narrowest that holds them is taken
        widths = [*widths, lookup.max_tokens + 1]
    # Beside reading the weights, positions are free on accelerators; on CPU they are not.
    fewer = widths[: len(widths) - 1 if platform == "cpu" else narrowest]
    return (*_spread(fewer[: len(widths) - 1], _MAX_WIDTHS - 1), widths[-1])


def _spread(widths: Sequence[int], count: int) -> list[int]:
    """At most `count` of the widths, from the first on, evenly."""
    step = max(1, -(-len(widths) // count))
    return list(widths)[::step]
