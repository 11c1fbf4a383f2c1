"""Kangaroo on a target with int8 weights gives the tokens of plain decoding on it."""

import jax
import numpy as np
import pytest

from kangaroo_jax import DraftConfig, TreeConfig, generate, generate_plain
from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.model import ops
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

EXIT_LAYER = 2


@pytest.fixture(scope="module")
def int8_target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "tiny"
    save_target(tiny_target().model, folder, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "_BLOCK", 1500)  # the matrices are small: two blocks of the MLP's first, and a rest
        yield load_target(folder, "float32", weights="int8")


@pytest.mark.long
@pytest.mark.parametrize("tree", [None, TreeConfig(3, 9)], ids=["sequence", "tree"])
def test_tokens_equal_plain_decoding_of_the_int8_target(tree, int8_target):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in rng.integers(1, 40, 16)]
    plain = generate_plain(int8_target, prompts, 40, eos_token_ids=[]).tokens
    accepted = []
    for threshold in (0.0, 0.1, 0.4):
        draft = DraftConfig(EXIT_LAYER, 4, threshold, tree)
        out = generate(int8_target, tiny_adapter(EXIT_LAYER), prompts, 40, draft, eos_token_ids=[])
        assert out.tokens == plain
        accepted += [length for lengths in out.accept_lengths for length in lengths]
    assert np.mean(accepted) > 1.2  # drafts are taken
    assert plain != generate_plain(tiny_target(), prompts, 40, eos_token_ids=[]).tokens
    assert any(x.dtype == np.int8 for x in jax.tree.leaves(int8_target.model))
