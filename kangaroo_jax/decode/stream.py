"""Text as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Turns one sequence's growing list of tokens into pieces of text that never need taking back.

    A character whose bytes are not all there, and the start of what may become a stop string, are held until they
    are decided.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._sent = 0
        self.text = ""  # all of it so far, cut before a stop string
        self.num_tokens = 0  # tokens that belong to the sequence; with a stop string, up to the one that completed it
        self.stopped = False

    def feed(self, tokens: list[int], final: bool) -> str:
        """Takes all tokens so far; returns the text that is new and decided. `final` says that no more will come."""
        if self.stopped:
            return ""
        self.text, self.num_tokens = self._decode(tokens), len(tokens)
        if self._find_stop(self.text) is not None:
            # The fewest tokens whose text holds a stop string: they came in one chunk, of which only these count.
            self.num_tokens = next(
                n for n in range(len(tokens) + 1) if self._find_stop(self._decode(tokens[:n])) is not None
            )
            text = self._decode(tokens[: self.num_tokens])
            self.text, self.stopped = text[: self._find_stop(text)], True
        end = len(self.text) if final or self.stopped else self._decided()
        piece, self._sent = self.text[self._sent : end], max(end, self._sent)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _find_stop(self, text: str) -> int | None:
        places = [place for place in (text.find(string) for string in self._stop) if place >= 0]
        return min(places, default=None)

    def _decided(self) -> int:
        whole = self.text.rstrip("\ufffd")
        held = 0
        for string in self._stop:
            for length in range(min(len(string) - 1, len(whole)), 0, -1):
                if whole.endswith(string[:length]):
                    held = max(held, length)
                    break
        return len(whole) - held
