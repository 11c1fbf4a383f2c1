"""A small trained target with a tokenizer: the golden tiny-gqa with bytes as tokens."""

import pathlib
import shutil
from types import SimpleNamespace

import pytest

from kangaroo_jax.checkpoint.huggingface import load_target

from .tokens import byte_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"


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
def target_with():
    """What making tokens needs of a target, with any tokenizer."""

    def change(tokenizer, vocab_size=2000):
        config = SimpleNamespace(vocab_size=vocab_size)
        return SimpleNamespace(config=config, tokenizer=tokenizer, name="test target", eos_token_ids=(257,))

    return change
