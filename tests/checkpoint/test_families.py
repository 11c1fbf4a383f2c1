"""Every family beside transformers, on random settings that switch each of its oddities on and off."""

from __future__ import annotations

import collections
import importlib.util
import itertools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import generate_plain
from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.model.config import ROPE_KINDS
from kangaroo_jax.model.families import all_families
from tests.checkpoint.forward import assert_same_logits, forward

pytestmark = pytest.mark.long
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 40
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _rope(rng: np.random.Generator) -> dict[str, Any]:
    original = int(rng.integers(8, 24))
    factor = float(rng.uniform(1.5, 8))
    kinds = [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": factor},
        {"rope_type": "dynamic", "factor": factor},
        {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": float(rng.uniform(2, 5)),
            "original_max_position_embeddings": original,
        },
        {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original},
        {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(rng.uniform(2, 32)),
            "beta_slow": float(rng.uniform(0.1, 1)),
            "truncate": bool(rng.integers(2)),
            **({"attention_factor": 1.3} if rng.integers(2) else {"mscale": 1.1, "mscale_all_dim": 0.6}),
        },
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": 64,
            **({"factor": factor} if rng.integers(2) else {}),
        },
    ]
    return kinds[rng.integers(len(kinds))] | {"rope_theta": float(rng.uniform(100, 1e6))}


def random_settings(model_type: str, seed: int) -> dict[str, Any]:
    """Keys of a config.json. Of an even seed and the next one, each flag is on in one."""
    rng = np.random.default_rng([seed, *model_type.encode()])
    flags = np.random.default_rng([seed // 2, *model_type.encode()])

    def flag() -> bool:
        return bool(flags.integers(2)) ^ bool(seed % 2)

    slides = flag()
    kv_heads, groups, layers = int(rng.integers(1, 4)), int(rng.integers(1, 4)), int(rng.integers(2, 5))
    head_dim = 4 * int(rng.integers(1, 5))
    window = int(rng.integers(1, 20))
    types = [(_FULL, _SLIDING)[rng.integers(2)] for _ in range(layers)]
    settings: dict[str, Any] = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * groups,
        "hidden_size": kv_heads * groups * head_dim,
        "intermediate_size": int(rng.integers(20, 60)),
        "num_hidden_layers": layers,
        "vocab_size": int(rng.integers(40, 90)),
        "rms_norm_eps": float(10.0 ** rng.integers(-6, -2)),
        "tie_word_embeddings": flag(),
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "rope_parameters": _rope(rng),
    }
    rope = settings["rope_parameters"]
    if model_type in ("llama", "mistral", "ministral", "qwen2", "qwen3", "gemma2", "gemma3_text") and flag():
        settings["head_dim"] = head_dim = 2 * int(rng.integers(2, 10))
    else:
        settings["head_dim"] = head_dim
    own: dict[str, dict[str, Any]] = {
        "llama": {"attention_bias": flag(), "mlp_bias": flag()},
        "mistral": {"sliding_window": window if flag() else None},
        "ministral": {"sliding_window": window, "layer_types": types},
        "qwen2": {"use_sliding_window": flag(), "max_window_layers": int(rng.integers(layers))},
        "qwen3": {"attention_bias": flag()}
        | (
            {"use_sliding_window": True, "layer_types": types}
            if flag()
            else {"use_sliding_window": slides, "max_window_layers": int(rng.integers(layers))}
        ),
        "granite": {"attention_bias": flag(), "mlp_bias": flag()}
        | {
            name: float(rng.uniform(0.3, 3)) if flag() else 1.0
            for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
        },
        "smollm3": {"attention_bias": flag(), "mlp_bias": flag(), "use_sliding_window": flag()}
        | ({"no_rope_layers": rng.integers(0, 2, layers).tolist()} if flag() else {"no_rope_layer_interval": 2}),
        "olmo2": {"attention_bias": flag()},
        "phi3": {"sliding_window": window if flag() else None, "original_max_position_embeddings": 64},
        "gemma2": {
            "attention_bias": flag(),
            "sliding_window": window,
            "query_pre_attn_scalar": int(rng.integers(8, 40)),
            "attn_logit_softcapping": float(rng.uniform(0.5, 5)) if flag() else None,
            "final_logit_softcapping": float(rng.uniform(0.5, 5)) if flag() else None,
        }
        | ({"layer_types": types} if flag() else {}),
        "gemma3_text": {
            "attention_bias": flag(),
            "sliding_window": window,
            "query_pre_attn_scalar": int(rng.integers(8, 40)),
            "final_logit_softcapping": float(rng.uniform(0.5, 5)) if flag() else None,
        }
        | ({"layer_types": types} if flag() else {"sliding_window_pattern": int(rng.integers(2, 4))}),
    }
    turned = head_dim
    if model_type == "phi3":
        rope |= {"partial_rotary_factor": (1.0, 0.5)[rng.integers(2)]}
        turned = int(head_dim * rope["partial_rotary_factor"])
        if rope["rope_type"] != "longrope":
            settings["rope_parameters"] = rope = {"rope_type": ("default", "longrope")[rng.integers(2)]} | {
                name: rope[name] for name in ("rope_theta", "partial_rotary_factor")
            }
    local = _rope(rng) if flag() else {"rope_type": "default", "rope_theta": float(rng.uniform(100, 1e4))}
    for each in (rope, local):
        if each["rope_type"] == "longrope":
            each |= {f"{name}_factor": rng.uniform(1, 4, turned // 2).tolist() for name in ("short", "long")}
    if model_type == "gemma3_text":
        for each in (rope, local):
            each.pop("truncate", None)  # transformers reads it of all layers alone
        settings["rope_parameters"] = {_FULL: rope, _SLIDING: local}
    windowed = {"sliding_window": window} if model_type in ("qwen2", "qwen3", "smollm3") else {}
    return settings | windowed | own[model_type]


SEEDS = range(4)


def test_the_settings_switch_every_oddity_on_and_off() -> None:
    ropes, states = set(), collections.defaultdict(set)
    optional = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
    multipliers = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    for model_type, seed in itertools.product([family.model_type for family in all_families()], SEEDS):
        settings = random_settings(model_type, seed)
        rope = settings["rope_parameters"]
        ropes.add(rope.get(_FULL, rope)["rope_type"])
        if _SLIDING in rope:
            states[model_type, "scaled windowed layers"].add(rope[_SLIDING]["rope_type"] != "default")
        for key, value in settings.items():
            if isinstance(value, bool):
                states[model_type, key].add(value)
            elif key in multipliers:
                states[model_type, key].add(value == 1.0)
        for key in optional if model_type in ("mistral", "phi3", "gemma2") else ("final_logit_softcapping",):
            if key in settings and (model_type, key) != ("gemma2", "sliding_window"):
                states[model_type, key].add(settings[key] is None)
        if model_type in ("qwen3", "gemma2", "gemma3_text"):
            states[model_type, "layer_types"].add("layer_types" in settings)
        if model_type == "smollm3":
            states[model_type, "no_rope_layers"].add("no_rope_layers" in settings)
    assert ropes == {"default", *ROPE_KINDS}
    assert [key for key, found in states.items() if len(found) < 2] == []
    assert len(states) == 38


@needs_torch
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("model_type", [family.model_type for family in all_families()])
def test_logits_equal_those_of_transformers_both_ways(model_type: str, seed: int, tmp_path: pathlib.Path) -> None:
    import torch
    import transformers

    from tests.fixtures.make_hf_logits import logits_of, make_model

    settings = random_settings(model_type, seed)
    model = make_model(model_type, settings, seed)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, LENGTH))
    expected = logits_of(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    target = load_target(tmp_path / "theirs", "float32")
    # Against float64: where their own float32 rounds badly (norms of near-zero values), so may ours.
    exact = logits_of(model.double(), tokens)
    rounding = np.abs(expected - exact).max() / np.abs(exact).max()
    assert_same_logits(forward(target.model, tokens), exact, min(3e-5 + 3 * rounding, 1e-4))

    save_target(target.model, tmp_path / "ours", jnp.float32)
    again = load_target(tmp_path / "ours", "float32")
    assert (again.config, again.fingerprint) == (target.config, target.fingerprint)
    read, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(logits_of(read.eval(), tokens), expected, rtol=1e-5, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_an_original_context_beside_the_rotary_settings_goes_first(kind: str, tmp_path: pathlib.Path) -> None:
    from tests.fixtures.make_hf_logits import logits_of, make_model

    def model(**more: int):
        factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
        rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4} | factors
        return make_model("llama", random_settings("llama", 0) | {"rope_parameters": rope, "head_dim": 16} | more, 0)

    theirs = model(original_max_position_embeddings=8)
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, LENGTH))
    theirs.save_pretrained(tmp_path)
    expected = logits_of(theirs.double(), tokens)
    assert np.abs(logits_of(model(), tokens) - expected).max() > 0.1 * np.abs(expected).max()
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = 64  # transformers has written its own into both
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(forward(load_target(tmp_path, "float32").model, tokens), expected, 1e-4)


@needs_torch
def test_a_mistral_whose_layers_differ_is_a_ministral(tmp_path: pathlib.Path) -> None:
    """As for transformers, by whichever of both names the file goes."""
    import torch
    import transformers

    from tests.fixtures.make_hf_logits import logits_of, make_model

    settings = random_settings("ministral", 0) | {"layer_types": [_SLIDING, _FULL], "num_hidden_layers": 2}
    make_model("ministral", settings | {"sliding_window": 9}, 0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    assert type(theirs).__name__ == "MinistralForCausalLM"
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, LENGTH))
    target = load_target(tmp_path, "float32")
    assert target.config.windows == (9, None)
    assert_same_logits(forward(target.model, tokens), logits_of(theirs, tokens), 1e-4)


@needs_torch
@pytest.mark.parametrize("window", [LENGTH, LENGTH - 1])
@pytest.mark.parametrize("model_type", ["mistral", "ministral", "phi3", "smollm3", "gemma2", "gemma3_text"])
def test_windows_as_long_as_the_context_and_one_shorter(model_type: str, window: int, tmp_path: pathlib.Path) -> None:
    """Of the context's last token alone does the shorter one hide something."""
    from tests.fixtures.make_hf_logits import logits_of, make_model

    settings = random_settings(model_type, 0) | {"sliding_window": window, "max_position_embeddings": LENGTH}
    settings |= {"use_sliding_window": True, "no_rope_layers": [0] * settings["num_hidden_layers"]}
    settings |= {"layer_types": [_SLIDING] * settings["num_hidden_layers"], "rope_parameters": {"rope_type": "default"}}
    if model_type == "gemma3_text":
        settings["rope_parameters"] = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in (_FULL, _SLIDING)}
    model = make_model(model_type, settings, 0)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, LENGTH))
    model.save_pretrained(tmp_path)
    target = load_target(tmp_path, "float32")
    assert bool(target.config.windows) == (window < LENGTH)
    assert_same_logits(forward(target.model, tokens), logits_of(model.double(), tokens), 1e-4)


@needs_torch
def test_texts_beyond_the_original_context_are_turned_by_the_long_factors(tmp_path: pathlib.Path) -> None:
    """As transformers does where a text, with what it has written, is longer; and by the short ones within it."""
    import torch

    from tests.fixtures.make_hf_logits import logits_of, make_model

    original, rng = 24, np.random.default_rng(0)
    settings = random_settings("phi3", 0) | {"original_max_position_embeddings": original, "sliding_window": None}
    turned = settings["head_dim"] // 2
    factors = {f"{name}_factor": rng.uniform(1, 4, turned).tolist() for name in ("short", "long")}
    settings["rope_parameters"] = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0} | factors
    settings["rope_parameters"]["original_max_position_embeddings"] = original
    model = make_model("phi3", settings, 0)
    tokens = rng.integers(0, model.config.vocab_size, (2, LENGTH))
    model.save_pretrained(tmp_path)
    short, long = (load_target(tmp_path, "float32", long_context=x) for x in (False, True))
    assert (short.config.context, long.config.context) == (original, 128)
    assert short.fingerprint == long.fingerprint
    written = generate_plain(long, tokens.tolist(), 12, eos_token_ids=[]).tokens
    theirs = model.generate(
        torch.from_numpy(tokens), attention_mask=torch.ones(tokens.shape), max_new_tokens=12, do_sample=False
    )
    assert written == theirs[:, LENGTH:].tolist()
    model.double()
    assert_same_logits(forward(long.model, tokens), logits_of(model, tokens), 1e-4)
    assert_same_logits(forward(short.model, tokens[:, :original]), logits_of(model, tokens[:, :original]), 1e-4)
    assert np.abs(np.asarray(forward(short.model, tokens)) - logits_of(model, tokens)).max() > 1e-2


_SHARDED = """
import sys
import numpy as np
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.model.sharding import make_mesh
from tests.checkpoint.forward import assert_same_logits, forward
for name in sys.argv[1:]:
    mesh = make_mesh({"data": 1, "fsdp": 2, "model": 2})
    model = load_target(f"tests/fixtures/hf_logits/{name}", "float32", mesh).model
    qkv = model.layers[0].self_attn.qkv_proj[...]
    assert qkv.addressable_shards[0].data.size * 4 == qkv.size
    tokens, expected = (np.load(f"tests/fixtures/hf_logits/{name}/{x}.npy") for x in ("tokens", "logits"))
    assert_same_logits(forward(model, tokens), expected, 1e-4)
"""


def test_weights_split_over_devices_give_the_logits_of_transformers() -> None:
    """Fused tensors are read in parts; the norm of all queries is over heads on two devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
    }
    names = ["gemma2", "gemma3", "granite", "olmo2", "phi3", "qwen3", "smollm3"]
    subprocess.run([sys.executable, "-c", _SHARDED, *names], cwd=ROOT, env=environment, check=True)
