"""A small trained target with a tokenizer: the golden tiny-gqa with bytes as tokens."""

import pathlib
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.huggingface import load_target

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token id = byte; 256 is BOS and 257 EOS, as the golden targets were trained."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's byte alphabet: these stand for themselves
    moved = [byte for byte in range(256) if byte not in kept]
    vocabulary = {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "tiny-gqa"
    shutil.copytree(GOLDEN / "tiny-gqa", folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(target_folder):
    return load_target(str(target_folder), "float32")
