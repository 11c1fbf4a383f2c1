"""The draft phase of a round as a dynamic tree, with the second early exit (paper, NeurIPS version)."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from kangaroo_jax.config import TreeConfig
from kangaroo_jax.decode.state import DecodeState, Draft, DraftTree
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.drafts.draft_model import DraftModel
from kangaroo_jax.model.target import TargetModel, shallow_apply


@flax.struct.dataclass
class Growth:
    """A tree while it grows. A level is the tokens at one depth; its candidates are the likeliest `topk` followers of
    each of the `topk` tokens of the level above that were drafted on from: its frontier."""

    level: Int[Array, ""]  # whose frontier is drafted on from next; the tokens that follow x_n are level 1
    active: Bool[Array, " batch"]
    tokens: Int[Array, "batch levels candidates"]
    scores: Float[Array, "batch levels candidates"]  # probability of the path; negative where there is no candidate
    frontiers: Int[Array, "batch levels topk"]  # which candidates of a level are its frontier
    # Which positions after x_n the newest frontier's tokens may look at, their own included.
    visible: Bool[Array, "batch topk positions"]
    shallow: KVCache
    carry: PyTree  # the draft model's


def draft_tree(
    target: TargetModel,
    draft_model: DraftModel,
    state: DecodeState,
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    max_draft_len: int,
    tree: TreeConfig,
) -> Draft:
    """Drafts a tree of tokens per sequence, level by level, and keeps its likeliest.

    A node's score is the product of the draft probabilities on its path. Each level takes one batched draft step: the
    `topk` likeliest followers of every frontier token are candidates, and the `topk` of them with the best scores are
    the next frontier. A sequence stops growing after a level whose best score is below `threshold`; it then idles
    until the slowest of the batch stops. Of all its candidates, the `budget` with the best scores are drafted. They
    are one tree, since no token scores above the one before it.

    The choice is the same in sampling: which tokens are in a tree depends on the tokens before it alone, and on no
    random number, so that the target may sample at each node as if there were no tree.

    Args:
      target: the model.
      draft_model: trained for `exit_layer`.
      state: between rounds.
      threshold: eta.
      exit_layer: l, static.
      max_draft_len: gamma, static; the greatest depth.
      tree: K and the budget, static.

    Returns:
      The draft. In the shallow cache its tokens lie one after another, behind x_n; in the draft model's cache only
      those that have followers, at `step_positions`.
    """
    with jax.named_scope("draft"):
        start = state.shallow.length  # n, the position of x_n
        first = start[:, None]
        root, growth = grow_tree(
            target, draft_model, state, threshold, exit_layer=exit_layer, max_draft_len=max_draft_len, topk=tree.topk
        )
        tokens, scores, links = _prune(growth, max_draft_len, tree)
        # Through the shallow layers once more, all together: most of the tree's leaves have not been, and the others
        # lie where they were drafted. One pass, like the one that ends the draft of a single sequence.
        shallow = growth.shallow.replace(length=start + 1)
        mask = DraftMask.create(start + 1, links.ancestors()[:, 1:, 1:], shallow.capacity)
        hidden, shallow = shallow_apply(target, tokens, first + links.depths, shallow, exit_layer=exit_layer, mask=mask)
        return Draft(
            tokens=tokens,
            confidence=scores,
            length=jnp.where(state.finished, 0, jnp.sum(scores >= 0, axis=1)),
            hidden=jnp.concatenate([root, hidden], axis=1),
            shallow=shallow,
            carry=growth.carry,
            probs=None,
            tree=links,
        )


def grow_tree(
    target: TargetModel,
    draft_model: DraftModel,
    state: DecodeState,
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    max_draft_len: int,
    topk: int,
) -> tuple[Float[Array, "batch 1 hidden"], Growth]:
    """All levels of a tree, before a budget cuts it (arguments as for `draft_tree`): what depends on K alone, apart
    from where it ends.

    Returns:
      The shallow hidden state of x_n, and the tree.
    """
    start = state.shallow.length
    first = start[:, None]
    root, shallow = shallow_apply(target, state.token[:, None], first, state.shallow, exit_layer=exit_layer)
    carry, logits = draft_model.begin(target, state.draft, state.token, root, start)
    growth = _grow_first(draft_model, logits, shallow, carry, ~state.finished, max_draft_len, topk)
    growth = growth.replace(active=growth.active & (growth.scores[:, 0].max(-1) >= threshold))

    def one_level(growth: Growth) -> Growth:
        return _grow(target, draft_model, growth, start, threshold, exit_layer=exit_layer, topk=topk)

    growth = jax.lax.while_loop(
        lambda growth: (growth.level < max_draft_len) & jnp.any(growth.active), one_level, growth
    )
    return root, growth


def _best_followers(
    draft_model: DraftModel, logits: Float[Array, "... drafted"], topk: int
) -> tuple[Int[Array, "... topk"], Float[Array, "... topk"]]:
    """The likeliest next tokens, and their draft probabilities."""
    best, index = jax.lax.top_k(logits, topk)
    probs = jnp.exp(best - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
    return draft_model.token_ids(index), probs


def _grow_first(
    draft_model: DraftModel,
    logits: Float[Array, "batch drafted"],
    shallow: KVCache,
    carry: PyTree,
    active: Bool[Array, " batch"],
    max_draft_len: int,
    topk: int,
) -> Growth:
    """The first level: what may follow x_n. All its candidates are its frontier."""
    batch = len(logits)
    tokens, scores = _best_followers(draft_model, logits, topk)
    return Growth(
        level=jnp.int32(1),
        active=active,
        tokens=jnp.zeros((batch, max_draft_len, topk * topk), jnp.int32).at[:, 0, :topk].set(tokens),
        scores=jnp.full((batch, max_draft_len, topk * topk), -1.0).at[:, 0, :topk].set(scores),
        frontiers=jnp.zeros((batch, max_draft_len, topk), jnp.int32).at[:, 0].set(jnp.arange(topk)),
        visible=jnp.zeros((batch, topk, topk * max(1, max_draft_len - 1)), bool)
        .at[:, :, :topk]
        .set(jnp.eye(topk, dtype=bool)),
        shallow=shallow,
        carry=carry,
    )


def _grow(
    target: TargetModel,
    draft_model: DraftModel,
    growth: Growth,
    start: Int[Array, " batch"],
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    topk: int,
) -> Growth:
    """One more level: a draft step from every token of the newest frontier."""
    level, frontier = growth.level, growth.frontiers[:, growth.level - 1]
    tokens = jnp.take_along_axis(growth.tokens[:, level - 1], frontier, axis=1)
    scores = jnp.take_along_axis(growth.scores[:, level - 1], frontier, axis=1)
    positions = jnp.broadcast_to((start + level)[:, None], tokens.shape)
    entries = start + 1 + (level - 1) * topk
    mask = DraftMask.create(start + 1, growth.visible, growth.shallow.capacity)
    hidden, shallow = shallow_apply(
        target, tokens, positions, growth.shallow.replace(length=entries), exit_layer=exit_layer, mask=mask
    )
    carry, logits = draft_model.step(target, growth.carry, tokens, hidden, entries, positions, mask)
    followers, probs = _best_followers(draft_model, logits, topk)
    followers = followers.reshape(len(start), -1)
    candidates = jnp.where(growth.active[:, None], (scores[:, :, None] * probs).reshape(followers.shape), -1.0)
    best, chosen = jax.lax.top_k(candidates, topk)
    # The next frontier's tokens see what the tokens they follow see, and themselves.
    seen = jnp.take_along_axis(growth.visible, (chosen // topk)[:, :, None], axis=1)
    own = jnp.arange(seen.shape[-1]) == level * topk + jnp.arange(topk)[:, None]
    return growth.replace(
        level=level + 1,
        active=growth.active & (best[:, 0] >= threshold),
        tokens=growth.tokens.at[:, level].set(followers),
        scores=growth.scores.at[:, level].set(candidates),
        frontiers=growth.frontiers.at[:, level].set(chosen),
        visible=seen | own,
        shallow=shallow,
        carry=carry,
    )


def _prune(
    growth: Growth, max_draft_len: int, tree: TreeConfig
) -> tuple[Int[Array, "batch drafts"], Float[Array, "batch drafts"], DraftTree]:
    """The best-scored candidates of all levels, level after level, those that are none last: tokens, scores, and how
    they hang together."""
    topk, per_level = tree.topk, tree.topk**2
    batch, total = growth.scores.shape[0], max_draft_len * per_level
    scores = growth.scores.reshape(batch, total)
    # Of equal scores the first is taken, so that a token never goes in without the one it follows.
    best, index = jax.lax.top_k(scores, tree.drafted(max_draft_len))
    index = jnp.sort(jnp.where(best >= 0, index, total), axis=1)
    exists = index < total
    place = jnp.minimum(index, total - 1)
    level, candidate = place // per_level, place % per_level
    # The candidate's parent is one of the frontier of the level above; node 0 is above the first level.
    above = jnp.maximum(level - 1, 0)
    frontier = growth.frontiers.reshape(batch, -1)
    followed = above * per_level + jnp.take_along_axis(frontier, above * topk + candidate // topk, axis=1)
    parents = jnp.argmax(index[:, None, :] == followed[:, :, None], axis=-1).astype(jnp.int32) + 1
    own = jnp.take_along_axis(growth.frontiers, level[:, :, None], axis=1) == candidate[:, :, None]
    links = DraftTree(
        parents=jnp.where(exists & (level > 0), parents, 0),
        depths=jnp.where(exists, level + 1, 1),
        levels=jnp.sum(jnp.any(growth.scores >= 0, axis=-1), axis=1, dtype=jnp.int32),
        step_positions=jnp.where(jnp.any(own, axis=-1), level * topk + jnp.argmax(own, axis=-1), 0).astype(jnp.int32),
        num_step_positions=growth.visible.shape[-1],
        max_depth=max_draft_len,
    )
    tokens = jnp.take_along_axis(growth.tokens.reshape(batch, total), place, axis=1)
    return tokens, jnp.where(exists, jnp.take_along_axis(scores, place, axis=1), -1.0), links
