"""Greedy tokens against transformers' `generate` (torch): stored for the demo, live for random models."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kangaroo_jax import DraftConfig, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import save_target
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel
from tests.decode.models import CONFIG

STORED = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "hf_generate.json").read_text())


@pytest.fixture(scope="module")
def demo_pair():
    target = load_target(str(demo.MODEL), "float32")
    return target, load_adapter(str(demo.ADAPTER), target)


@pytest.mark.parametrize("index", [0, *(pytest.param(i, marks=pytest.mark.long) for i in range(1, len(STORED)))])
def test_demo_equals_transformers(demo_pair, index):
    record = STORED[index]
    target, adapter = demo_pair
    count = len(record["new_ids"])
    draft = DraftConfig(None, 2, 0.3) if index else adapter.draft  # more takes longer to compile
    out = generate(target, adapter, [record["prompt"]], count, draft)
    assert out.tokens[0] == record["new_ids"]
    assert generate_plain(target, [record["prompt_ids"]], count).tokens[0] == record["new_ids"]


@pytest.mark.long
@pytest.mark.parametrize(("seed", "tied"), [(0, False), (1, True), (2, False)])
def test_random_models_equal_transformers(tmp_path, seed, tied):
    torch = pytest.importorskip("torch", reason="compares with transformers on torch, which is not installed")
    from transformers import AutoModelForCausalLM

    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, num_key_value_heads=1 + seed % 2)
    model = TargetModel(config, rngs=nnx.Rngs(seed))
    model = jax.tree.map(lambda x: x * 8 if x.ndim > 1 else x, model)  # so that greedy text wanders
    save_target(model, tmp_path, jnp.float32)
    target = load_target(str(tmp_path), "float32")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = [(7 * i + seed) % config.vocab_size for i in range(20)]
    tokens = torch.tensor([prompt])
    theirs = peer.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, do_sample=False, pad_token_id=0
    )
    expected = theirs[0, len(prompt) :].tolist()
    assert len(set(expected)) > 5
    assert generate_plain(target, [prompt], 60).tokens[0] == expected
    adapter = TrainedAdapter(Adapter(config, rngs=nnx.Rngs(seed)), 2, "tiny", None)
    assert generate(target, adapter, [prompt], 60, DraftConfig(None, 3, 0.1)).tokens[0] == expected
