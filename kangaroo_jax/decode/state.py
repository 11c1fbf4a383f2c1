"""What changes while sequences are decoded."""

from __future__ import annotations

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from kangaroo_jax.decode.decide import Pace
from kangaroo_jax.decode.lookup import History
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.model.cache import KVCache


@flax.struct.dataclass
class DecodeState:
    """A batch of sequences between rounds: `shallow.length` = `deep.length` = n tokens of each have been processed.
    What a request asks for is data of its row. Every array's first axis is the batch (caches: see their backend)."""

    token: Int[Array, " batch"]  # x_n, the last committed token, not yet processed; `NO_TOKEN` where there is none
    shallow: KVCache  # of layers [0, exit_layer)
    deep: KVCache  # of layers [exit_layer, L)
    draft: PyTree | None  # the draft model's state; None in plain decoding
    num_output: Int[Array, " batch"]  # new tokens committed
    max_output: Int[Array, " batch"]  # at most this many new tokens
    eos_token_ids: Int[Array, "batch eos"]  # tokens that end a sequence, padded with -1
    finished: Bool[Array, " batch"]  # such a sequence idles
    sampling: Sampling
    history: History | None = None  # tokens at positions 0 .. n - 1; None where nothing is looked up
    pace: Pace | None = None  # None where sequences do not decide how far to draft


@flax.struct.dataclass
class DraftRecord:
    """What each round of a run drafted; unused beyond `counts` and beyond the run's rounds. Drafted tokens are in an
    order in which each comes after the one it follows."""

    tokens: Int[Array, "batch rounds drafts"]
    parents: Int[Array, "batch rounds drafts"]  # the draft that it follows; -1: the last committed token
    confidence: Float[Array, "batch rounds drafts"]  # as `Draft.confidence`
    accepted: Bool[Array, "batch rounds drafts"]  # whether it is the target's choice, whether or not it was committed
    counts: Int[Array, "batch rounds"]

    @classmethod
    def empty(cls, batch: int, rounds: int, drafts: int) -> DraftRecord:
        shape = (batch, rounds, drafts)
        integers = jnp.zeros(shape, jnp.int32)
        counts = jnp.zeros((batch, rounds), jnp.int32)
        return cls(integers, integers, jnp.zeros(shape), jnp.zeros(shape, bool), counts)


@flax.struct.dataclass
class Chunk:
    """What a run of rounds committed: read by the host while the next run is on its way."""

    tokens: Int[Array, "batch room"]  # beyond num_tokens, leftovers of rejected drafts
    num_tokens: Int[Array, " batch"]
    accept_lengths: Int[Array, "batch rounds"]  # tokens that each round committed; unused beyond num_rounds
    draft_lengths: Int[Array, "batch rounds"]  # draft steps that each round took: tokens, or levels of a tree
    num_rounds: Int[Array, " batch"]
    finished: Bool[Array, " batch"]
    failed: Bool[Array, " batch"]  # ended in this run as the target's logits were not numbers
    drafts: DraftRecord | None = None  # None: not recorded
    # Tokens that each round looked up: 0 where it did not. None: nothing is looked up.
    lookup_lengths: Int[Array, "batch rounds"] | None = None

    @classmethod
    def empty(
        cls,
        finished: Bool[Array, " batch"],
        room: int,
        rounds: int,
        drafts: int | None = None,
        *,
        looks_up: bool = False,
    ) -> Chunk:
        """Nothing committed. `drafts`: the most tokens that a round drafts, where they are to be recorded."""
        batch = len(finished)
        zero = jnp.zeros((batch,), jnp.int32)
        lengths = jnp.zeros((batch, rounds), jnp.int32)
        record = None if drafts is None else DraftRecord.empty(batch, rounds, drafts)
        tokens, failed = jnp.zeros((batch, room), jnp.int32), jnp.zeros((batch,), bool)
        return cls(tokens, zero, lengths, lengths, zero, finished, failed, record, lengths if looks_up else None)


@flax.struct.dataclass
class DraftTree:
    """How drafted tokens follow one another where they are not one sequence. Node 0 is x_n, the last committed token;
    node i is the drafted token i - 1. A node comes after its parent."""

    parents: Int[Array, "batch drafts"]  # node that a drafted token follows
    depths: Int[Array, "batch drafts"]  # 1 for those that follow x_n
    levels: Int[Array, " batch"]  # draft steps taken: the depth of the tree before the budget cut it
    step_positions: Int[Array, "batch drafts"]  # where a token's draft step wrote in the draft model's cache, after x_n
    num_step_positions: int = flax.struct.field(pytree_node=False)
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
    # Top-1 draft probability at each; in a tree, the probability of its path; 1 where it was looked up.
    confidence: Float[Array, "batch drafts"]
    length: Int[Array, " batch"]  # drafted tokens
    hidden: Float[Array, "batch drafts+1 hidden"]  # after the shallow layers, of x_n and the drafted tokens
    shallow: KVCache
    carry: PyTree | None  # the draft model's state, with what it has seen of the draft; None without a draft model
    # The distributions that the tokens were drawn from, 1 at the token where it was looked up; None where they were not
    # drawn: in greedy decoding, and in trees. For a vocabulary of 128,000 and gamma 6 they take 3 MB per sequence,
    # written and read once a round: little beside a draft step's weights.
    probs: Float[Array, "batch drafts vocab"] | None
    tree: DraftTree | None = None  # None: each token follows the one before
    looked_up: Bool[Array, " batch"] | None = None  # None: nothing is looked up
    pace: Pace | None = None  # with which it was decided; None where sequences do not decide

    @classmethod
    def empty(
        cls,
        drafts: int,
        length: Int[Array, " batch"],
        hidden: Float[Array, "batch 1 hidden"],
        shallow: KVCache,
        carry: PyTree | None,
        vocabulary: int | None,
    ) -> Draft:
        """Room for `drafts` tokens of one sequence each, with `hidden` of x_n. `vocabulary`: the size of their
        distributions; None where they are not drawn."""
        shape = (len(length), drafts)
        return cls(
            tokens=jnp.zeros(shape, jnp.int32),
            confidence=jnp.zeros(shape),
            length=length,
            hidden=jnp.pad(hidden, ((0, 0), (0, drafts), (0, 0))),
            shallow=shallow,
            carry=carry,
            probs=None if vocabulary is None else jnp.zeros((*shape, vocabulary)),
        )

    @property
    def steps(self) -> Int[Array, " batch"]:
        """Draft steps taken, each of which drafted one more token in a row."""
        if self.tree is not None:
            return self.tree.levels
        return self.length if self.looked_up is None else jnp.where(self.looked_up, 0, self.length)
