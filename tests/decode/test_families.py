"""Every family: Kangaroo against plain decoding and against complete forward passes, and an adapter that is trained.

The windows are shorter than the texts, so that drafts, trees and roll-backs cross their edges; and so are the rings
that hold them, of as few positions as rounds need.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import DraftConfig, TreeConfig, generate, generate_plain
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, adapter_from_parameters
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DataConfig, OptimizerConfig, TrainConfig
from kangaroo_jax.engine import shapes
from kangaroo_jax.model import sharding
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.kinds import KINDS
from kangaroo_jax.model.families import all_families, read_config
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply
from kangaroo_jax.train import step as training
from tests.decode.test_lossless import reference
from tests.decode.test_tree import reference as tree_reference

VOCABULARY, LAYERS = 48, 4
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "bos_token_id": None,
    "tie_word_embeddings": False,  # else the likeliest token is often the last one again
}
# What each family has and Llama has not, switched on.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    "mistral": {"sliding_window": 7},
    "ministral": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.8, "attention_multiplier": 0.3},
    "smollm3": {"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 9},
    "olmo2": {},
    "phi3": {
        "sliding_window": 11,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 256,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 4.0]},
    },
    "gemma2": {"sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 20.0},
    "gemma3_text": {"sliding_window": 6, "sliding_window_pattern": 3, "query_pre_attn_scalar": 8},
}
QUICK = "gemma3_text"  # windows, its own rotary in them, norms of all kinds


@pytest.fixture(autouse=True)
def smallest_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_RING_STEP", 1)


def families() -> list[Any]:
    return [pytest.param(name, marks=[] if name == QUICK else [pytest.mark.long]) for name in SETTINGS]


@functools.cache
def target_of(model_type: str) -> Target:
    """As `models.tiny_target`: greedy text that wanders, and drafts that are often right."""
    config = read_config({"model_type": model_type} | _SHAPE | SETTINGS[model_type])
    model = TargetModel(config, rngs=nnx.Rngs(0))
    model = jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, model)
    for layer in model.layers:
        if layer.self_attn.q_norm is not None:
            layer.self_attn.q_norm.weight[...] += 2  # scores that differ
    for layer in list(model.layers)[1:]:
        layer.self_attn.o_proj[...] *= 0.15
        layer.mlp.down_proj[...] *= 0.15
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if not hasattr(layer, "input_layernorm") or hasattr(layer, "post_feedforward_layernorm"):
                norm = getattr(layer, name)  # of what is added
                norm.weight[...] = 0.15 - config.norm_offset + jnp.zeros_like(norm.weight[...])
    return Target(model=model, tokenizer=None, name=model_type, fingerprint=model_type, eos_token_ids=())


@functools.cache
def adapter_of(model_type: str, kind: str = Adapter.kind) -> TrainedAdapter:
    adapter = KINDS[kind](target_of(model_type).config, rngs=nnx.Rngs(1))
    strong = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, adapter)
    return TrainedAdapter(strong, 2, "adapter", target_fingerprint=None)


def test_every_family_is_here() -> None:
    assert sorted(SETTINGS) == [family.model_type for family in all_families()]


@pytest.mark.parametrize("model_type", families())
def test_rounds_equal_the_definition(model_type: str) -> None:
    """`reference` runs the complete sequence through the model for each token, without a cache."""
    target, adapter = target_of(model_type), adapter_of(model_type)
    draft = DraftConfig(2, 5, 0.05)
    rng = np.random.default_rng(0)
    accepted, agreed, written = [], [], set()
    for length in (1, 23):
        prompt = rng.integers(0, VOCABULARY, length).tolist()
        tokens, accept_lengths, draft_lengths, agrees = reference(target, adapter, prompt, 40, draft)
        out = generate(target, adapter, [prompt], 40, draft)
        assert out.tokens[0] == tokens
        assert (out.accept_lengths[0], out.draft_lengths[0]) == (accept_lengths, draft_lengths)
        written |= set(tokens)
        accepted += accept_lengths
        agreed += agrees
    assert 0.05 < np.mean(agreed) < 0.98  # drafts both accepted and refused
    assert len(set(accepted)) > 1
    assert len(written) > 5


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma3_text", "mistral", "olmo2", "smollm3"])
def test_trees_equal_the_definition(model_type: str) -> None:
    target, adapter = target_of(model_type), adapter_of(model_type)
    draft = DraftConfig(2, 4, 0.0, TreeConfig(3, 8))
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 12).tolist()
    out = generate(target, adapter, [prompt], 30, draft)
    expected = tree_reference(target, adapter, prompt, 30, draft)
    assert (out.tokens[0], out.accept_lengths[0], out.draft_lengths[0]) == expected


@pytest.mark.long
@pytest.mark.parametrize("model_type", SETTINGS)
def test_batches_equal_plain_decoding(model_type: str) -> None:
    """Prompts and drafts as they are drawn, with a tree and without one, by both kinds of draft model. Sequences of
    different lengths cross the windows' edges each at its own place."""
    target, rng = target_of(model_type), np.random.default_rng([2, *model_type.encode()])
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (*rng.integers(1, 45, 2), 40)]
    plain = generate_plain(target, prompts, 60).tokens
    gamma, tree = int(rng.integers(3, 8)), TreeConfig(int(rng.integers(2, 5)), int(rng.integers(8, 14)))
    accepted = []
    for kind, drawn in (("memory", None), ("kangaroo", tree)):
        draft = DraftConfig(2, gamma, float(rng.uniform(0, 0.2)), drawn)
        out = generate(target, adapter_of(model_type, kind), prompts, 60, draft)
        assert out.tokens == plain, draft
        accepted += [length for lengths in out.accept_lengths for length in lengths]
    assert len(set(accepted)) > 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("model_type", "initialization"),
    [*((model_type, "layer") for model_type in SETTINGS), ("gemma2", "random"), ("olmo2", "random")],
)
def test_an_adapter_is_trained_and_decodes(model_type: str, initialization: str) -> None:
    target = target_of(model_type)
    config = TrainConfig(
        target=model_type,
        output="unused",
        data=DataConfig(files="unused"),
        exit_layer=2,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1),
        batch_size=2,
        sequence_length=24,
        steps=8,
        dtype="float32",
    )
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    parameters = training.initial_parameters(target.model, 2, initialization, 0, config.adapter)
    optimizer = training.make_optimizer(config)
    step, _ = training.compiled(optimizer, target.config, config, mesh)
    state = optimizer.init(parameters)
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (2, 24))
    batch = {
        "tokens": tokens,
        "loss_mask": np.ones((2, 24), np.float32),
        "segment_ids": np.repeat([[1, 2]], 12, axis=1).reshape(1, 24).repeat(2, axis=0),
        "positions": np.tile(np.arange(12), 2)[None].repeat(2, axis=0),
    }
    losses = []
    for i in range(8):
        parameters, state, metrics = step(parameters, state, target.model, batch, None, i, "cross_entropy")
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    model = adapter_from_parameters(target.config, parameters)
    adapter = TrainedAdapter(model, 2, "trained", target_fingerprint=None)
    prompt = tokens[0, :9].tolist()
    out = generate(target, adapter, [prompt], 40, DraftConfig(2, 4, 0.0))
    assert out.tokens == generate_plain(target, [prompt], 40).tokens


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma2", "smollm3", "olmo2"])
def test_packed_examples_are_as_if_each_were_alone(model_type: str) -> None:
    """Training's mask, with a window that is shorter than an example."""
    target = target_of(model_type).model
    tokens = np.random.default_rng(4).integers(0, VOCABULARY, (1, 40))
    positions = np.concatenate([np.arange(25), np.arange(15)])[None]
    segments = np.repeat([1, 2], [25, 15])[None]
    mask = (segments[:, :, None] == segments[:, None]) & np.tri(40, dtype=bool)

    @jax.jit
    def logits(tokens, positions, mask):
        hidden, _ = shallow_apply(target, tokens, positions, exit_layer=2, mask=mask)
        hidden, _ = deep_apply(target, hidden, positions, exit_layer=2, mask=mask)
        return lm_head(target, hidden)[0]

    packed = logits(tokens, positions, mask)
    for part in (slice(0, 25), slice(25, 40)):
        alone = logits(tokens[:, part], positions[:, part], None)
        np.testing.assert_allclose(packed[part], alone, rtol=1e-4, atol=1e-4)
