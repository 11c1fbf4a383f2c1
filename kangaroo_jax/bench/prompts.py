"""Prompts from modules that the demo never saw."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.demo import corpus

_CHARACTERS = 600


def held_out_prompts(count: int) -> dict[str, str]:
    """File -> prompt, one per held-out file in the order of their names: the 600 characters that end with the first
    function header in the file's second half.

    Files too short for that are passed over; fewer than `count` come back if there are no more.
    """
    prompts = {}
    for name, text in corpus.standard_library(held_out=True).items():
        header = text.find("\n    def ", len(text) // 2)
        end = text.find(":\n", header)
        if header < 0 or end < _CHARACTERS or len(prompts) == count:
            continue
        prompts[name] = text[end + 1 - _CHARACTERS : end + 1]
    return prompts


def held_out_tokens(target: Target, count: int = 8192) -> Int[np.ndarray, " count"]:
    """The first `count` token ids of the held-out modules, one after the other."""
    text = "".join(corpus.standard_library(held_out=True).values())
    ids = target.tokenizer.encode(text[: 16 * count], verbose=False)
    return np.asarray(ids[:count], np.int32)
