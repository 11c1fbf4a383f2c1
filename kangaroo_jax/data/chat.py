"""Chat templates: turn a conversation into text, and find the characters that the assistant wrote.

The tokenizer's own template (transformers' `apply_chat_template`) where it has one, or one of `NAMED`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError

from kangaroo_jax.data.records import BadRecord, Turn

Span = tuple[int, int]  # characters [start, end)
_Part = tuple[str, bool]  # text, and whether the assistant wrote it

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Private-use characters, which no template contains.
_STANDIN = "\ue0f1\ue0f2{}\ue0f3"


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
    text = _apply(turns, tokenizer)
    return Rendered(text, _find(text, turns, tokenizer), bare=False)


def tokens_and_mask(turns: Sequence[Turn], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and the assistant's mask, from a template with {% generation %}.

    Raises:
      BadRecord: for a conversation that the template refuses.
    """
    out = _apply(turns, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return out["input_ids"], out["assistant_masks"]


def _apply(turns: Sequence[Turn], tokenizer: Any, **options: Any) -> Any:
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, **{"tokenize": False} | options)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRecord(f"the chat template refuses it ({error})") from None


def _find(text: str, turns: Sequence[Turn], tokenizer: Any) -> list[Span]:
    """Where the assistant's texts are in `text`.

    A plain search would find a short answer such as "yes" in the wrong place. So the template is applied again to the
    same conversation with a placeholder for each answer, which gives the text between the answers. `text` must be that
    text with the answers in place of the placeholders, each unchanged or without white space at its ends.
    """
    replaced, answers = [], []
    for turn in turns:
        if turn.role == "assistant":
            replaced.append(turn._replace(text=_STANDIN.format(len(answers))))
            answers.append(turn.text)
        else:
            replaced.append(turn)
    rest, position, spans = _apply(replaced, tokenizer), 0, []
    for number, answer in enumerate(answers):
        before, found, rest = rest.partition(_STANDIN.format(number))
        if not found or not text.startswith(before, position):
            raise BadRecord(f"the chat template leaves out or changes answer {number} or what stands before it")
        position += len(before)
        between = rest.partition(_STANDIN.format(number + 1))[0]
        for given in (answer, answer.rstrip(), answer.lstrip(), answer.strip()):
            if text.startswith(given + between, position):
                break
        else:
            raise BadRecord(f"the chat template leaves out or changes answer {number}")
        spans.append((position, position + len(given)))
        position += len(given)
    if text[position:] != rest:
        raise BadRecord("the chat template leaves out or changes an answer")
    return spans
