"""Looking up a draft in the sequence's own tokens: what followed the last few tokens where they stood before."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from kangaroo_jax.config import LookupConfig


@flax.struct.dataclass
class History:
    """The tokens of a batch of sequences, prompt and answer: those that the caches hold keys and values of. Like the
    caches it has no length of its own, and what lies beyond the sequence's is left over, or padding."""

    tokens: Int[Array, "batch capacity"]

    @classmethod
    def empty(cls, batch: int, capacity: int) -> History:
        return cls(jnp.zeros((batch, capacity), jnp.int32))

    @property
    def capacity(self) -> int:
        return self.tokens.shape[1]

    def written(self, tokens: Int[Array, "batch time"], start: Int[Array, " batch"]) -> History:
        """With tokens from `start` on; those beyond the capacity are dropped."""

        def one(row: Array, new: Array, place: Array) -> Array:
            return row.at[place + jnp.arange(len(new))].set(new, mode="drop")

        return History(jax.vmap(one)(self.tokens, tokens, start))

    def resized(self, capacity: int) -> History:
        """The same tokens with room for `capacity`: more, or fewer."""
        more = max(0, capacity - self.capacity)
        return History(jnp.pad(self.tokens[:, :capacity], ((0, 0), (0, more))))

    def row(self, row: Int[Array, ""]) -> History:
        """One sequence, as a history of its own."""
        return History(jax.lax.dynamic_slice_in_dim(self.tokens, row, 1))

    def with_rows(self, rows: Int[Array, " new"], new: History) -> History:
        """With the sequences of `new`, whose capacity is no larger, in place of the sequences `rows`; those whose row
        is beyond the batch are dropped."""
        return History(self.tokens.at[rows, : new.tokens.shape[1]].set(new.tokens, mode="drop"))


def look_up(
    history: History, token: Int[Array, " batch"], length: Int[Array, " batch"], config: LookupConfig
) -> tuple[Int[Array, "batch drafts"], Int[Array, " batch"]]:
    """What followed the longest of the sequence's ends that it also has earlier.

    An end is its last `min_ngram` to `max_ngram` tokens, x_n included. Of several places of the longest one, the last
    is taken. The copy goes on into what it has copied itself: behind a place p tokens back, text of period p is
    continued for as long as is asked for.

    Takes `max_ngram` comparisons of `capacity` integers per sequence.

    Args:
      history: tokens at positions below `length`.
      token: x_n, at position `length`.
      length: n of each sequence; where it is beyond the capacity (an idle row), the result is without meaning.
      config: static.

    Returns:
      `max_tokens` tokens that may follow x_n, and how many of them are found: all or none. They are tokens of the
      vocabulary in either case.
    """
    tokens = history.tokens
    positions = jnp.arange(tokens.shape[1])
    n = length[:, None]
    text = jnp.where(positions == n, token[:, None], tokens)
    end = jnp.take_along_axis(text, n - jnp.arange(config.max_ngram), axis=1, mode="clip")  # x_n first
    # How many tokens up to each position are those at the end.
    alike, same = jnp.broadcast_to(positions < n, text.shape), jnp.zeros(text.shape, jnp.int32)
    for back in range(config.max_ngram):
        behind = jnp.pad(text, ((0, 0), (back, 0)))[:, : text.shape[1]]
        alike &= (positions >= back) & (behind == end[:, back, None])
        same += alike
    longest = jnp.max(same, axis=1, keepdims=True)
    place = jnp.max(jnp.where(same == longest, positions, 0), axis=1, keepdims=True)
    period = jnp.maximum(n - place, 1)
    following = place + 1 + jnp.arange(config.max_tokens) % period
    found = jnp.take_along_axis(text, following, axis=1, mode="clip")
    return found, jnp.where(longest[:, 0] >= config.min_ngram, config.max_tokens, 0)


def drafts_what_was_found(found: Int[Array, " batch"]) -> Bool[Array, " batch"]:
    """Whether a sequence's round drafts what was looked up, and else with the draft model: the place of the rule, which
    may look at nothing but the sequence's own past, as exact sampling needs.

    Args:
      found: how many tokens `look_up` found.
    """
    return found > 0
