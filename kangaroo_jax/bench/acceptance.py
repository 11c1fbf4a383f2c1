"""What a draft model gets accepted, recorded once, and what any gamma and eta would make of it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from kangaroo_jax import generate_plain
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.decode.draft import draft
from kangaroo_jax.decode.generate import resolve_exit_layer
from kangaroo_jax.decode.prefill import bucket, prefill
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.model.adapter import Adapter
from kangaroo_jax.model.target import TargetModel


@dataclasses.dataclass(frozen=True)
class Chains:
    """The drafts that would start at each position of one greedy answer, as long as they may get, never stopped by
    their confidence.

    Attributes:
      confidence: top-1 draft probability of each drafted token.
      agrees: how many leading drafts of each chain are what the target says.
    """

    confidence: Float[np.ndarray, "positions gamma"]
    agrees: Int[np.ndarray, " positions"]

    def rounds(self, max_draft_len: int, threshold: float) -> list[tuple[int, int]]:
        """(draft length, accept length) of each round that `generate` would run with these settings, exactly."""
        rounds, position, count = [], 0, len(self.agrees)
        while position < count:
            unsure = np.flatnonzero(self.confidence[position, :max_draft_len] < np.float32(threshold))
            drafted = int(unsure[0]) + 1 if len(unsure) else max_draft_len
            committed = min(min(int(self.agrees[position]), drafted) + 1, count - position)
            rounds.append((drafted, committed))
            position += committed
        return rounds


def record(
    target: Target, adapter: TrainedAdapter, prompt: Sequence[int], max_new_tokens: int, max_draft_len: int
) -> Chains:
    """Chains of up to `max_draft_len` drafts at every position of the target's greedy answer to `prompt`.

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`.
      prompt: token ids.
      max_new_tokens: length of the answer; EOS does not end it.
      max_draft_len: the longest draft of interest.
    """
    exit_layer = resolve_exit_layer(target, adapter, DraftConfig())
    answer = np.asarray(generate_plain(target, [list(prompt)], max_new_tokens, eos_token_ids=()).tokens[0], np.int32)
    time = bucket(len(prompt), 64)
    tokens = np.zeros((1, time), np.int32)
    tokens[0, : len(prompt)] = prompt
    capacity = bucket(max(time, len(prompt) + max_new_tokens + max_draft_len + 1), 128)
    drafts, confidence = _chains(
        target.model,
        adapter.model,
        tokens,
        np.asarray([len(prompt)], np.int32),
        answer[:-1],
        exit_layer=exit_layer,
        capacity=capacity,
        max_draft_len=max_draft_len,
    )
    following = np.pad(answer, (0, max_draft_len), constant_values=-1)
    wanted = np.stack([following[i + 1 : i + 1 + max_draft_len] for i in range(len(answer) - 1)])
    agrees = np.cumprod(np.asarray(drafts) == wanted, axis=1).sum(axis=1)
    return Chains(np.asarray(confidence), agrees)


@functools.partial(jax.jit, static_argnames=("exit_layer", "capacity", "max_draft_len"))
def _chains(
    model: TargetModel,
    adapter: Adapter,
    tokens: Int[jax.Array, "1 time"],
    lengths: Int[jax.Array, " 1"],
    answer: Int[jax.Array, " positions"],
    *,
    exit_layer: int,
    capacity: int,
    max_draft_len: int,
) -> tuple[Int[jax.Array, "positions gamma"], Float[jax.Array, "positions gamma"]]:
    """Tokens and confidences of the drafts after each token of `answer`."""
    no_eos = jnp.zeros((0,), jnp.int32)
    most = jnp.full((1,), 2)
    start = prefill(model, adapter, tokens, lengths, most, no_eos, exit_layer=exit_layer, capacity=capacity, room=2)

    def chain(state: DecodeState, token: Int[jax.Array, ""]) -> tuple[DecodeState, tuple[jax.Array, jax.Array]]:
        state = state.replace(token=token[None])
        drafted = draft(model, adapter, state, jnp.float32(0), exit_layer=exit_layer, max_draft_len=max_draft_len)
        # On to the next position of the answer: what the chain wrote beyond it is masked, and overwritten.
        following = state.replace(
            shallow_hidden=drafted.hidden[:, :1],
            shallow=drafted.shallow.replace(length=state.shallow.length + 1),
            adapter=drafted.adapter.replace(length=state.adapter.length + 1),
        )
        return following, (drafted.tokens[0], drafted.confidence[0])

    return jax.lax.scan(chain, start, answer)[1]
