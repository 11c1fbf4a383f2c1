"""Looked-up drafts.

Truth: a slow look-up in plain Python; plain decoding; the method's definition by complete forward passes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax import LookupConfig
from kangaroo_jax.decode.lookup import History, look_up

CAPACITY = 24


def slow_look_up(text, config):
    """What may follow `text`: for each length of its end from the longest on, each earlier place from the last on."""
    for size in range(config.max_ngram, config.min_ngram - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):  # exclusive, so that it is an earlier place
            if text[end - size : end] == text[len(text) - size :]:
                copied = list(text)
                for i in range(config.max_tokens):
                    copied.append(copied[end + i])
                return copied[len(text) :]
    return []


@functools.cache
def compiled(config):
    return jax.jit(lambda tokens, token, length: look_up(History(tokens), token, length, config))


@pytest.mark.parametrize("lookup", [(5, 1, 1), (3, 2, 4), (9, 1, 3), (1, 3, 3)])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=CAPACITY), min_size=4, max_size=4), left_over=st.integers(0, 2)
)
def test_look_up_equals_a_slow_search(lookup, texts, left_over):
    config = LookupConfig(*lookup)
    # What lies beyond a sequence would be found, were it looked at.
    tokens = np.full((4, CAPACITY), left_over, np.int32)
    texts = [[ord(letter) - ord("a") for letter in text] for text in texts]
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    lengths = np.asarray([len(text) - 1 for text in texts], np.int32)
    last = np.asarray([text[-1] for text in texts], np.int32)
    found, count = jax.device_get(compiled(config)(tokens, last, lengths))
    assert [row[:n].tolist() for row, n in zip(found, count, strict=True)] == [
        slow_look_up(text, config) for text in texts
    ]
    assert set(found.ravel()) <= {0, 1, 2}


def test_periodic_text_is_continued_beyond_its_own_end():
    history = History(jnp.asarray([[7, 1, 2, 3, 1, 2, 3, 1, 0, 0]], jnp.int32))
    found, count = look_up(history, jnp.asarray([2]), jnp.asarray([8]), LookupConfig(8, 2, 4))
    assert found.tolist() == [[3, 1, 2, 3, 1, 2, 3, 1]]
    assert count.tolist() == [8]
