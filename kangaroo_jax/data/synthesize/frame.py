"""What a chat template puts around the turns of a conversation, so that a target can write both sides of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from jinja2.exceptions import TemplateError

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.data import chat
from kangaroo_jax.data.records import BadRecord, Turn
from kangaroo_jax.engine.shapes import MAX_EOS
from kangaroo_jax.errors import InputError

# Private-use characters, which no template contains, in place of what the turns say.
_STANDIN = "\ue0f4\ue0f5{}\ue0f6"


@dataclasses.dataclass(frozen=True)
class Frame:
    """The text around the turns.

    Attributes:
      opening: before the first user's text.
      to_answer: from the end of a user's text to where the answer begins.
      to_next: from the end of an answer to where the next user's text begins; None where the template takes one turn.
      bare: whether the tokenizer still has to add its special tokens (BOS).
      turn_ends: token ids that end a user's turn.
      turn_stop: strings that do.
      special: all ids of special tokens: one within a user's turn is none of its text.
    """

    opening: str
    to_answer: str
    to_next: str | None
    bare: bool
    turn_ends: tuple[int, ...]
    turn_stop: tuple[str, ...]
    special: frozenset[int]


def find_frame(target: Target, template: str = "") -> Frame:
    """The frame that a target's template, or one of `chat.NAMED`, gives.

    Raises:
      InputError: for a target without a tokenizer or a template, or a template that does not show the user's text.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
    if not template and not tokenizer.chat_template:
        raise InputError(
            f"{target.name}: has no chat template, so it is not known how a user's turn begins; name the one that it "
            f"was tuned with ({', '.join(chat.NAMED)}), or let it continue texts"
        )
    user, answer, more = (_STANDIN.format(i) for i in range(3))
    try:
        opening, to_answer = _between(target, template, [Turn("user", user)], [user])
        try:
            turns = [Turn("user", user), Turn("assistant", answer), Turn("user", more)]
            _, _, to_next, _ = _between(target, template, turns, [user, answer, more])
        except BadRecord:
            to_next = None
    except BadRecord as error:
        raise InputError(f"{target.name}: {error}; name another with a template of chat.NAMED") from None
    special = frozenset(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)
    first = encode(tokenizer, to_answer.lstrip())[:1]
    ends = dict.fromkeys([*target.eos_token_ids, *(id for id in first if id in special)])
    stop = () if first and first[0] in special else (to_answer.strip(),)
    if not to_answer.strip():
        stop = ()
    return Frame(
        opening=opening,
        to_answer=to_answer,
        to_next=to_next,
        bare=bool(template),
        turn_ends=tuple(ends)[:MAX_EOS],
        turn_stop=stop,
        special=special,
    )


def encode(tokenizer: Any, text: str, bare: bool = False) -> list[int]:
    """Token ids of a piece of a conversation. `bare`: the tokenizer adds its special tokens."""
    return tokenizer.encode(text, add_special_tokens=bare, verbose=False) if text else []


def render(target: Target, template: str, turns: list[Turn]) -> str:
    """The conversation up to where the assistant's next turn begins. The one place here that applies a template.

    Raises:
      BadRecord: for a conversation that the template refuses.
    """
    if template:
        answer = _STANDIN.format("answer")
        text = chat.render([*turns, Turn("assistant", answer)], target.tokenizer, template).text
        return text.partition(answer)[0]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    try:
        return target.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        raise BadRecord(f"the chat template refuses a conversation ({error})") from None


def _between(target: Target, template: str, turns: list[Turn], texts: list[str]) -> list[str]:
    """What is before, between and after `texts`."""
    rest, pieces = render(target, template, turns), []
    for text in texts:
        before, found, rest = rest.partition(text)
        if not found:
            raise BadRecord("the chat template leaves out or changes what the user says")
        pieces.append(before)
    return [*pieces, rest]
