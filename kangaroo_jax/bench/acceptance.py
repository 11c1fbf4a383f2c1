"""Records once which drafts the target accepts, and computes from that the rounds that any gamma and eta would give;
for trees, with any budget; with look-ups, of any length.

Only this module and parts.py call the functions a round is made of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from kangaroo_jax import generate_plain
from kangaroo_jax.bench import parts
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import LookupConfig
from kangaroo_jax.decode.draft import draft_sequence
from kangaroo_jax.decode.lookup import History, look_up
from kangaroo_jax.decode.prefill import Admission, prefill
from kangaroo_jax.decode.rounds import RoundShape
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.decode.tree import grow_tree
from kangaroo_jax.engine.shapes import Shapes
from kangaroo_jax.model.attention.backend import AttentionBackend, choose_backend
from kangaroo_jax.model.drafts.draft_model import Committed
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel, deep_apply

NOT_IN_TREE = np.iinfo(np.int32).max  # greater than any budget


@dataclasses.dataclass(frozen=True)
class Found:
    """What would be looked up at each position of one greedy answer.

    Attributes:
      found: whether the text's last tokens stand in it before.
      agrees: number of leading tokens of what followed there that are the target's own, up to the longest look-up.
    """

    found: Bool[np.ndarray, " positions"]
    agrees: Int[np.ndarray, " positions"]


@dataclasses.dataclass(frozen=True)
class Chains:
    """The drafts that would start at each position of one greedy answer, of the maximum length: low confidence stops
    none of them.

    Attributes:
      confidence: top-1 draft probability of each drafted token.
      agrees: number of leading drafts of each chain that are the target's own tokens.
    """

    confidence: Float[np.ndarray, "positions gamma"]
    agrees: Int[np.ndarray, " positions"]

    def rounds(
        self, max_draft_len: int, threshold: float, looked_up: Found | None = None, most: int = 0
    ) -> list[tuple[int, int]]:
        """(draft length, accept length) of each round that `generate` would run with these settings, exactly. A round
        that looks up `most` tokens has draft length 0.

        Args:
          max_draft_len: gamma.
          threshold: eta.
          looked_up: from the same answer; None: nothing is looked up.
          most: tokens of a look-up.
        """
        rounds, position, count = [], 0, len(self.agrees)
        while position < count:
            if looked_up is not None and looked_up.found[position]:
                drafted, accepted = 0, min(int(looked_up.agrees[position]), most)
            else:
                unsure = np.flatnonzero(self.confidence[position, :max_draft_len] < np.float32(threshold))
                drafted = int(unsure[0]) + 1 if len(unsure) else max_draft_len
                accepted = min(int(self.agrees[position]), drafted)
            committed = min(accepted + 1, count - position)
            rounds.append((drafted, committed))
            position += committed
        return rounds


@dataclasses.dataclass(frozen=True)
class Trees:
    """The trees of one K that would start at each position of one greedy answer, of the maximum depth: low scores stop
    none of them, and no budget cuts them.

    Attributes:
      best: highest score of each level.
      places: [i, d, l] is for the candidate at level d on the path of the target's own tokens, in a tree of levels 0 to
        l: how many candidates a budget keeps before it. `NOT_IN_TREE` if there is no such candidate, or d > l.
    """

    best: Float[np.ndarray, "positions gamma"]
    places: Int[np.ndarray, "positions gamma gamma"]

    def rounds(self, max_draft_len: int, threshold: float, budget: int) -> list[tuple[int, int]]:
        """(levels, accept length) of each round that `generate` would run with these settings, exactly."""
        unsure = self.best[:, :max_draft_len] < np.float32(threshold)
        levels = np.where(unsure.any(axis=1), unsure.argmax(axis=1) + 1, max_draft_len)
        places = np.take_along_axis(self.places, levels[:, None, None] - 1, axis=2)[:, :, 0]
        accepted = np.cumprod(places < budget, axis=1).sum(axis=1)
        rounds, position, count = [], 0, len(levels)
        while position < count:
            committed = min(int(accepted[position]) + 1, count - position)
            rounds.append((int(levels[position]), committed))
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
      max_draft_len: maximum gamma that rounds can be computed for.
    """
    answer = _greedy_answer(target, prompt, max_new_tokens)
    drafts, confidence = _drafts(target, adapter, prompt, answer, max_draft_len, None)
    agrees = np.cumprod(drafts == _following(answer, max_draft_len), axis=1).sum(axis=1)
    return Chains(confidence, agrees)


def record_found(
    target: Target, prompt: Sequence[int], max_new_tokens: int, lookups: Sequence[LookupConfig]
) -> dict[LookupConfig, Found]:
    """What would be looked up at every position of the target's greedy answer to `prompt`, for each of `lookups`.

    Args:
      target: from `load_target`.
      prompt: token ids.
      max_new_tokens: length of the answer; EOS does not end it.
      lookups: a longer look-up begins as a shorter one does, so of those that differ in the length alone the longest
        serves for all.
    """
    answer = _greedy_answer(target, prompt, max_new_tokens)
    capacity = parts.rounded_capacity(len(prompt) + len(answer))
    text = np.zeros((capacity,), np.int32)
    text[: len(prompt) + len(answer)] = [*prompt, *answer]
    history = History(np.broadcast_to(text, (len(answer) - 1, capacity)))
    recorded = {}
    for lookup in lookups:
        search = jax.jit(functools.partial(look_up, config=lookup))
        tokens, count = map(np.asarray, search(history, answer[:-1], len(prompt) + np.arange(len(answer) - 1)))
        agrees = np.cumprod(tokens == _following(answer, lookup.max_tokens), axis=1).sum(axis=1)
        recorded[lookup] = Found(count > 0, agrees)
    return recorded


def record_trees(
    target: Target,
    adapter: TrainedAdapter,
    prompt: Sequence[int],
    max_new_tokens: int,
    max_draft_len: int,
    topks: Sequence[int],
) -> dict[int, Trees]:
    """Trees of up to `max_draft_len` levels at every position of the target's greedy answer to `prompt`, for each K.

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`.
      prompt: token ids.
      max_new_tokens: length of the answer; EOS does not end it.
      max_draft_len: maximum gamma that rounds can be computed for.
      topks: the Ks; each is recorded separately.
    """
    answer = _greedy_answer(target, prompt, max_new_tokens)
    following, recorded = _following(answer, max_draft_len), {}
    for topk in topks:
        tokens, scores, frontiers = _drafts(target, adapter, prompt, answer, max_draft_len, topk)
        path = path_of(following, tokens, scores, frontiers)
        recorded[topk] = Trees(scores.max(axis=2), places_of(path, scores))
    return recorded


def path_of(
    following: Int[np.ndarray, "positions levels"],
    tokens: Int[np.ndarray, "positions levels candidates"],
    scores: Float[np.ndarray, "positions levels candidates"],
    frontiers: Int[np.ndarray, "positions levels topk"],
) -> Int[np.ndarray, "positions levels"]:
    """The index of the candidate at each level that is on the path of the target's own tokens; -1 if none is.

    Args:
      following: the target's own tokens.
      tokens: of the candidates, as in `Growth`.
      scores: of the candidates; negative where there is none.
      frontiers: indices of the candidates that the next level expands.
    """
    topk, candidates = frontiers.shape[2], tokens.shape[2]
    path = np.full(following.shape, -1)
    for level in range(following.shape[1]):
        follows = (tokens[:, level] == following[:, level, None]) & (scores[:, level] >= 0)
        if level:
            parents = frontiers[:, level - 1, np.arange(candidates) // topk]
            follows &= parents == path[:, level - 1, None]
        path[:, level] = np.where(follows.any(axis=1), follows.argmax(axis=1), -1)
    return path


def places_of(
    path: Int[np.ndarray, "positions levels"], scores: Float[np.ndarray, "positions levels candidates"]
) -> Int[np.ndarray, "positions levels levels"]:
    """`Trees.places` of a path (-1 for no candidate). A budget keeps the best scores, and of equal ones the first."""
    levels, candidates = scores.shape[1:]
    places = np.full((*path.shape, levels), NOT_IN_TREE, np.int32)
    for depth in range(levels):
        index = np.maximum(path[:, depth], 0)
        own = np.take_along_axis(scores[:, depth], index[:, None], axis=1)[:, :, None]
        earlier = (
            np.arange(levels * candidates).reshape(levels, candidates) < (depth * candidates + index)[:, None, None]
        )
        before = np.cumsum(((scores > own) | ((scores == own) & earlier)).sum(axis=2), axis=1)
        # A tree that ends above a level holds no candidate of it.
        inside = (path[:, depth, None] >= 0) & (np.arange(levels) >= depth)
        places[:, depth] = np.where(inside, before, NOT_IN_TREE)
    return places


def _greedy_answer(target: Target, prompt: Sequence[int], max_new_tokens: int) -> Int[np.ndarray, " answer"]:
    return np.asarray(generate_plain(target, [list(prompt)], max_new_tokens, eos_token_ids=()).tokens[0], np.int32)


def _following(answer: Int[np.ndarray, " answer"], count: int) -> Int[np.ndarray, "answer-1 count"]:
    """The `count` tokens that follow each token but the last; -1 beyond the answer's end, which equals no token."""
    padded = np.pad(answer, (0, count), constant_values=-1)
    return np.stack([padded[i + 1 : i + 1 + count] for i in range(len(answer) - 1)])


def _drafts(
    target: Target,
    adapter: TrainedAdapter,
    prompt: Sequence[int],
    answer: Int[np.ndarray, " answer"],
    max_draft_len: int,
    topk: int | None,
) -> tuple[np.ndarray, ...]:
    """What is drafted after each token of `answer` but the last; see `_scan`."""
    time = Shapes(RoundShape.plain()).prompt_width(len(prompt))
    tokens = np.zeros((1, time), np.int32)
    tokens[0, : len(prompt)] = prompt
    positions = 1 + max_draft_len * (topk or 1)  # in the caches, that drafting fills
    drafted = _scan(
        target.model,
        adapter.model,
        tokens,
        np.asarray([len(prompt)], np.int32),
        answer[:-1],
        exit_layer=parts.exit_layer_of(target, adapter),
        capacity=parts.rounded_capacity(max(time, len(prompt) + len(answer) + positions)),
        backend=choose_backend(target.mesh, target.model.embed_tokens[...].devices()),
        max_draft_len=max_draft_len,
        topk=topk,
    )
    return tuple(map(np.asarray, drafted))


@functools.partial(jax.jit, static_argnames=("exit_layer", "capacity", "backend", "max_draft_len", "topk"))
def _scan(
    model: TargetModel,
    adapter: Adapter,
    tokens: Int[jax.Array, "1 time"],
    lengths: Int[jax.Array, " 1"],
    answer: Int[jax.Array, " positions"],
    *,
    exit_layer: int,
    capacity: int,
    backend: AttentionBackend,
    max_draft_len: int,
    topk: int | None,
) -> tuple[jax.Array, ...]:
    """What is drafted after each token of `answer`: for chains (topk None) tokens and confidences, [positions, gamma];
    for trees the tokens, scores and frontiers of their levels, as in `Growth`."""
    admission = Admission(jnp.full((1,), 2), jnp.full((1, 1), -1), Sampling.greedy(1))
    start = prefill(
        model,
        adapter,
        tokens,
        lengths,
        admission,
        exit_layer=exit_layer,
        capacity=capacity,
        backend=backend,
        sampled=False,
    )
    settings = {"exit_layer": exit_layer, "max_draft_len": max_draft_len}

    def draft_after(state: DecodeState, token: Int[jax.Array, ""]) -> tuple[DecodeState, tuple[jax.Array, ...]]:
        state = state.replace(token=token[None])
        if topk is None:
            drafted = draft_sequence(model, adapter, state, jnp.float32(0), None, **settings)
            hidden, found = drafted.hidden[:, :1], (drafted.tokens, drafted.confidence)
        else:
            hidden, drafted = grow_tree(model, adapter, state, jnp.float32(0), **settings, topk=topk)
            found = (drafted.tokens, drafted.scores, drafted.frontiers)
        # Continue at the next position of the answer. The drafted positions after it are masked, then overwritten.
        one, path = jnp.ones((1,), jnp.int32), jnp.zeros((1, 1), jnp.int32)
        start = state.shallow.length
        normed, deep = deep_apply(model, hidden, start[:, None], state.deep, exit_layer=exit_layer)
        committed = Committed(start, one, path, hidden, normed, None)
        following = state.replace(
            shallow=drafted.shallow.replace(length=start + 1),
            deep=deep,
            draft=adapter.after_verify(state.draft, drafted.carry, committed),
        )
        return following, tuple(x[0] for x in found)

    return jax.lax.scan(draft_after, start, answer)[1]
