"""Which tokens to draft from, counted in training data."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kangaroo_jax.data.cache import TokenCache
from kangaroo_jax.errors import InputError


def count_tokens(cache: TokenCache, vocab_size: int) -> Int[np.ndarray, " vocab"]:
    """How often each token follows a position that counts in the loss."""
    counts = np.zeros(vocab_size, np.int64)
    starts = cache.starts
    for record, (start, length) in enumerate(zip(starts, cache.lengths, strict=True)):
        tokens = cache.tokens(record)
        run = np.searchsorted(cache.counted[:, 1], start, side="right")
        while run < len(cache.counted) and cache.counted[run, 0] < start + length:
            first, end = cache.counted[run] - start
            counts += np.bincount(tokens[max(first, 0) + 1 : min(end, length) + 1], minlength=vocab_size)
            run += 1
    return counts


def choose(counts: Int[np.ndarray, " vocab"], size: int, always: tuple[int, ...]) -> Int[np.ndarray, " size"]:
    """The `size` most frequent tokens, ascending; `always` are among them, and of two equally frequent
    tokens the lower id comes first.

    Raises:
      InputError: for a size that is not between the number of `always` and the vocabulary's size.
    """
    if not len(always) < size < len(counts):
        raise InputError(f"size: expected more than {len(always)} and less than {len(counts)}, found {size}")
    ranked = counts.astype(np.float64)
    ranked[list(always)] = np.inf
    return np.sort(np.argsort(-ranked, kind="stable")[:size])
