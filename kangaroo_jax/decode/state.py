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
class DraftTree:
    """How drafted tokens follow one another where they are not one sequence. Node 0 is x_n, the last committed token;
    node i is the drafted token i - 1. A node comes after its parent."""

    parents: Int[Array, "batch drafts"]  # node that a drafted token follows
    depths: Int[Array, "batch drafts"]  # 1 for those that follow x_n
    levels: Int[Array, " batch"]  # draft steps taken: the depth of the tree before the budget cut it
    adapter_slots: Int[Array, "batch drafts"]  # of a token's keys and values in the adapter's cache, after x_n's
    num_adapter_slots: int = flax.struct.field(pytree_node=False)
    max_depth: int = flax.struct.field(pytree_node=False)  # gamma

    def ancestors(self) -> Bool[Array, "batch nodes nodes"]:
        """Whether a node (second axis) is on the path to a node (first axis), its own end included."""
        drafts = self.parents.shape[1]
        parents = jnp.pad(self.parents, ((0, 0), (1, 0)))  # x_n counts as its own parent
        nodes = jnp.arange(drafts + 1)
        path = jnp.broadcast_to(nodes, parents.shape)
        found = path[:, :, None] == nodes
        for _ in range(self.max_depth):
            path = jnp.take_along_axis(parents, path, axis=1)
            found |= path[:, :, None] == nodes
        return found


@flax.struct.dataclass
class Draft:
    """What a round drafted, with the shallow hidden states that verification starts from."""

    tokens: Int[Array, "batch drafts"]  # beyond `length`, unused
    confidence: Float[Array, "batch drafts"]  # top-1 draft probability at each; in a tree, the probability of its path
    length: Int[Array, " batch"]  # drafted tokens
    hidden: Float[Array, "batch drafts+1 hidden"]  # after the shallow layers, of x_n and the drafted tokens
    shallow: KVCache
    adapter: KVCache | None
    # The distributions that the tokens were drawn from; None where they were not drawn: in greedy decoding, and in
    # trees. For a vocabulary of 128,000 and gamma 6 they take 3 MB per sequence, written and read once a round: little
    # beside a draft step's weights.
    probs: Float[Array, "batch drafts vocab"] | None
    tree: DraftTree | None = None  # None: each token follows the one before

    @property
    def steps(self) -> Int[Array, " batch"]:
        """Draft steps taken, each of which drafted one more token in a row."""
        return self.length if self.tree is None else self.tree.levels
