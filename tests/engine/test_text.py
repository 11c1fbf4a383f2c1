"""Streamed text against the text of all tokens at once, with characters split over tokens and stop strings split
over chunks. Truth: the bytes themselves, and what the tokenizer decodes prompt and answer together to."""

import functools

import numpy as np
import pytest

from kangaroo_jax.engine.text import TextStream
from tests.data.test_chat import byte_level
from tests.tokens import byte_tokenizer, sentencepiece_tokenizer


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


# --- Tokenizers that look at tokens together.

TOKENIZERS = {"bytes": byte_tokenizer, "byte-level": byte_level, "sentencepiece": sentencepiece_tokenizer}
SMILE = "\U0001f642"


@functools.cache
def tokenizer_of(kind):
    return TOKENIZERS[kind]()


def fed(streamer, tokens, chunk):
    """The text that is given out for tokens in chunks of a size, checked to be the stream's."""
    chunks = [tokens[start : start + chunk] for start in range(0, len(tokens), chunk)]
    pieces = [streamer.feed(each, final=i == len(chunks) - 1) for i, each in enumerate(chunks)]
    assert "".join(pieces) == streamer.text
    return streamer.text


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_text_is_what_the_answer_adds_to_the_prompt(kind, chunk):
    """Its first space too, which a tokenizer as Llama-2's leaves out of what it decodes alone."""
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode(
        "the sky  is blue \u00e9" + SMILE * 3 + " so\n\nyes " + SMILE + "!", add_special_tokens=False
    )
    whole = tokenizer.decode(ids)
    for place in range(1, len(ids)):
        before = tokenizer.decode(ids[:place])
        if "\ufffd" not in before:
            added = fed(TextStream(tokenizer, (), ids[:place]), ids[place:], chunk)
            assert before + added == whole, place


@pytest.mark.parametrize("chunk", [1, 2, 5, 100])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_limit_within_a_character_takes_nothing_back(kind, chunk):
    tokenizer = tokenizer_of(kind)
    prompt = tokenizer.encode("x", add_special_tokens=False)
    smile = tokenizer.encode("x" + SMILE, add_special_tokens=False)[len(prompt) :]
    for limit in range(1, 3 * len(smile)):
        text = fed(TextStream(tokenizer, (), prompt), (smile * 3)[:limit], chunk)
        assert text.rstrip("\ufffd") == SMILE * (limit // len(smile))
        assert text.endswith("\ufffd") == (limit % len(smile) > 0)


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_byte_that_begins_no_character_does_not_spoil_what_follows(kind, chunk):
    tokenizer = tokenizer_of(kind)
    first = tokenizer.convert_tokens_to_ids("<0x00>") if kind == "sentencepiece" else 0
    tokens = [first + byte for byte in b"\x80" + SMILE.encode() * 2]
    assert fed(TextStream(tokenizer), tokens, chunk) == "\ufffd" + SMILE * 2


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_stop_string_is_found_before_the_bytes_of_another_character(kind, chunk):
    tokenizer = tokenizer_of(kind)
    smile = tokenizer.encode("x" + SMILE, add_special_tokens=False)
    streamer = TextStream(tokenizer, [SMILE])
    assert fed(streamer, [*smile, *smile[1:2], *smile], chunk) == "x"
    assert streamer.stopped
    assert streamer.num_tokens == len(smile)


def test_any_number_of_tokens_without_text():
    tokenizer = tokenizer_of("sentencepiece")
    tokens = [tokenizer.eos_token_id] * 1200 + tokenizer.encode("x" + SMILE, add_special_tokens=False)
    assert fed(TextStream(tokenizer), tokens, len(tokens)).strip() == "x" + SMILE


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_any_tokens_in_any_chunks_have_one_text(kind):
    """Also tokens that no text is made of."""
    tokenizer, rng = tokenizer_of(kind), np.random.default_rng(0)
    for _ in range(60):
        tokens = rng.integers(0, len(tokenizer), rng.integers(1, 40)).tolist()
        prompt = rng.integers(0, len(tokenizer), rng.integers(0, 5)).tolist()
        texts = {fed(TextStream(tokenizer, (), prompt), tokens, chunk) for chunk in (1, 2, 7, 100)}
        assert len(texts) == 1, (prompt, tokens)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_preview_is_the_text_that_tokens_would_add(kind):
    tokenizer = tokenizer_of(kind)
    ids = tokenizer.encode("a sky " + SMILE + " is blue", add_special_tokens=False)
    for place in range(1, len(ids)):
        streamer = TextStream(tokenizer)
        before = fed(streamer, ids[:place], 3).rstrip("\ufffd")
        assert before + streamer.preview(ids[place:]) == tokenizer.decode(ids)
        assert before + streamer.preview(ids[place:]) == tokenizer.decode(ids)  # changes nothing
    assert TextStream(tokenizer).preview([tokenizer.eos_token_id]) == tokenizer.eos_token
