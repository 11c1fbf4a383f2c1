"""Tokenizers in a checkpoint's folder: tokenizer.json compared with the tokenizers library, tokenizer.model with
SentencePiece."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from kangaroo_jax import demo
from kangaroo_jax.checkpoint.tokenizer import load_tokenizer
from kangaroo_jax.errors import InputError
from tests.checkpoint.texts import TEXTS, random_texts, train_sentencepiece

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTES]}
_BEGIN = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
}


@pytest.mark.parametrize("post_processor", [None, _BEGIN], ids=["", "begins with a special token"])
@pytest.mark.parametrize("pre_tokenizer", [_BYTES, _DIGITS], ids=["words", "digits"])
@pytest.mark.parametrize(
    "name", ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2TokenizerFast", "PreTrainedTokenizerFast"]
)
def test_tokenizer_json_is_taken_as_it_is_whatever_class_its_config_names(
    name: str, pre_tokenizer, post_processor, tmp_path: pathlib.Path
) -> None:
    stored = json.loads((demo.MODEL / "tokenizer.json").read_text())
    stored |= {"pre_tokenizer": pre_tokenizer} | ({"post_processor": post_processor} if post_processor else {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    config = {"tokenizer_class": name, "unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    expected = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path, 4096)
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text).ids
    assert found.eos_token_id == 0


def write_sentencepiece(folder: pathlib.Path, config: dict[str, object], **settings: object) -> SentencePieceProcessor:
    model = train_sentencepiece(**settings)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"} | config))
    return SentencePieceProcessor(model_proto=model)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    ],
    ids=str,
)
def test_tokenizer_model_gives_the_tokens_of_sentencepiece(settings, tmp_path: pathlib.Path) -> None:
    expected = write_sentencepiece(tmp_path, {}, **settings)
    found = load_tokenizer(tmp_path, 700)
    for text in [*TEXTS, *random_texts(), "ﬁ ① Å", "a\u3000b"]:
        ids = expected.encode(text)
        assert found.encode(text) == [expected.bos_id(), *ids], repr(text)
        assert found.decode(ids) == expected.decode(ids)
    assert (found.bos_token, found.eos_token, found.unk_token) == ("<s>", "</s>", "<unk>")


def test_what_the_config_says_of_a_tokenizer_model_is_heeded(tmp_path: pathlib.Path) -> None:
    config = {"add_bos_token": False, "legacy": False, "chat_template": "{{ messages[0]['content'] }}"}
    expected = write_sentencepiece(tmp_path, config)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<unk>"}))
    found = load_tokenizer(tmp_path, 700)
    assert found.encode("model") == expected.encode("model")
    assert found.eos_token == "<unk>"
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    # Without the space that begins a text.
    bare = [i for i in expected.encode("x model") if i not in expected.encode("x")]
    assert bare
    assert found.encode("model</s>model")[: len(expected.encode("model")) + 1] == [*expected.encode("model"), 2]
    assert found.decode(found.encode("model</s>model")) == "model</s>model"


def refused(folder: pathlib.Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_tokenizer(folder, 700)
    message = str(caught.value)
    assert "\n" not in message
    for word in (str(folder), *words):
        assert word in message, message


def test_what_is_wrong_with_a_tokenizer_model_is_named(tmp_path: pathlib.Path, monkeypatch) -> None:
    write_sentencepiece(tmp_path, {"bos_token": "<begin>"})
    refused(tmp_path, "bos_token '<begin>' is not in tokenizer.model")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "sentencepiece", None)
        refused(tmp_path, "pip install sentencepiece protobuf")
    write_sentencepiece(tmp_path, {}, model_type="unigram")
    refused(tmp_path, "another kind than BPE")
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # tiktoken's, as Llama 3 has it
    refused(tmp_path, "not a SentencePiece model", "tokenizer.json")


def test_a_token_that_was_added_beyond_the_models_vocabulary_is_no_reason_to_refuse(tmp_path: pathlib.Path) -> None:
    shutil.copy(demo.MODEL / "tokenizer.json", tmp_path)
    stored = json.loads((demo.MODEL / "tokenizer.json").read_text())
    padding = stored["added_tokens"][0] | {"id": 4096, "content": "<pad>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": [*stored["added_tokens"], padding]}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    tokenizer = load_tokenizer(tmp_path, 4096)
    assert tokenizer.encode("<pad>") == [4096]
    with pytest.raises(InputError, match="token id 4095, but the model's vocabulary ends at 4094"):
        load_tokenizer(tmp_path, 4095)
