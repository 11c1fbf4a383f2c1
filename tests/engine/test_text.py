"""Streamed text against the text of all tokens at once, with characters split over tokens and stop strings split
over chunks. Truth: the bytes themselves."""

import pytest

from kangaroo_jax.engine.text import TextStream


class Bytes:
    """A tokenizer of one byte per token; unfinished characters decode to the replacement character."""

    def decode(self, tokens, **_):
        return bytes(tokens).decode(errors="replace")


def stream(text, stop, chunk):
    tokens = list(text.encode())
    streamer, pieces = TextStream(Bytes(), stop), []
    for start in range(0, len(tokens), chunk):
        pieces.append(streamer.feed(tokens[start : start + chunk], final=start + chunk >= len(tokens)))
    return streamer, pieces


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("text", ["plain", "naïve café 😀😀 done", "ends with 😀", "\n\n  x\n"])
def test_pieces_add_up_and_are_never_taken_back(text, chunk):
    streamer, pieces = stream(text, (), chunk)
    assert "".join(pieces) == text == streamer.text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(
    ("text", "stops", "expected", "tokens"),
    [
        ("one two three", ("two",), "one ", 7),
        ("one two three", ("three", "two t"), "one ", 9),
        ("aab aaab", ("aaab",), "aab ", 8),
        ("ab\n\nclass", ("\n\n",), "ab", 4),
        ("nothing here", ("absent",), "nothing here", 12),
        ("é stop é", (" stop",), "é", 7),
        ("held back to the end st", ("stop",), "held back to the end st", 23),
    ],
)
def test_stop_strings(text, stops, expected, tokens, chunk):
    streamer, pieces = stream(text, stops, chunk)
    assert "".join(pieces) == expected == streamer.text
    assert streamer.num_tokens == tokens
    assert streamer.stopped == (expected != text)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    tokens = list("a😀".encode())[:-1]
    streamer = TextStream(Bytes())
    assert streamer.feed(tokens, final=False) == "a"
    assert streamer.feed([], final=True) == "\ufffd"


class Counting(Bytes):
    """Counts the tokens that are decoded."""

    def __init__(self):
        self.decoded = 0

    def decode(self, tokens, **_):
        self.decoded += len(tokens)
        return super().decode(tokens)


def test_a_stop_string_does_not_make_decoding_quadratic():
    tokenizer = Counting()
    streamer = TextStream(tokenizer, ("stop",))
    tokens = list(("x" * 4000 + "stop").encode())
    for start in range(0, len(tokens), 32):
        streamer.feed(tokens[start : start + 32], final=False)
    assert streamer.stopped
    assert streamer.num_tokens == len(tokens)
    # Each token is decoded a few times, and those of the chunk that holds the stop string once for each of them.
    assert tokenizer.decoded < 4 * len(tokens) + 32 * 64
