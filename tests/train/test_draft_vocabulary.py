"""The draft vocabulary from training data to drafts: as a command, with the demo."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import DraftConfig, InputError, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.checkpoint.adapter import DRAFT_VOCABULARY, save_adapter, write_draft_vocabulary
from kangaroo_jax.data.cache import open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.records import find_sources
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.train.draft_vocabulary import choose, count_tokens


def run(*flags):
    command = [sys.executable, "-m", "kangaroo_jax.cli.draft_vocabulary", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_most_frequent_tokens_are_drafted(tmp_path):
    adapter = shutil.copytree(demo.ADAPTER, tmp_path / "adapter")
    text = "def f(self):\n    return self.value\n" * 50 + "import os\n"
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    files = {"model": demo.MODEL, "adapter": adapter, "files": tmp_path / "data.jsonl", "cache": tmp_path / "cache"}
    flags = [f"--{name}={value}" for name, value in files.items()]
    done = run(*flags, "--size=12")
    assert done.returncode == 0, done.stderr
    target = load_target(str(demo.MODEL), "float32")
    ids = np.load(adapter / DRAFT_VOCABULARY)
    followers = target.tokenizer.encode(text)[1:]
    frequent = {token for token in set(followers) if followers.count(token) >= 50}
    assert frequent | set(target.eos_token_ids) <= set(ids.tolist())
    assert len(ids) == len(set(ids.tolist())) == 12
    # In use: other drafts, the same tokens.
    prompt = ["class A:\n    def f(self):\n        return self.value\n\n    def g(self):\n"]
    small = load_adapter(adapter, target)
    out = generate(target, small, prompt, 24, DraftConfig(None, 2, 0.0))
    assert out.tokens == generate_plain(target, prompt, 24).tokens
    too_many = run(*flags, "--size=4096")
    assert too_many.returncode == 2
    assert too_many.stderr.strip().splitlines()[-1].startswith("draft_vocabulary: error: size: expected")


def test_the_most_frequent_tokens_of_the_data_are_what_loads(small_target_folder, tmp_path):
    """The test above without the command and its decoding, with a target whose tokens are bytes."""
    target = load_target(small_target_folder, "float32")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, jax.jit(lambda: Adapter(target.config, rngs=nnx.Rngs(3)))(), exit_layer=1, target=target)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "abcabcab d" * 20 + "e"}) + "\n")
    sources = find_sources(str(tmp_path / "data.jsonl"))
    cache = open_cache(tmp_path / "cache", sources, Encoder(target, ""), 0.0, quiet=True)
    counts = count_tokens(cache, target.config.vocab_size)
    assert {chr(token): int(counts[token]) for token in np.flatnonzero(counts[:256])} == {
        "a": 59,  # the first follows nothing
        "b": 60,
        "c": 40,
        " ": 20,
        "d": 20,
        "e": 1,
    }
    ids = choose(counts, len(target.eos_token_ids) + 4, target.eos_token_ids)
    assert {*map(ord, "abc "), *target.eos_token_ids} == set(ids.tolist())
    write_draft_vocabulary(adapter, ids)
    assert np.array_equal(load_adapter(adapter, target).model.draft_vocabulary.token_ids[...], ids)


def test_tokens_that_end_a_text_are_always_in():
    counts = np.asarray([5, 0, 7, 7, 1])
    assert choose(counts, 3, (1,)).tolist() == [1, 2, 3]
    assert choose(counts, 2, (1,)).tolist() == [1, 2]
    with pytest.raises(InputError, match="size"):
        choose(counts, 5, (1,))


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"junk", "not a NumPy array"),
        (np.asarray([1, 5000]), "token id 5000 is outside the vocabulary of 4096"),
        (np.asarray([1, 1]), "twice"),
        (np.asarray([0.5]), "expected a list of token ids"),
        (np.zeros((0,), np.int32), "expected a list of token ids"),
    ],
    ids=["junk", "outside", "twice", "floats", "empty"],
)
def test_a_file_that_is_wrong_is_named(tmp_path, contents, what):
    adapter = shutil.copytree(demo.ADAPTER, tmp_path / "adapter")
    if isinstance(contents, bytes):
        (adapter / DRAFT_VOCABULARY).write_bytes(contents)
    else:
        np.save(adapter / DRAFT_VOCABULARY, contents)
    with pytest.raises(InputError, match=what):
        load_adapter(adapter, load_target(str(demo.MODEL), "float32"))
