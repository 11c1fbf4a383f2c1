"""A tokenizer's chat template: messages to text and token ids, by transformers' `apply_chat_template`, and where the
answers are in the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kangaroo_jax.errors import InputError, one_line

Message = Mapping[str, Any]  # "role" and "content", and whatever else a template reads
Span = tuple[int, int]  # characters [start, end)

ROLES = ("system", "user", "assistant", "tool")
# Private-use characters, which no template contains.
_STANDIN = "\ue0f1\ue0f2{}\ue0f3"


class TemplateRefusal(Exception):
    """A conversation that a chat template refuses or does not show as it is, with the reason."""


def check_messages(messages: Any) -> None:
    """Checks the form of a conversation that is to be answered.

    Raises:
      InputError: for one that is not a list of messages, of known roles and with a text each, with a user's turn, and
        with something to answer at its end.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise InputError(f'messages must be a list like [{{"role": "user", "content": "..."}}], found {messages!r:.60}')
    for i, message in enumerate(messages):
        check_message(message, f"message {i}")
    if not any(message["role"] == "user" for message in messages):
        raise InputError('messages have no turn of "user"; add one')
    if messages[-1]["role"] in ("assistant", "system"):
        raise InputError(f"the last message is of {messages[-1]['role']!r}; end with what is to be answered")


def check_message(message: Any, name: str) -> None:
    """Checks the form of one message, called `name` in errors.

    Raises:
      InputError: for a role that is not known, or a content that is no text.
    """
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise InputError(f'{name} must have "role" and "content", found {message!r:.60}')
    if message["role"] not in ROLES:
        raise InputError(f"{name} is of the unknown role {message['role']!r:.60}; known are {', '.join(ROLES)}")
    content = message["content"]
    if not isinstance(content, str):
        raise InputError(f"{name} must have a text as content, found {content!r:.60}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode text (character {error.start})") from None


def apply(messages: Sequence[Message], tokenizer: Any, **options: Any) -> Any:
    """transformers' `apply_chat_template`: the text, or what `options` ask for.

    Raises:
      TemplateRefusal: for a conversation that the template refuses.
    """
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], **{"tokenize": False} | options)
    except Exception as error:  # a template can raise anything
        raise TemplateRefusal(f"the chat template refuses it ({one_line(error)})") from None


def prompt_text(messages: Sequence[Message], tokenizer: Any) -> str:
    """A conversation as text, up to where the answer begins. Raises `TemplateRefusal`."""
    return apply(messages, tokenizer, add_generation_prompt=True)


def prompt_ids(messages: Sequence[Message], tokenizer: Any) -> list[int]:
    """Token ids of a conversation, up to where the answer begins. The template writes all special tokens, BOS too; the
    text of one in a message stays text. Raises `TemplateRefusal`."""
    options = {"tokenize": True, "return_dict": False, "sanitize_control_tokens": True}
    return apply(messages, tokenizer, add_generation_prompt=True, tokenizer_kwargs={"verbose": False}, **options)


def answer_spans(text: str, messages: Sequence[Message], tokenizer: Any, **options: Any) -> list[Span]:
    """Where the assistant's contents are in `text`, which is that of `apply` with `options`.

    A plain search would find a short answer such as "yes" in the wrong place. So the template is applied again to the
    same conversation with a placeholder for each answer, which gives the text between the answers. `text` must be that
    text with the answers in place of the placeholders, each unchanged or without white space at its ends.

    Raises:
      TemplateRefusal: for answers that the template changes.
    """
    replaced, answers = [], []
    for message in messages:
        if message["role"] == "assistant":
            replaced.append({**message, "content": _STANDIN.format(len(answers))})
            answers.append(message["content"])
        else:
            replaced.append(message)
    rest, position, spans = apply(replaced, tokenizer, **options), 0, []
    for number, answer in enumerate(answers):
        before, found, rest = rest.partition(_STANDIN.format(number))
        if not found or not text.startswith(before, position):
            raise TemplateRefusal(f"the chat template leaves out or changes answer {number} or what stands before it")
        position += len(before)
        between = rest.partition(_STANDIN.format(number + 1))[0]
        for given in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
            if text.startswith(given + between, position):
                break
        else:
            raise TemplateRefusal(_what_is_missing(answer, between, text, position, number))
        spans.append((position, position + len(given)))
        position += len(given)
    if text[position:] != rest:
        raise TemplateRefusal("the chat template leaves out or changes an answer")
    return spans


def _what_is_missing(answer: str, between: str, text: str, position: int, number: int) -> str:
    """Why an answer, and what follows it, are not at `position` in `text`; mostly its beginning is left out, up to
    </think>."""
    stripped = answer.rstrip()
    for kept in range(1, len(stripped)):
        # A few characters first, as an answer may be long.
        if text.startswith(stripped[kept : kept + 16], position) and text.startswith(
            (answer[kept:] + between, stripped[kept:] + between), position
        ):
            cut = answer[:kept] if kept < 80 else f"{answer[:40]} ... {answer[kept - 40 : kept]}"
            return f"the chat template leaves out {cut!r} at the beginning of answer {number}"
    return f"the chat template leaves out or changes answer {number}"
