"""Prompts as token ids, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.errors import InputError


def encode_prompts(
    target: Target,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int,
    max_length: int | None,
) -> list[list[int]]:
    """Token ids of the prompts, each checked to fit with its answer.

    Raises:
      InputError: naming the prompt by its index.
    """
    if isinstance(prompts, str):
        raise InputError("prompts must be a list; put the one prompt into a list")
    if not prompts:
        raise InputError("prompts is empty; give at least one")
    return [
        encode_prompt(target, prompt, max_new_tokens, max_length, f"prompt {i}") for i, prompt in enumerate(prompts)
    ]


def encode_prompt(
    target: Target, prompt: str | Sequence[int], max_new_tokens: int, max_length: int | None, name: str
) -> list[int]:
    """Token ids of one prompt, checked to fit with its answer.

    Raises:
      InputError: naming the prompt by `name`.
    """
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens}")
    context = target.config.max_position_embeddings if max_length is None else max_length
    if isinstance(prompt, str):
        if target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; give token ids, or put its tokenizer files beside it")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{name} is not valid Unicode text (character {error.start})") from None
        ids = target.tokenizer.encode(prompt, verbose=False) if prompt else []
    elif isinstance(prompt, Sequence | np.ndarray):
        ids = [int(token) for token in prompt]
    else:
        raise InputError(f"{name} must be a string or a list of token ids, found {prompt!r}")
    if not ids:
        raise InputError(f"{name} is empty; give at least one token")
    for token in ids:
        if not 0 <= token < target.config.vocab_size:
            raise InputError(f"{name}: token id {token} is outside the vocabulary of {target.config.vocab_size}")
    if len(ids) >= context:
        raise InputError(f"{name} has {len(ids)} tokens, but the context is {context}; shorten it")
    if len(ids) + max_new_tokens > context:
        raise InputError(
            f"{name} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}: {len(ids) + max_new_tokens} "
            f"exceed the context of {context}; shorten the prompt or lower max_new_tokens to {context - len(ids)}"
        )
    return ids
