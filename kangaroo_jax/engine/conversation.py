"""A conversation of several turns as prompts, each of which begins with the tokens of the turns before it."""

from __future__ import annotations

from collections.abc import Sequence

from kangaroo_jax.checkpoint import chat_template
from kangaroo_jax.checkpoint.chat_template import Message, TemplateRefusal
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.engine.prompts import encode_prompt, require_template
from kangaroo_jax.errors import InputError


class Conversation:
    """Makes each turn's prompt of the turns before it.

    Where the chat template shows the last answer as it was given, the next prompt begins with the tokens of the last
    prompt and answer, as the model read and wrote them. They are not made of the text again: a tokenizer may split that
    in another way than the model wrote it, and then the model would read an answer that it did not give, and the engine
    could not go on from the keys and values that its slot holds. Where the template changes what it showed before (it
    may leave out an earlier answer's reasoning), the complete conversation is encoded.

    Args:
      target: with a chat template.
      messages: that the conversation begins with.
      max_length: of prompt and answer together; None, or more, means the target's context.

    Raises:
      InputError: for a target that cannot chat, messages of unknown roles, or a user's turn that nothing answers.
    """

    def __init__(self, target: Target, messages: Sequence[Message] = (), max_length: int | None = None):
        require_template(target)
        for i, message in enumerate(messages):
            chat_template.check_message(message, f"message {i}")
        if messages and messages[-1]["role"] == "user":
            raise InputError(
                "the conversation begins with messages that end with a user's turn, which nothing answers; end with an "
                "assistant's or a system turn"
            )
        if messages:  # a template that refuses them refuses every turn
            turn = {"role": "user", "content": "turn"}
            encode_prompt(target, [*messages, turn], 1, max_length, "the conversation")
        self._target = target
        self._beginning = tuple(messages)
        self._max_length = max_length
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but those that the conversation began with."""
        self.messages: list[Message] = list(self._beginning)
        self._text = ""  # of the last prompt
        self._ids: list[int] | None = None  # of the last prompt and its answer; None where they cannot be gone on from

    @property
    def has_turns(self) -> bool:
        """Whether there are turns that `reset` forgets."""
        return len(self.messages) > len(self._beginning)

    def ask(self, text: str) -> list[int]:
        """Adds a user's turn; returns the prompt's token ids.

        Raises:
          InputError: for a turn that the template refuses, or where the conversation has no room for an answer. The
            conversation is as before.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = encode_prompt(self._target, messages, 1, self._max_length, "the conversation")
        rendered = chat_template.prompt_text(messages, self._target.tokenizer)
        if self._ids is not None:
            ids = self._continued(rendered, messages, ids)
            encode_prompt(self._target, ids, 1, self._max_length, "the conversation")  # has room as well
        self.messages, self._text, self._ids = messages, rendered, ids
        return ids

    def answered(self, tokens: Sequence[int], text: str, complete: bool = True) -> None:
        """Adds the answer to the last turn. `complete` says that `text` is that of all the tokens: it is not where a
        stop string was cut off. Without any text the user's turn is taken back too, as nothing was said to it."""
        if not text.strip():
            self.messages = self.messages[:-1]
            self._ids = None
            return
        self.messages = [*self.messages, {"role": "assistant", "content": text.strip()}]
        self._ids = [*self._ids, *tokens] if complete else None

    def _continued(self, rendered: str, messages: Sequence[Message], ids: list[int]) -> list[int]:
        """The tokens of the last prompt and answer, and of what follows them in the complete prompt; the complete
        prompt's own, `ids`, where it does not show the last prompt and answer as they were."""
        tokenizer = self._target.tokenizer
        try:
            start, end = chat_template.answer_spans(rendered, messages, tokenizer, add_generation_prompt=True)[-1]
        except TemplateRefusal:
            return ids
        if rendered[:start].rstrip() != self._text.rstrip():
            return ids
        own, rest = self._ids, rendered[end:]
        if own[-1] in self._target.eos_token_ids:
            # The answer may have the token that ends a turn in the template too. Llama-2 puts a space before it.
            ending = tokenizer.decode([own[-1]])
            if ending and rest.lstrip().startswith(ending):
                rest = rest.lstrip().removeprefix(ending)
            else:
                own = own[:-1]
        new = tokenizer.encode(rest, add_special_tokens=False, verbose=False)
        # Alone it may be encoded in another way, and a special token in the user's text would not be text.
        return own + new if new and ids[-len(new) :] == new else ids
