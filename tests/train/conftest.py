"""A small trained target with a tokenizer: the golden tiny-gqa with bytes as tokens. And tokens from files of a test's
own."""

import dataclasses
import pathlib
import shutil
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.huggingface import load_target

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"


def byte_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """Token id = byte; 256 is BOS and 257 EOS, as the golden targets were trained. `special` tokens follow."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet: these stand for themselves
    moved = [byte for byte in range(256) if byte not in kept]
    vocabulary = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=list(special)
    )


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "tiny-gqa"
    shutil.copytree(GOLDEN / "tiny-gqa", folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(target_folder):
    return load_target(str(target_folder), "float32")


@pytest.fixture(scope="session")
def target_with(target):
    """The target with another tokenizer, in a vocabulary that is large enough for it."""

    def change(tokenizer, vocab_size=2000):
        config = dataclasses.replace(target.config, vocab_size=vocab_size)
        return SimpleNamespace(config=config, tokenizer=tokenizer, name="test target", eos_token_ids=(257,))

    return change
