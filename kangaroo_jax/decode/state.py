"""What changes while sequences are decoded."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.decode.sampling import Sampler
from kangaroo_jax.model.cache import KVCache


@flax.struct.dataclass
class RoundStats:
    """One entry per round and sequence; entries at and beyond `rounds` are unused."""

    accept_lengths: Int[Array, "batch room"]  # tokens the round committed
    draft_lengths: Int[Array, "batch room"]  # tokens the round drafted
    rounds: Int[Array, " batch"]

    @classmethod
    def empty(cls, batch: int, room: int) -> RoundStats:
        lengths = (jnp.zeros((batch, room), jnp.int32) for _ in range(2))
        return cls(*lengths, jnp.zeros((batch,), jnp.int32))


@flax.struct.dataclass
class DecodeState:
    """Between rounds, n = `shallow.length` = `deep.length` tokens of a sequence have been processed, and
    `adapter.length` = n - 1: the adapter sees position n - 1 (again) in the next round's first draft step."""

    token: Int[Array, " batch"]  # x_n, the last committed token, not yet processed
    shallow_hidden: Float[Array, "batch 1 hidden"]  # after the shallow layers, at position n - 1
    shallow: KVCache  # of layers [0, exit_layer)
    deep: KVCache  # of layers [exit_layer, L)
    adapter: KVCache | None  # None in plain decoding
    output: Int[Array, "batch room"]  # committed new tokens; beyond num_output, leftovers of rejected drafts
    num_output: Int[Array, " batch"]
    max_output: Int[Array, " batch"]  # at most this many new tokens
    finished: Bool[Array, " batch"]  # hit EOS or max_output; such a sequence idles
    stats: RoundStats
    sampler: Sampler | None  # None in greedy decoding


@flax.struct.dataclass
class Draft:
    """What a round drafted, with the shallow hidden states that verification starts from."""

    tokens: Int[Array, "batch gamma"]  # beyond `length`, unused
    confidence: Float[Array, "batch gamma"]  # top-1 draft probability of each
    length: Int[Array, " batch"]  # K, drafted tokens
    hidden: Float[Array, "batch gamma+1 hidden"]  # shallow hidden states of positions n .. n + K
    shallow: KVCache
    adapter: KVCache | None
    # The distributions that the tokens were drawn from; None in greedy decoding. For a vocabulary of 128,000 and
    # gamma 6 they take 3 MB per sequence, written and read once a round: little beside a draft step's weights.
    probs: Float[Array, "batch gamma vocab"] | None
