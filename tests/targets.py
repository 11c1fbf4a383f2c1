"""Small targets with a tokenizer, as fixtures: a trained one, the golden tiny-gqa with bytes as tokens, and random
ones."""

import pathlib
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.checkpoint.tokenizer import end_tokens
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.target import TargetModel
from tests.tokens import byte_tokenizer

GOLDEN = pathlib.Path(__file__).parent / "fixtures" / "golden"


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
        ends = end_tokens((257,), tokenizer, vocab_size)
        return SimpleNamespace(config=config, tokenizer=tokenizer, name="test target", eos_token_ids=ends)

    return change


@pytest.fixture(scope="session")
def small_target_folder(tmp_path_factory):
    """Two random layers: quick to compile for many devices, whose numbers divide all its dimensions."""
    config = ModelConfig(
        model_type="llama",
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        eos_token_ids=(257,),
    )
    folder = tmp_path_factory.mktemp("target") / "small"
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: TargetModel(config, rngs=nnx.Rngs(0)))
    model = jax.tree.map(lambda x: jnp.asarray(rng.normal(float(x.ndim == 1), 0.2, x.shape), jnp.float32), abstract)
    save_target(model, folder, jnp.float32)
    byte_tokenizer().save_pretrained(folder)
    return folder
