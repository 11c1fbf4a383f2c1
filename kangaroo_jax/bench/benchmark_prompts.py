"""Prompts to measure with: from library modules that the demo was not trained on, or from a file."""

from __future__ import annotations

import pathlib
import re

import numpy as np
from jaxtyping import Int

from kangaroo_jax import json_text
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.demo import corpus
from kangaroo_jax.errors import InputError

_CHARACTERS = 600
_HEADER = re.compile(r"\n *def .*:(?=\n)")


def held_out_prompts(count: int) -> dict[str, str]:
    """File -> prompt, one per held-out file in the order of their names: the 600 characters that end with the first
    function header in the file's second half.

    Files too short for that are left out; there are fewer than `count` prompts if there are fewer such files.
    """
    prompts = {}
    for name, text in corpus.standard_library(held_out=True).items():
        header = text.find("\n    def ", len(text) // 2)
        end = text.find(":\n", header)
        if header < 0 or end < _CHARACTERS or len(prompts) == count:
            continue
        prompts[name] = text[end + 1 - _CHARACTERS : end + 1]
    return prompts


def held_out_functions(count: int) -> list[str]:
    """`count` prompts of 600 characters that end with a function header, spread evenly over all of the held-out files'
    functions; there are fewer if there are fewer functions."""
    prompts = []
    for text in corpus.standard_library(held_out=True).values():
        ends = [found.end() for found in _HEADER.finditer(text) if found.end() >= _CHARACTERS]
        prompts += [text[end - _CHARACTERS : end] for end in ends]
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def held_out_tokens(target: Target, count: int = 8192) -> Int[np.ndarray, " count"]:
    """The first `count` token ids of the concatenated held-out modules."""
    text = "".join(corpus.standard_library(held_out=True).values())
    ids = target.tokenizer.encode(text[: 16 * count], verbose=False)
    return np.asarray(ids[:count], np.int32)


def prompts_of_file(path: str) -> list[str]:
    """The "prompt" of each line of a JSON Lines file.

    Raises:
      InputError: naming the file, and the line that is wrong.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    prompts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt = json_text.parse(line)["prompt"]
        except (ValueError, TypeError, KeyError):
            prompt = None
        if not isinstance(prompt, str) or not prompt:
            raise InputError(f'{path}:{number}: expected an object with a text under "prompt"')
        prompts.append(prompt)
    if not prompts:
        raise InputError(f'{path}: no prompts; expected lines like {{"prompt": "..."}}')
    return prompts
