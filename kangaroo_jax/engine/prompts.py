"""Prompts as token ids, checked: text, token ids, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kangaroo_jax.checkpoint import chat_template
from kangaroo_jax.checkpoint.chat_template import Message, TemplateRefusal
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.checkpoint.tokenizer import not_in_vocabulary
from kangaroo_jax.checks import check_count, is_integer
from kangaroo_jax.errors import InputError

Prompt = str | Sequence[int] | Sequence[Message]


def encode_prompts(
    target: Target, prompts: Sequence[Prompt], max_new_tokens: int, max_length: int | None
) -> list[list[int]]:
    """Token ids of the prompts, each checked to fit with its answer.

    Raises:
      InputError: naming the prompt by its index.
    """
    if isinstance(prompts, str):
        raise InputError("prompts must be a list; put the one prompt into a list")
    if not isinstance(prompts, Sequence | np.ndarray):
        raise InputError(f"prompts must be a list, found {prompts!r:.60}")
    if not len(prompts):
        raise InputError("prompts is empty; give at least one")
    if isinstance(prompts[0], Mapping):
        raise InputError("prompts must be a list, of which each may be a list of messages; found a message in it")
    return [
        encode_prompt(target, prompt, max_new_tokens, max_length, f"prompt {i}") for i, prompt in enumerate(prompts)
    ]


def encode_prompt(target: Target, prompt: Prompt, max_new_tokens: int, max_length: int | None, name: str) -> list[int]:
    """Token ids of one prompt, checked to fit with its answer.

    Args:
      target: as for `prompt_ids`.
      prompt: as for `prompt_ids`.
      max_new_tokens: that must fit as well.
      max_length: of prompt and answer together; None, or more, means the target's context.
      name: of the prompt, in errors.

    Raises:
      InputError: naming the prompt by `name`.
    """
    check_new_tokens(max_new_tokens)
    if max_length is not None:
        check_count("max_length", max_length)
    ids = prompt_ids(target, prompt, name)
    room = answer_room(target, ids, max_length)
    context = len(ids) + room
    if room < 1:
        why = _why_context(target, context)
        raise InputError(f"{name} has {len(ids)} tokens, but the context is {context}{why}; shorten it")
    if max_new_tokens > room:
        raise InputError(
            f"{name} has {len(ids)} tokens and max_new_tokens is {max_new_tokens}: {len(ids) + max_new_tokens} "
            f"exceed the context of {context}{_why_context(target, context)}; shorten the prompt or lower "
            f"max_new_tokens to {room}"
        )
    return ids


def prompt_ids(target: Target, prompt: Prompt, name: str) -> list[int]:
    """Token ids of one prompt, of any length.

    Args:
      target: whose tokenizer, and chat template, is used.
      prompt: text as the model sees it, token ids, or messages, which the chat template makes text of, up to where the
        answer begins. BOS is there once: text that begins with it gets no other, and messages only the template's.
      name: of the prompt, in errors.

    Raises:
      InputError: naming the prompt by `name`.
    """
    ids = _ids(target, prompt, name)
    if not ids:
        raise InputError(f"{name} is empty; give at least one token")
    for token in ids:
        if not 0 <= token < target.config.vocab_size:
            raise InputError(f"{name}: {not_in_vocabulary(token, target.tokenizer, target.config.vocab_size)}")
    return ids


def _why_context(target: Target, context: int) -> str:
    """What to add where the context is shorter than the model's makers say."""
    config = target.config
    if context != config.context or config.context >= config.max_position_embeddings:
        return ""
    return (
        f" (of the {config.max_position_embeddings} that the model was made for; --long_context takes longrope's long "
        "factors, for longer texts)"
    )


def check_new_tokens(max_new_tokens: Any) -> None:
    """Raises `InputError` for what is no number of new tokens."""
    if not is_integer(max_new_tokens) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, found {max_new_tokens!r}")


def user_turn(prompt: Prompt) -> Prompt:
    """A prompt that is text, as a user's message; any other, and an empty one, as it is."""
    return [{"role": "user", "content": prompt}] if prompt and isinstance(prompt, str) else prompt


def answer_room(target: Target, ids: Sequence[int], max_length: int | None) -> int:
    """The most new tokens that a prompt leaves room for; `max_length` as for `encode_prompt`."""
    context = target.config.context
    return (context if max_length is None else min(max_length, context)) - len(ids)


def require_template(target: Target) -> None:
    """Checks that messages can be made a prompt of.

    Raises:
      InputError: for a target without a tokenizer, or with one that has no chat template.
    """
    _require_tokenizer(target)
    if not target.tokenizer.chat_template:
        raise InputError(
            f"{target.name}: its tokenizer has no chat template, which messages need; put the template that the model "
            "was tuned with beside it as chat_template.jinja, or give the prompt as text"
        )


def _require_tokenizer(target: Target) -> None:
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; give token ids, or put its tokenizer files beside it")


def _ids(target: Target, prompt: Any, name: str) -> list[int]:
    if isinstance(prompt, str):
        return _text_ids(target, prompt, name)
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes | bytearray | memoryview):
        raise InputError(f"{name} must be a string, a list of token ids or a list of messages, found {prompt!r:.60}")
    if any(isinstance(item, Mapping) for item in prompt):
        return _message_ids(target, prompt, name)
    for token in prompt:
        if not is_integer(token):
            raise InputError(f"{name}: token ids must be integers, found {token!r:.60}")
    return [int(token) for token in prompt]


def _text_ids(target: Target, text: str, name: str) -> list[int]:
    _require_tokenizer(target)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode text (character {error.start})") from None
    ids = target.tokenizer.encode(text, verbose=False) if text else []
    # A rendered chat template begins with BOS, and the tokenizer has put its own before it.
    bos = target.tokenizer.bos_token_id
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids


def _message_ids(target: Target, messages: Sequence[Message], name: str) -> list[int]:
    require_template(target)
    try:
        chat_template.check_messages(messages)
        return chat_template.prompt_ids(messages, target.tokenizer)
    except (InputError, TemplateRefusal) as error:
        raise InputError(f"{name}: {error}") from None
