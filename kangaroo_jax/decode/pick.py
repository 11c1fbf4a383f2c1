"""Which token comes next, greedily or sampled: the one place where the two differ.

Without a sampler no random number and no distribution is in the compiled program.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kangaroo_jax.decode.sampling import Sampler, accept_and_resample, probabilities, sample
from kangaroo_jax.decode.state import Draft


def pick_token(
    logits: Float[Array, "batch vocab"], sampler: Sampler | None, positions: Int[Array, " batch"], purpose: int
) -> tuple[Int[Array, " batch"], Float[Array, "batch vocab"] | None]:
    """The next token, and the distribution it was drawn from (None in greedy decoding).

    Args:
      logits: float32.
      sampler: None for greedy decoding.
      positions: of the token.
      purpose: `sampling.DRAFT` or `sampling.TARGET`.
    """
    if sampler is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None
    probs = probabilities(logits, sampler)
    return sample(sampler.keys, positions, purpose, probs), probs


def pick_verified(
    logits: Float[Array, "batch width vocab"], draft: Draft, sampler: Sampler | None, positions: Int[Array, " batch"]
) -> tuple[Int[Array, "batch width"], Int[Array, " batch"]]:
    """What the target makes of a draft: how many drafted tokens stand, and the tokens up to the one after those.

    Args:
      logits: the target's at the drafted positions and the next, float32; width is above the longest draft.
      draft: the draft.
      sampler: None for greedy decoding, where drafts stand as far as they are the target's own choices.
      positions: of the first drafted token.

    Returns:
      Tokens (meaningless beyond the accepted drafts + 1), and the number of accepted drafts.
    """
    drafted = draft.tokens[:, : logits.shape[1] - 1]
    if sampler is not None:
        p, q = probabilities(logits, sampler), draft.probs[:, : drafted.shape[1]]
        return accept_and_resample(p, q, drafted, draft.length, sampler, positions)
    tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    agrees = (drafted == tokens[:, :-1]) & (jnp.arange(drafted.shape[1]) < draft.length[:, None])
    return tokens, jnp.sum(jnp.cumprod(agrees, axis=1), axis=1, dtype=jnp.int32)
