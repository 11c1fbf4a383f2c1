"""Conversations to learn from, as text, with the characters that the assistant wrote.

By the tokenizer's own template (checkpoint/chat_template.py) where it has one, or by one of `NAMED`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from kangaroo_jax.checkpoint import chat_template
from kangaroo_jax.checkpoint.chat_template import Message, Span, TemplateRefusal
from kangaroo_jax.data.records import BadRecord, Turn

_Part = tuple[str, bool]  # text, and whether the assistant wrote it

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
      text: the text.
      spans: the assistant's parts of it, in order.
      bare: whether the tokenizer still has to add its special tokens (BOS).
    """

    text: str
    spans: list[Span]
    bare: bool


def _vicuna(turns: Sequence[Turn], end: str) -> Iterator[_Part]:
    """Vicuna v1.1 and later; FastChat's conversation template "vicuna_v1.1"."""
    system, turns = _system(turns)
    yield (
        (
            system
            or "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions."
        ),
        False,
    )
    yield " ", False
    for turn in turns:
        if turn.role == "user":
            yield f"USER: {turn.text} ", False
        else:
            yield "ASSISTANT: ", False
            yield turn.text, True
            yield end, False


def _llama_2(turns: Sequence[Turn], end: str) -> Iterator[_Part]:
    """Llama-2-chat; Meta's llama/generation.py, `chat_completion`. The first BOS is the tokenizer's to add."""
    system, turns = _system(turns)
    system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for number, turn in enumerate(turns):
        if turn.role == "user":
            yield f"{'<s>' if number else ''}[INST] {(system + turn.text).strip()} [/INST] ", False
            system = ""
        else:
            yield turn.text.strip(), True
            yield f" {end}", False


def _llama_3(turns: Sequence[Turn], end: str) -> Iterator[_Part]:
    """Llama-3-instruct; Meta's llama/tokenizer.py, `ChatFormat`. BOS is the tokenizer's to add."""
    for turn in turns:
        yield f"<|start_header_id|>{turn.role}<|end_header_id|>\n\n", False
        yield turn.text.strip(), turn.role == "assistant"
        yield "<|eot_id|>", False


NAMED: dict[str, Callable[[Sequence[Turn], str], Iterator[_Part]]] = {
    "vicuna_v1.1": _vicuna,
    "llama-2": _llama_2,
    "llama-3": _llama_3,
}


def _system(turns: Sequence[Turn]) -> tuple[str, Sequence[Turn]]:
    """The system text and the turns after it, which must be a user's and the assistant's in turn."""
    system, rest = (turns[0].text, turns[1:]) if turns[0].role == "system" else ("", turns)
    for turn, role in zip(rest, ("user", "assistant") * len(rest), strict=False):
        if turn.role != role:
            raise BadRecord(f"a turn of {turn.role} where the template allows only {role}")
    return system, rest


def fingerprint(tokenizer: Any, name: str) -> str:
    """What the rendered text depends on besides the conversation."""
    if name:
        return f"named 1 {name} {tokenizer.eos_token}"
    return json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], sort_keys=True, default=str)


def marks_generation(tokenizer: Any) -> bool:
    """Whether the tokenizer's template marks the assistant's text with {% generation %}."""
    template = tokenizer.chat_template
    template = template.get("default", "") if isinstance(template, dict) else template
    return bool(_GENERATION.search(template))


def render(turns: Sequence[Turn], tokenizer: Any, name: str) -> Rendered:
    """The conversation as text.

    Args:
      turns: the conversation.
      tokenizer: a transformers tokenizer; with `name` empty, one with a chat template.
      name: one of `NAMED`, or empty for the tokenizer's own template.

    Raises:
      BadRecord: for a conversation that the template refuses, or whose answers it changes.
    """
    if name:
        text, spans = "", []
        for part, written in NAMED[name](turns, tokenizer.eos_token or "</s>"):
            if written:
                spans.append((len(text), len(text) + len(part)))
            text += part
        return Rendered(text, spans, bare=True)
    messages = _messages(turns)
    try:
        text = chat_template.apply(messages, tokenizer)
        return Rendered(text, chat_template.answer_spans(text, messages, tokenizer), bare=False)
    except TemplateRefusal as error:
        raise BadRecord(str(error)) from None


def tokens_and_mask(turns: Sequence[Turn], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and the assistant's mask, from a template with {% generation %}.

    Raises:
      BadRecord: for a conversation that the template refuses.
    """
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    try:
        out = chat_template.apply(_messages(turns), tokenizer, **options)
    except TemplateRefusal as error:
        raise BadRecord(str(error)) from None
    return out["input_ids"], out["assistant_masks"]


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]
