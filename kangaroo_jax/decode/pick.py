"""Which token comes next, greedily or sampled: the one place where the two differ.

Without `sampling` no random number and no distribution is in the compiled program.

Where the target's logits are not numbers (in float16, activations overflow), there is no next token: `NO_TOKEN` stands
in its place. A draft model's may be anything there: a drafted token is only proposed.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.decode.sampling import (
    DRAFT,
    TARGET,
    Sampling,
    accept_and_resample,
    likeliest,
    probabilities,
    sample,
)
from kangaroo_jax.decode.state import Draft, DraftTree

NO_TOKEN = -1


@flax.struct.dataclass
class Verdict:
    """What the target makes of a draft."""

    tokens: Int[Array, "batch gamma+1"]  # meaningless beyond the accepted drafts + 1, of which the last may be NO_TOKEN
    accepted: Int[Array, " batch"]  # how many drafted tokens stand
    path: Int[Array, "batch gamma+1"] | None  # nodes of a tree, from x_n to the last accepted, then padding

    @classmethod
    def empty(cls, draft: Draft) -> Verdict:
        """Nothing accepted."""
        batch, drafts = draft.tokens.shape
        if draft.tree is None:
            return cls(jnp.zeros((batch, drafts + 1), jnp.int32), jnp.zeros((batch,), jnp.int32), None)
        tokens, path = (jnp.zeros((batch, draft.tree.max_depth + 1), jnp.int32) for _ in range(2))
        return cls(tokens, jnp.zeros((batch,), jnp.int32), path)


def pick_token(
    logits: Float[Array, "batch vocab"], sampling: Sampling | None, positions: Int[Array, " batch"], purpose: int
) -> tuple[Int[Array, " batch"], Float[Array, "batch vocab"] | None]:
    """The next token, and the distribution it was drawn from (None in greedy decoding). Where the logits are not
    numbers, the target's token is `NO_TOKEN`, and a draft any.

    Args:
      logits: float32.
      sampling: None where every sequence is greedy.
      positions: of the token.
      purpose: `sampling.DRAFT` or `sampling.TARGET`.
    """
    if sampling is None:
        tokens, probs = jnp.maximum(likeliest(logits), 0), None
    else:
        probs = probabilities(logits, sampling)
        tokens = sample(sampling.keys, positions, purpose, probs)
    return tokens if purpose == DRAFT else _if_numbers(logits, tokens), probs


def _are_numbers(logits: Float[Array, "*places vocab"]) -> Bool[Array, "*places"]:
    """Whether all logits are numbers, and the largest is finite."""
    # Both are known already where tokens were chosen.
    return (likeliest(logits) >= 0) & jnp.isfinite(jnp.max(logits, axis=-1))


def _if_numbers(logits: Float[Array, "*places vocab"], tokens: Int[Array, "*places"]) -> Int[Array, "*places"]:
    """Tokens that were chosen by logits; `NO_TOKEN` where these are not numbers."""
    return jnp.where(_are_numbers(logits), tokens, NO_TOKEN)


def pick_verified(
    logits: Float[Array, "batch width vocab"],
    draft: Draft,
    sampling: Sampling | None,
    positions: Int[Array, "batch width"],
) -> Verdict:
    """What the target makes of a draft: how many drafted tokens stand, and the tokens up to the one after those.

    Args:
      logits: the target's at x_n and the drafted tokens, float32; width is above the longest draft.
      draft: the draft.
      sampling: None where every sequence is greedy, where drafts stand as far as they are the target's own choices.
      positions: of the tokens that follow those.
    """
    drafted = draft.tokens[:, : logits.shape[1] - 1]
    if draft.tree is not None:
        return walk(_choices(logits, sampling, positions), drafted, draft.length, draft.tree)
    if sampling is not None:
        p, q = probabilities(logits, sampling), draft.probs[:, : drafted.shape[1]]
        # A draft ends where the target has no distribution to accept tokens by.
        has_token = _are_numbers(logits)
        length = jnp.minimum(draft.length, jnp.sum(jnp.cumprod(has_token, axis=1), axis=1, dtype=jnp.int32))
        tokens, accepted = accept_and_resample(p, q, drafted, length, sampling.keys, positions[:, 0])
        own = jnp.arange(logits.shape[1]) == accepted[:, None]
        tokens = jnp.where(own & ~has_token, NO_TOKEN, tokens)
    else:
        tokens = _if_numbers(logits, likeliest(logits))
        agrees = (drafted == tokens[:, :-1]) & (jnp.arange(drafted.shape[1]) < draft.length[:, None])
        accepted = jnp.sum(jnp.cumprod(agrees, axis=1), axis=1, dtype=jnp.int32)
    return Verdict(jnp.pad(tokens, ((0, 0), (0, draft.tokens.shape[1] - drafted.shape[1]))), accepted, None)


def _choices(
    logits: Float[Array, "batch width vocab"], sampling: Sampling | None, positions: Int[Array, "batch width"]
) -> Int[Array, "batch width"]:
    """The target's own next token at each place: what plain decoding would choose there, with the same random
    numbers; `NO_TOKEN` where the logits are none."""
    if sampling is None:
        tokens = likeliest(logits)
    else:
        probs = probabilities(logits, sampling)
        tokens = jax.vmap(lambda p, place: sample(sampling.keys, place, TARGET, p), 1, 1)(probs, positions)
    return _if_numbers(logits, tokens)


def walk(
    choices: Int[Array, "batch width"],
    drafted: Int[Array, "batch width-1"],
    length: Int[Array, " batch"],
    tree: DraftTree,
) -> Verdict:
    """From x_n down the tree along the target's choices, as far as they were drafted.

    Every committed token is the target's own choice after the tokens before it, so that in sampling the text is
    distributed as the target's whatever the tree: here no drafted token is accepted or rejected by chance.
    """
    nodes = jnp.arange(1, drafted.shape[1] + 1)
    parents = jnp.where(nodes <= length[:, None], tree.parents[:, : drafted.shape[1]], -1)  # -1: was not drafted
    node = jnp.zeros(length.shape, jnp.int32)
    walking, path, accepted = jnp.bool_(True), [node], jnp.zeros(length.shape, jnp.int32)
    for _ in range(tree.max_depth):
        choice = jnp.take_along_axis(choices, node[:, None], axis=1)
        follows = (parents == node[:, None]) & (drafted == choice)
        walking &= jnp.any(follows, axis=1)
        node = jnp.where(walking, nodes[jnp.argmax(follows, axis=1)], node)
        path.append(node)
        accepted += walking
    path = jnp.stack(path, axis=1)
    return Verdict(jnp.take_along_axis(choices, path, axis=1), accepted, path)
