"""Caches that are rings, of as few positions as rounds may have: blocks, roll-backs, trees and pieces of prompts around
their ends.

Truth: one pass over the complete sequence without a cache, as in test_target.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.cache import DraftMask, KVCache
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply
from tests.model.test_target import SHAPE, assert_close, make_target, whole

WINDOW, CAPACITY, BATCH = 4, 64, 8
Caches = tuple[KVCache, KVCache]


@functools.cache
def target() -> TargetModel:
    return make_target(ModelConfig(**SHAPE | {"windows": (WINDOW, None, WINDOW), "num_key_value_heads": 2}))


@functools.cache
def text() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 61, (BATCH, CAPACITY))


@functools.cache
def expected() -> np.ndarray:
    return np.asarray(whole(target(), text(), 1))


@pytest.fixture(params=[CpuBackend(), DenseBackend(), DenseBackend(None, "tpu")], ids=["cpu", "dense", "tpu"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return request.param


def empty(backend: AttentionBackend, ring: int, capacity: int = CAPACITY) -> Caches:
    make = functools.partial(KVCache.empty, target().config, capacity=capacity, dtype=jnp.float32, backend=backend)
    return make(1, BATCH, rings=(ring,)), make(2, BATCH, rings=(None, ring))


@jax.jit
def forward(
    tokens: jax.Array, caches: Caches, positions: jax.Array | None = None, mask: DraftMask | None = None
) -> tuple[jax.Array, Caches]:
    """Logits of tokens behind what the caches hold, and the caches with them."""
    if positions is None:
        positions = caches[0].length[:, None] + jnp.arange(tokens.shape[1])
    hidden, shallow = shallow_apply(target(), tokens, positions, caches[0], exit_layer=1, mask=mask)
    hidden, deep = deep_apply(target(), hidden, positions, caches[1], exit_layer=1, mask=mask)
    return lm_head(target(), hidden), (shallow, deep)


def at(caches: Caches, length: np.ndarray, end: np.ndarray | None = None) -> Caches:
    """Rolled back, or forward; `end`: before a piece of a prompt that ends there."""
    length, end = (None if x is None else jnp.asarray(x, jnp.int32) for x in (length, end))
    return tuple(cache.replace(length=length, prompt_end=end) for cache in caches)


def block(start: np.ndarray, width: int) -> np.ndarray:
    """The text of each sequence from its own start on."""
    return np.stack([text()[i, first : first + width] for i, first in enumerate(start)])


def check(logits: jax.Array, start: np.ndarray, count: int | None = None) -> None:
    for i, first in enumerate(start):
        found = logits[i, :count]
        assert_close(found, expected()[i, first : first + len(found)])


def prefilled(backend: AttentionBackend, ring: int, lengths: np.ndarray, width: int) -> Caches:
    """The first `lengths` tokens of each text, in pieces of `width`, the last padded with other tokens. Each piece's
    logits are checked."""
    caches, start = empty(backend, ring), np.zeros_like(lengths)
    for _ in range(-(-max(lengths) // width)):
        end = np.minimum(start + width, lengths)
        piece = block(start, width)
        piece = np.where(np.arange(width) < (end - start)[:, None], piece, (piece + 5) % 61)
        logits, caches = forward(piece, at(caches, start, end))
        for i in np.flatnonzero(end > start):
            assert_close(logits[i, : end[i] - start[i]], expected()[i, start[i] : end[i]])
        start = end
    return at(caches, lengths)


@pytest.mark.long
def test_blocks_and_roll_backs_go_round(backend: AttentionBackend) -> None:
    """Each block is written after wrong tokens, of which the widest reach as far as a round may write."""
    widest = 3
    caches, start = empty(backend, WINDOW + widest - 1), np.arange(BATCH) % 3
    _, caches = forward(text()[:, :3], caches)  # of which some sequences keep fewer
    caches = at(caches, start)
    for width in [1, 3, 3, 1] * 3:
        _, caches = forward((block(start, widest) + 7) % 61, caches)
        logits, caches = forward(block(start, width), at(caches, start))
        check(logits, start)
        start = start + width
    assert min(start) > 3 * (WINDOW + widest - 1)


@pytest.mark.long
def test_a_trees_path_is_moved_round_the_end(backend: AttentionBackend) -> None:
    """Two branches of two tokens side by side, of which the second is the text, behind prompts of every length from one
    turn of the ring to the next: so that each of the tree's places is the first of the ring once."""
    lengths = np.arange(9, 9 + BATCH)
    caches = prefilled(backend, WINDOW + 3, lengths, 16)
    right = block(lengths, 2)
    nodes = np.concatenate([(right + 11) % 61, right], axis=1)
    visible = np.zeros((BATCH, 4, 4), bool)
    for node, path in enumerate(([0], [0, 1], [2], [2, 3])):
        visible[:, node, path] = True
    mask = DraftMask.create(jnp.asarray(lengths), jnp.asarray(visible), CAPACITY)
    logits, caches = forward(nodes, caches, lengths[:, None] + np.array([0, 1, 0, 1]), mask)
    check(logits[:, 2:], lengths)
    sources = jnp.broadcast_to(jnp.array([2, 3]), (BATCH, 2))
    caches = at(tuple(cache.moved(jnp.asarray(lengths), sources, 4) for cache in caches), lengths + 2)
    for width in (1, 3, 1):
        logits, caches = forward(block(np.asarray(caches[0].length), width), caches)
        check(logits, np.asarray(caches[0].length) - width)


@pytest.mark.long
@pytest.mark.parametrize("width", [2, 8, 24], ids="pieces of {}".format)
def test_prompts_of_every_length_in_pieces_and_what_follows(backend: AttentionBackend, width: int) -> None:
    """Pieces shorter than the window, longer than the ring, and one for all; lengths around the window's and the
    ring's."""
    ring = WINDOW + 2
    lengths = np.array([1, WINDOW - 1, WINDOW, WINDOW + 1, ring, ring + 1, 2 * ring, 23])
    caches = prefilled(backend, ring, lengths, width)
    for step in (3, 1, 3, 1):
        logits, caches = forward(block(lengths, step), caches)
        check(logits, lengths)
        lengths = lengths + step


@pytest.mark.long
def test_rows_and_sizes_change_between_rings_and_caches_of_all_positions(backend: AttentionBackend) -> None:
    """Prompts from a cache that is too small to be a ring, over rows of one that has gone round; which then grows."""
    ring, lengths = WINDOW + 2, np.array([1, 2, 3, 4, 5, 3, 2, 1])
    worn = prefilled(backend, ring, np.full(BATCH, 20), 8)
    small = empty(backend, ring, capacity=5)
    _, small = forward(text()[:, :5], at(small, np.zeros_like(lengths), lengths))
    rows = jnp.arange(0, BATCH, 2)
    odd = [jax.tree.map(lambda *x: jnp.concatenate(x), *map(cache.row, rows)) for cache in at(small, lengths)]
    if isinstance(backend, CpuBackend):  # whose batch and heads are one axis
        assert odd[0].keys[0].shape == (2 * len(rows), 8, 5)
    caches = tuple(cache.with_rows(rows, new).resized(80) for cache, new in zip(worn, odd, strict=True))
    start = np.where(np.arange(BATCH) % 2 == 0, lengths, 20)
    for step in (3, 1, 3):
        logits, caches = forward(block(start, step), caches)
        check(logits, start)
        start = start + step
    grown = tuple(cache.resized(CAPACITY) for cache in at(small, lengths))
    for step in (3, 1, 3):
        logits, grown = forward(block(lengths, step), grown)
        check(logits, lengths)
        lengths = lengths + step


def test_a_ring_without_room_for_what_is_written_is_refused(backend: AttentionBackend) -> None:
    with pytest.raises(ValueError, match="a ring of 5 positions lacks room for 3 beside a window of 4"):
        forward(text()[:, :3], empty(backend, 5))
