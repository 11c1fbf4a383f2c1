"""Text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are not a complete character yet
_MAX_BYTES = 4  # of a character in UTF-8, and so the most tokens that it can be made of


class TextStream:
    """Turns one sequence's tokens into pieces of text that never need taking back.

    A character whose bytes are not all there, and the start of what may become a stop string, are held until they are
    decided. Each token is decoded a bounded number of times: text is settled up to a token, and what comes after is
    decoded behind the tokens just before it. For a tokenizer may join tokens, and many leave out a space at the
    beginning of what they decode: the text of an answer is what decoding prompt and answer together adds to the prompt.

    Args:
      tokenizer: of transformers.
      stop: strings that end the text.
      prompt: token ids that stand before the sequence.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        # Tokens that new ones may be decoded behind, and their text; the first that can be is used.
        self._contexts: list[tuple[list[int], str]] = [*self._end_of(prompt), ([], "")]
        self._settled = ""  # text
        self._pending: list[int] = []  # tokens whose text is not settled
        self._sent = 0  # characters
        self.text = ""  # all of it so far, cut before a stop string
        self.num_tokens = 0  # tokens that belong to the sequence; with a stop string, up to the one that completed it
        self.stopped = False

    def feed(self, tokens: Sequence[int], final: bool) -> str:
        """Takes the tokens that are new; returns the text that is new and decided. `final` says that no more will
        come."""
        if self.stopped:
            return ""
        if not self._take(tokens):
            for token in tokens:
                self._take([token])
                if self.stopped:
                    break
        end = len(self.text) if final or self.stopped else self._decided()
        piece, self._sent = self.text[self._sent : end], max(end, self._sent)
        return piece

    def preview(self, tokens: Sequence[int]) -> str:
        """The text that tokens would add, special tokens included. Changes nothing."""
        before, _ = self._decode_behind(self._pending, skip_special_tokens=False)
        after, _ = self._decode_behind([*self._pending, *tokens], skip_special_tokens=False)
        return after[len(before.rstrip(_INCOMPLETE)) :]

    def _take(self, tokens: Sequence[int]) -> bool:
        """Takes all the tokens, if their text is one that ends with the last of them; else returns False, and they are
        to be taken one at a time: a decoder may turn a complete character into an incomplete one for the bytes that
        follow it, and a stop string ends the sequence within them."""
        while True:
            pending = [*self._pending, *tokens]
            fresh, context = self._decode_behind(pending)
            text = self._settled + fresh
            # A stop string that ends in the new text begins at most its own length before it.
            stop = self._find_stop(text, max(0, len(self._settled) - self._longest_stop))
            if len(tokens) > 1 and (stop is not None or _INCOMPLETE in fresh):
                return False
            self._pending = pending
            self.num_tokens += len(tokens)
            self.text = text if stop is None else text[:stop]
            self.stopped = stop is not None
            if fresh and not fresh.endswith(_INCOMPLETE):
                self._settle(len(pending), fresh, context)
            elif len(pending) > _MAX_BYTES and not fresh.rstrip(_INCOMPLETE):
                # The first token begins no character. What follows it may.
                self._settle(1, self._decode(pending[:1]), context)
                tokens = ()
                continue
            return True

    def _settle(self, count: int, text: str, context: tuple[list[int], str]) -> None:
        """`text` is that of the first `count` pending tokens, whatever comes."""
        tokens, self._pending = self._pending[:count], self._pending[count:]
        self._settled += text
        own = self._decode(tokens)
        if own and _INCOMPLETE not in own:
            # The context of these tokens may serve once more: where a decoder looks at bytes together, a character's
            # are no context for the bytes that follow.
            self._contexts = [(tokens, own), context, ([], "")]

    def _decode_behind(
        self, tokens: Sequence[int], skip_special_tokens: bool = True
    ) -> tuple[str, tuple[list[int], str]]:
        """The text that tokens add to the first context whose own text they do not change, and that context."""
        for context in self._contexts:
            text = self._decode([*context[0], *tokens], skip_special_tokens)
            if text.startswith(context[1]):
                return text[len(context[1]) :], context
        raise AssertionError("the last context is empty")

    def _end_of(self, prompt: Sequence[int]) -> list[tuple[list[int], str]]:
        """A few tokens at a prompt's end that have a text, with it; none if its last character is incomplete."""
        count = 1
        while count < 2 * len(prompt):
            tokens = list(prompt[-count:])
            text = self._decode(tokens)
            if text and not text.endswith(_INCOMPLETE):
                return [(tokens, text)]
            count *= 2
        return []

    def _decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(
            tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def _find_stop(self, text: str, start: int) -> int | None:
        places = [place for place in (text.find(string, start) for string in self._stop) if place >= 0]
        return min(places, default=None)

    def _decided(self) -> int:
        complete = self._settled + self.text[len(self._settled) :].rstrip(_INCOMPLETE)
        held = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(complete)), 0, -1):
                if complete.endswith(string[:length]):
                    held = max(held, length)
                    break
        return len(complete) - held
