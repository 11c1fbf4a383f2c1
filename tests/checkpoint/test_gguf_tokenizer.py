"""Tokenizers in GGUF files: compared with the tokenizers that they were written from, with SentencePiece, and with
transformers' way of splitting text."""

from __future__ import annotations

import json
import pathlib

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from kangaroo_jax import demo
from kangaroo_jax.checkpoint.gguf_file import GGUFFile
from kangaroo_jax.checkpoint.gguf_tokenizer import gguf_tokenizer
from kangaroo_jax.errors import InputError
from tests.checkpoint.texts import TEXTS, random_texts, train_sentencepiece

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6


def from_metadata(**entries: object):
    """The tokenizer of a file with these entries under tokenizer.ggml."""
    template = {"tokenizer.chat_template": entries.pop("chat_template", None)}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in entries.items() if value is not None}
    return gguf_tokenizer(GGUFFile(pathlib.Path("model.gguf"), metadata | template, {}), 4096)


def byte_level(pre: str = "gpt-2", **entries: object):
    """The demo's tokenizer, whose first token is special, as llama.cpp's converter would write it."""
    stored = json.loads((demo.MODEL / "tokenizer.json").read_text())["model"]
    tokens = sorted(stored["vocab"], key=stored["vocab"].get)
    entries = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [_CONTROL] + [_NORMAL] * (len(tokens) - 1),
        "merges": [" ".join(merge) for merge in stored["merges"]],
        "bos_token_id": 0,
        "eos_token_id": 0,
    } | entries
    return from_metadata(**entries)


def test_byte_level_tokenizer_gives_the_tokens_of_the_one_it_was_written_from() -> None:
    expected = Tokenizer.from_file(str(demo.MODEL / "tokenizer.json"))
    found = byte_level()
    for text in [*TEXTS, "<|endoftext|>x<|endoftext|>"]:
        ids = expected.encode(text).ids
        assert found.encode(text) == ids
        assert found.decode(ids) == text
    assert found.decode([0, 70], skip_special_tokens=True) == expected.decode([70])
    assert found.bos_token_id == found.eos_token_id == 0


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez"])
def test_text_is_split_as_in_transformers(pre: str) -> None:
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    expected = mapping.byte_level_tokenizer({"tokens": ["a", "b"], "merges": []})
    expected = mapping.set_split_regex(expected, {"pre_tokenizer_type": pre}).backend_tokenizer.pre_tokenizer
    found = byte_level(pre).backend_tokenizer.pre_tokenizer
    assert any(len(found.pre_tokenize_str(text)) > 5 for text in TEXTS)
    for text in TEXTS:
        assert found.pre_tokenize_str(text) == expected.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        # By the regular expressions of llama.cpp's src/llama-vocab.cpp.
        ("smollm", ["it", "'s", " ", "2", "0", "2", "3", ",", " x", "7", "\n\n ", " ok"]),
        ("gpt-2", ["it", "'s", " 2023", ",", " x", "7", "\n\n ", " ok"]),
        ("deepseek-v3", ["it", "'s", " ", "202", "3", ",", " x", "7", "\n\n", " ", " ok"]),
    ],
)
def test_text_is_split_as_in_llama_cpp(pre: str, words: list[str]) -> None:
    text = "it's 2023, x7\n\n  ok"
    found = byte_level(pre).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[slice(*where)] for _, where in found] == words


def test_qwen2_composes_characters_as_its_tokenizer_json_does() -> None:
    assert byte_level("qwen2").encode("cafe\u0301") == byte_level("qwen2").encode("café")
    assert byte_level("llama-bpe").encode("cafe\u0301") != byte_level("llama-bpe").encode("café")


def test_a_word_that_is_a_token_needs_no_merges_where_llama_cpp_ignores_them() -> None:
    tokens = ["a", "b", "c", "ab", "abc"]
    entries = {"tokens": tokens, "token_type": None, "merges": ["a b"], "bos_token_id": None, "eos_token_id": None}
    assert byte_level("llama-bpe", **entries).encode("abc") == [4]
    assert byte_level("qwen2", **entries).encode("abc") == [3, 2]


@pytest.mark.parametrize(
    ("pre", "entries", "expected"),
    [
        ("gpt-2", {}, []),
        ("gpt-2", {"add_bos_token": True}, ["bos"]),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, ["bos", "eos"]),
        ("llama-bpe", {}, ["bos"]),
        ("llama-bpe", {"add_bos_token": False}, []),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(pre: str, entries: dict[str, bool], expected: list[str]) -> None:
    types = [_CONTROL, _CONTROL] + [_NORMAL] * 4094
    tokenizer = byte_level(pre, token_type=types, bos_token_id=0, eos_token_id=1, **entries)
    ids = tokenizer.encode("x")
    assert ids[:1] == [0] or "bos" not in expected
    assert ids[-1:] == [1] or "eos" not in expected
    assert len(ids) == 1 + len(expected)
    assert len(tokenizer.encode("x", add_special_tokens=False)) == 1


def test_chat_template_and_special_tokens_of_the_file() -> None:
    types = [_CONTROL, _USER_DEFINED] + [_NORMAL] * 4094
    template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer = byte_level(token_type=types, chat_template=template, padding_token_id=0)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "hi<|endoftext|>"
    assert tokenizer.pad_token_id == 0
    assert [token.special for _, token in sorted(tokenizer.added_tokens_decoder.items())] == [True, False]


@pytest.fixture(scope="module")
def sentencepiece_model():
    return SentencePieceProcessor(model_proto=train_sentencepiece())


def sentencepiece_entries(model) -> dict[str, object]:
    """What llama.cpp's converter writes of a SentencePiece model."""

    def kind(i: int) -> int:
        if model.is_unknown(i):
            return _UNKNOWN
        if model.is_control(i):
            return _CONTROL
        if model.is_byte(i):
            return _BYTE
        return _USER_DEFINED if model.id_to_piece(i) == "<tool>" else _NORMAL

    everything = range(model.vocab_size())
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in everything],
        "scores": [model.get_score(i) for i in everything],
        "token_type": [kind(i) for i in everything],
        "bos_token_id": model.bos_id(),
        "eos_token_id": model.eos_id(),
        "unknown_token_id": model.unk_id(),
    }


def test_sentencepiece_tokenizer_gives_the_tokens_of_sentencepiece(sentencepiece_model) -> None:
    tokenizer = from_metadata(**sentencepiece_entries(sentencepiece_model))
    texts = [*TEXTS, *random_texts(), "a\ufffdb", "▁"]
    for text in texts:
        expected = sentencepiece_model.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False) == expected, text
        assert tokenizer.encode(text) == [sentencepiece_model.bos_id(), *expected]
        assert tokenizer.decode(expected) == sentencepiece_model.decode(expected)


def test_text_after_a_special_token_begins_with_a_space_as_in_llama_cpp(sentencepiece_model) -> None:
    entries = sentencepiece_entries(sentencepiece_model)
    tokenizer = from_metadata(**entries)
    word = sentencepiece_model.encode("model")
    eos = sentencepiece_model.eos_id()
    assert tokenizer.encode("model</s>model", add_special_tokens=False) == [*word, eos, *word]
    bare = from_metadata(**entries, add_space_prefix=False)
    assert bare.encode(" model", add_special_tokens=False) == word
    assert bare.decode(word) == " model"


def refused(words: str, build) -> None:
    with pytest.raises(InputError) as caught:
        build()
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert "\n" not in message
    assert words in message, message


def test_what_is_wrong_with_a_tokenizer_is_named() -> None:
    refused("'bert' is not supported", lambda: from_metadata(model="bert"))
    refused("tokens must be a list", lambda: from_metadata(model="gpt2"))
    refused("pre 'klingon' is not supported; supported: llama-bpe", lambda: byte_level("klingon"))
    refused("pre None is not supported", lambda: byte_level(None))
    refused("merges must be", lambda: byte_level(merges=None))
    refused("could not be read", lambda: byte_level(merges=["nothing like"]))
    refused("token_type must have an entry for each of 4096", lambda: byte_level(token_type=[1, 1, 1]))
    refused("bos_token_id must be one of 4096 tokens, found 4096", lambda: byte_level(bos_token_id=4096))
    refused("scores must have an entry", lambda: from_metadata(model="llama", tokens=["a"]))


def test_a_file_without_a_tokenizer_has_none() -> None:
    assert from_metadata() is None
    assert from_metadata(model="none") is None
