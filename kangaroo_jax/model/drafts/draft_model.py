"""What a draft model is to the decoding loop."""

from __future__ import annotations

from typing import Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.cache import DraftMask
from kangaroo_jax.model.target import TargetModel


@flax.struct.dataclass
class Committed:
    """What a round of decoding settled, for `DraftModel.after_verify`. The round's nodes are x_n, the last committed
    token before the round, and then its drafted tokens; of a sequence, node i is position n + i."""

    start: Int[Array, " batch"]  # n, the position of x_n
    count: Int[Array, " batch"]  # tokens committed; 0 for a sequence that idles
    path: Int[Array, "batch path"]  # nodes that have now been processed: x_n, then the accepted drafts, then padding
    shallow: Float[Array, "batch nodes hidden"]  # hidden states after the shallow layers
    deep: Float[Array, "batch nodes hidden"]  # normed hidden states after the deep layers
    # Of a tree, which position after x_n's each node on the path was drafted at (`DraftModel.step`), and how many such
    # positions there are. None: nodes were drafted one after another.
    step_positions: Int[Array, "batch path-1"] | None
    num_step_positions: int = flax.struct.field(pytree_node=False, default=0)

    def newest(self, hidden: Float[Array, "batch nodes hidden"]) -> Float[Array, "batch 1 hidden"]:
        """Of each node's hidden state, that of the last node on the path: of position n - 1 after the round. Without
        meaning for a sequence that idles."""
        node = jnp.take_along_axis(self.path, jnp.maximum(self.count - 1, 0)[:, None], axis=1)
        return jnp.take_along_axis(hidden, node[:, :, None], axis=1)


class DraftModel(Protocol):
    """A trained model that drafts, from the target's shallow hidden states. A pytree of weights; its state is another
    pytree, of arrays whose first axis is the batch and of `KVCache`s. Within a round it is called `carry`: of the same
    structure and shapes, but with what the model has seen of the draft.

    `start` is always a position: the first that a call's tokens have in a sequence.
    """

    kind: str  # names it in checkpoints

    def init(
        self,
        batch: int,
        capacity: int,
        dtype: jnp.dtype,
        backend: AttentionBackend,
        kept: int = 1,
        ring: int | None = None,
    ) -> PyTree:
        """The state of `batch` sequences, with room for `capacity` positions each. `kept`, static: how many positions
        at a sequence's end it may not have seen, of which it keeps what `catch_up` needs; its caches and rings are then
        larger by what that writes. 1: the last, which `begin` sees to. `ring`: the most positions that its layers hold,
        where the target's first layer has a window."""

    def after_prefill(
        self,
        state: PyTree,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        deep: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        lengths: Int[Array, " batch"],
    ) -> PyTree:
        """After a piece of each prompt, of `lengths` (at least 1) tokens from `start` on, padded on the right."""

    def catch_up(self, state: PyTree, start: Int[Array, " batch"], behind: Int[Array, " batch"]) -> PyTree:
        """Takes in the positions start - behind .. start - 1 of each sequence, which are verified; at most as many as
        are kept, and it may have seen them. Writes so many positions in any case: what lies behind `start` then has no
        meaning."""

    def begin(
        self,
        target: TargetModel,
        state: PyTree,
        token: Int[Array, " batch"],
        shallow: Float[Array, "batch 1 hidden"],
        start: Int[Array, " batch"],
    ) -> tuple[PyTree, Float[Array, "batch drafted"]]:
        """Catches up on what was verified, and takes the first step, from x_n at `start`. Returns the carry that later
        steps go on from, and float32 logits of the tokens that can be drafted (`token_ids` names them)."""

    def observe(
        self,
        state: PyTree,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
    ) -> PyTree:
        """Catches up on what was verified, and takes in x_n, at `start`, and a draft that something else made: what
        `begin` and a `step` from each of its tokens but the last leave, without logits. Returns the carry. `begin` may
        follow, for the sake of other sequences of the batch, and must leave that as it is; so must each `step`, whose
        `start` is then behind the tokens it has been called for."""

    def step(
        self,
        target: TargetModel,
        carry: PyTree,
        tokens: Int[Array, "batch time"],
        shallow: Float[Array, "batch time hidden"],
        start: Int[Array, " batch"],
        positions: Int[Array, "batch time"] | None = None,
        mask: DraftMask | None = None,
    ) -> tuple[PyTree, Float[Array, "batch time drafted"]]:
        """One more step, from drafted tokens. In a tree, `positions` says which position of the sequence each token
        has, and `mask` what it sees; `start` is then only where their entries go."""

    def after_verify(self, state: PyTree, carry: PyTree, committed: Committed) -> PyTree:
        """The state before the next round. `state` is that before this one."""

    def token_ids(self, index: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
        """The tokens at places of the logits' last axis."""

    def num_tokens(self, vocab_size: int) -> int:
        """How many tokens can be drafted, of a target's vocabulary."""
