"""What a chat template puts around the turns of a conversation, so that a target can write both sides of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from kangaroo_jax.checkpoint import chat_template
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.data import chat
from kangaroo_jax.data.records import BadRecord, Turn
from kangaroo_jax.engine.shapes import MAX_EOS
from kangaroo_jax.errors import InputError

# Private-use characters, which no template contains, in place of what the turns say.
_STANDIN = "\ue0f4\ue0f5{}\ue0f6"
_BROKEN = "\ufffd"  # a part of a character


@dataclasses.dataclass(frozen=True)
class Frame:
    """The text around the turns. Where the target is to go on, it has no space at its end: the tokenizer joins spaces
    with what follows.

    Attributes:
      opening: before the first user's text.
      spaced_opening: whether a space was left off before it.
      to_answer: from the end of a user's text to where the answer begins.
      to_next: from the end of an answer to where the next user's text begins; None where the template takes one turn.
      spaced_answer: whether a space was left off before the answer.
      spaced_next: whether a space was left off before the next user's text.
      turn_ends: token ids that end a user's turn.
      turn_stop: strings that do.
      special: all special tokens, id -> text.
    """

    opening: str
    spaced_opening: bool
    to_answer: str
    to_next: str | None
    spaced_answer: bool
    spaced_next: bool
    turn_ends: tuple[int, ...]
    turn_stop: tuple[str, ...]
    special: Mapping[int, str]

    def is_text(self, text: str, tokens: Sequence[int] = ()) -> bool:
        """Whether a text, and the tokens it was written with, have neither special tokens nor halves of characters."""
        return not (
            _BROKEN in text
            or any(token in self.special for token in tokens)
            or any(special in text for special in self.special.values())
        )


class Template:
    """A target's chat template, or one of `chat.NAMED`: the one place here that applies it.

    Args:
      target: with a tokenizer.
      name: as `data.template` names it; empty for the tokenizer's own.

    Raises:
      InputError: for a target without a tokenizer or a template.
    """

    def __init__(self, target: Target, name: str):
        self.target, self.name = target, name
        if target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
        if not name and not target.tokenizer.chat_template:
            raise InputError(
                f"{target.name}: has no chat template, so it is not known how a user's turn begins; name the one that "
                f"it was tuned with (template: {', '.join(chat.NAMED)}), or give texts for it to continue"
            )

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins. Raises `BadRecord` if the template refuses it."""
        if self.name:
            return self._encode(self._text(turns).rstrip(" "))
        try:
            return chat_template.prompt_ids(_messages(turns), self.target.tokenizer)
        except chat_template.TemplateRefusal as error:
            raise BadRecord(str(error)) from None

    def opening_ids(self, frame: Frame, text: str = "") -> list[int]:
        """Token ids of what stands before the first user's text, and of `text`, the beginning of that."""
        space = " " if text and frame.spaced_opening else ""
        return self._encode(frame.opening + space + text)

    def frame(self) -> Frame:
        """What it puts around the turns.

        Raises:
          InputError: for a template that does not show what the user says.
        """
        user, answer, more = (_STANDIN.format(i) for i in range(3))
        try:
            opening, to_answer = self._around([Turn("user", user)])
        except BadRecord as error:
            raise InputError(f"{self.target.name}: {error}; name another template") from None
        try:
            _, _, to_next, _ = self._around([Turn("user", user), Turn("assistant", answer), Turn("user", more)])
        except BadRecord:
            to_next = None
        tokenizer = self.target.tokenizer
        special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        mark = to_answer.strip()
        first = encode(tokenizer, mark)[:1]
        marked = bool(first) and first[0] in special
        ends = dict.fromkeys([*self.target.eos_token_ids, *(first if marked else [])])
        return Frame(
            opening=opening.rstrip(" "),
            spaced_opening=opening.endswith(" "),
            to_answer=to_answer.rstrip(" ") if self.name else to_answer,
            to_next=None if to_next is None else to_next.rstrip(" "),
            spaced_answer=bool(self.name) and to_answer.endswith(" "),
            spaced_next=to_next is not None and to_next.endswith(" "),
            turn_ends=tuple(ends)[:MAX_EOS],
            turn_stop=(mark,) if mark and not marked else (),
            special=special,
        )

    def _text(self, turns: Sequence[Turn]) -> str:
        tokenizer = self.target.tokenizer
        if self.name:
            answer = _STANDIN.format("answer")
            return chat.render([*turns, Turn("assistant", answer)], tokenizer, self.name).text.partition(answer)[0]
        try:
            return chat_template.prompt_text(_messages(turns), tokenizer)
        except chat_template.TemplateRefusal as error:
            raise BadRecord(str(error)) from None

    def _encode(self, text: str) -> list[int]:
        """A beginning as token ids: with a named template, the tokenizer has to add BOS."""
        return encode(self.target.tokenizer, text, special=bool(self.name))

    def _around(self, turns: list[Turn]) -> list[str]:
        """What is before, between and after what the turns say."""
        rest, pieces = self._text(turns), []
        for turn in turns:
            before, found, rest = rest.partition(turn.text)
            if not found:
                raise BadRecord("the chat template leaves out or changes what the user says")
            pieces.append(before)
        return [*pieces, rest]


def _messages(turns: Sequence[Turn]) -> list[chat_template.Message]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids of a piece of text. `special`: with the tokenizer's special tokens around."""
    return tokenizer.encode(text, add_special_tokens=special, verbose=False) if text else []
