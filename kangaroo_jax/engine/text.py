"""Text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"  # what a decoder makes of bytes that are not a complete character yet


class TextStream:
    """Turns one sequence's tokens into pieces of text that never need taking back.

    A character whose bytes are not all there, and the start of what may become a stop string, are held until they are
    decided. Each token is decoded a bounded number of times: text is settled up to a token, and what comes after is
    decoded together with the tokens just before it, as a tokenizer may join them.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._before = self._settled = 0  # tokens: the first that is decoded again, and the first that is not settled
        self._overlap = 0  # characters of the tokens between these two
        self._settled_text = ""  # of all tokens before `_settled`
        self._sent = 0  # characters
        self.text = ""  # all of it so far, cut before a stop string
        self.num_tokens = 0  # tokens that belong to the sequence; with a stop string, up to the one that completed it
        self.stopped = False

    def feed(self, tokens: Sequence[int], final: bool) -> str:
        """Takes the tokens that are new; returns the text that is new and decided. `final` says that no more will
        come."""
        if self.stopped:
            return ""
        old_count, old_length = len(self._tokens), len(self.text)
        self._tokens += tokens
        self.num_tokens = len(self._tokens)
        fresh = self._decode(self._tokens[self._before :])[self._overlap :]
        self.text = self._settled_text + fresh
        # A stop string that ends in the new text begins at most its own length before it; characters that were
        # incomplete may have changed.
        start = max(0, min(old_length, len(self._settled_text)) - max(map(len, self._stop), default=0))
        if self._find_stop(self.text, start) is not None:
            self._cut(old_count, start)
        elif not fresh.endswith(_INCOMPLETE) and fresh:
            self._before, self._settled = self._settled, len(self._tokens)
            self._overlap = len(self._decode(self._tokens[self._before : self._settled]))
            self._settled_text = self.text
        end = len(self.text) if final or self.stopped else self._decided()
        piece, self._sent = self.text[self._sent : end], max(end, self._sent)
        return piece

    def _cut(self, first: int, start: int) -> None:
        """Ends the sequence with the fewest tokens whose text holds a stop string: one of the new ones, or the one
        before, whose last character was incomplete."""
        for count in range(max(first, 1), len(self._tokens) + 1):
            text = self._settled_text + self._decode(self._tokens[self._before : count])[self._overlap :]
            place = self._find_stop(text, start)
            if place is not None:
                self.num_tokens, self.text, self.stopped = count, text[:place], True
                return

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _find_stop(self, text: str, start: int) -> int | None:
        places = [place for place in (text.find(string, start) for string in self._stop) if place >= 0]
        return min(places, default=None)

    def _decided(self) -> int:
        complete = self.text.rstrip(_INCOMPLETE)
        held = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(complete)), 0, -1):
                if complete.endswith(string[:length]):
                    held = max(held, length)
                    break
        return len(complete) - held
