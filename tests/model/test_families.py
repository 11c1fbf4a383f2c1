"""What families make of a config.json, compared with what transformers makes of it; and a family made here, in a file.

What a config.json means to transformers is in its models/*/configuration_*.py; needs no torch.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from flax import nnx

from kangaroo_jax.checkpoint import fingerprint
from kangaroo_jax.checkpoint.known_models import SHAPES
from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import families, sharding
from kangaroo_jax.model.config import RopeScaling
from kangaroo_jax.model.families import all_families, family_of, read_config
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

NAN = float("nan")
FAMILIES = [
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "ministral",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
]
LINEAR = {"type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}
STRETCHED = {"rope_type": "linear", "factor": 8.0}
LAYERED_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf(model_type: str = "llama", **changes: object) -> dict[str, object]:
    """A config.json with what every one has."""
    config: dict[str, object] = {
        "model_type": model_type,
        "vocab_size": 64,
        "hidden_size": 128,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 64,
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    return config | changes


@pytest.mark.parametrize(
    "config",
    [
        hf(),
        hf("mistral"),
        hf("qwen2"),
        hf(num_key_value_heads=8),
        hf("qwen2", num_key_value_heads=None),
        hf("mistral", head_dim=None, num_attention_heads=16),
        hf("mistral", head_dim=12, num_attention_heads=16),
        hf(head_dim=6),
        hf("qwen2", tie_word_embeddings=True, use_sliding_window=False, sliding_window=4096),
        hf(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
        hf(rope_theta=5e5),
        hf(rope_theta=1e6, rope_scaling=LINEAR),
        hf(rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=131072),
        hf(rope_scaling=None),
        hf(rope_scaling={"type": "default"}),
        hf(rope_parameters={"rope_type": "default", "rope_theta": 3e5}),
        hf(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 3e5}),
        hf(rope_parameters=LLAMA3 | {"rope_theta": 3e5}, max_position_embeddings=131072),
        hf(rope_parameters={"rope_theta": 3e5}),
        hf(eos_token_id=[7, 9]),
        hf(eos_token_id=None, bos_token_id=None),
        hf(rms_norm_eps=1e-5, max_position_embeddings=4096),
        hf(rope_scaling={"type": "dynamic", "factor": 2.0}),
        hf(rope_scaling=YARN, max_position_embeddings=8192),
        hf(rope_parameters=YARN | {"rope_theta": 3e5, "beta_fast": 8, "truncate": False, "attention_factor": 1.5}),
        hf("mistral", sliding_window=4096),
        hf("qwen3"),
        hf("qwen3", head_dim=32, attention_bias=True, rope_theta=1e6),
        hf("granite", attention_bias=True, mlp_bias=True),
        hf("smollm3"),
        hf("smollm3", attention_bias=True, tie_word_embeddings=False),
        hf("olmo2"),
        hf("olmo2", attention_bias=True, rms_norm_eps=1e-6),
        hf("phi3", num_attention_heads=4, original_max_position_embeddings=1024, rope_scaling=LONGROPE),
        hf("phi3", partial_rotary_factor=0.75, num_attention_heads=8),
        hf("ministral", num_attention_heads=16),
        hf("gemma2", hidden_act="gelu_pytorch_tanh"),
        hf("gemma2", attention_bias=True, tie_word_embeddings=False),
    ],
    ids=lambda config: ",".join(f"{k}={v}" for k, v in config.items() if k not in hf() or k == "model_type")[11:60],
)
@pytest.mark.parametrize("rewritten", [False, True], ids=["as is", "rewritten"])
def test_means_what_it_means_to_transformers(config: dict[str, object], rewritten: bool) -> None:
    theirs = transformers.AutoConfig.for_model(**{key: _copy(value) for key, value in config.items()})
    head_dim = config.get("head_dim")
    rope = theirs.rope_parameters
    kind = rope["rope_type"]
    ours = read_config(theirs.to_diff_dict() if rewritten else config)
    for name in (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    default = getattr(theirs, "head_dim", None) or 128 // ours.num_attention_heads
    assert ours.head_dim == (default if head_dim is None else head_dim)
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.qkv_bias == (ours.o_bias or ours.model_type == "qwen2")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.rope_theta == rope["rope_theta"]
    if kind == "default":
        assert ours.rope_scaling is None
    else:
        fields = dataclasses.asdict(ours.rope_scaling)
        assert fields.pop("kind") == kind
        fields |= {key: list(x) for key, x in fields.items() if isinstance(x, tuple)}
        beside = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
        assert all(fields[key] == rope[key] for key in rope if key not in beside)
    assert ours.rotary.dim == int(ours.head_dim * rope.get("partial_rotary_factor", 1))
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


def _copy(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value  # transformers writes into the dicts it is given


@pytest.mark.parametrize(
    "config",
    [
        hf("mistral", sliding_window=77),
        hf("ministral", sliding_window=9),
        hf("ministral", layer_types=["full_attention", "sliding_attention"]),
        hf("qwen2", use_sliding_window=True, max_window_layers=1),
        hf("qwen2", use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention", "full_attention"]),
        hf("qwen2", use_sliding_window=False, sliding_window=5, max_window_layers=0),
        hf("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0),
        hf("qwen3"),
        hf("smollm3", use_sliding_window=True, sliding_window=6, no_rope_layers=[0, 1]),
        hf("smollm3", no_rope_layer_interval=2, num_hidden_layers=5),
        hf("phi3", sliding_window=2047),
        hf("gemma2", num_hidden_layers=5),
        hf("gemma3_text", num_hidden_layers=13),
        hf("gemma3_text", num_hidden_layers=5, sliding_window_pattern=3, sliding_window=512),
        hf("gemma3_text", rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=STRETCHED, sliding_window_pattern=2),
        hf("gemma3_text", sliding_window_pattern=2, rope_parameters=LAYERED_ROPE),
        hf("gemma3_text", sliding_window_pattern=2, rope_parameters=LAYERED_ROPE, rope_scaling=STRETCHED),
        hf(
            "gemma3_text",
            sliding_window_pattern=2,
            rope_scaling=STRETCHED,
            rope_parameters={"full_attention": {"rope_theta": 5e6}, "sliding_attention": {"rope_theta": 3e4}},
        ),
    ],
    ids=lambda config: ",".join(f"{k}={v}" for k, v in config.items() if k not in hf() or k == "model_type")[11:60],
)
def test_each_layers_attention_is_what_it_is_in_transformers(config: dict[str, object]) -> None:
    theirs = transformers.AutoConfig.for_model(**{key: _copy(value) for key, value in config.items()})
    layers, uniform = theirs.num_hidden_layers, ["sliding_attention"] * theirs.num_hidden_layers
    kinds = getattr(theirs, "layer_types", None) or (uniform if theirs.sliding_window else [])
    windows = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds] or [None] * layers
    ours = read_config(config).attention_kinds
    assert [kind.window for kind in ours] == windows
    turned = getattr(theirs, "no_rope_layers", [1] * layers)
    assert [kind.rotary is not None for kind in ours] == [bool(x) for x in turned]
    for kind, name in zip(ours, kinds or [None] * layers, strict=True):
        rope = theirs.rope_parameters.get(name, theirs.rope_parameters)
        if kind.rotary is not None:
            assert kind.rotary.theta == rope["rope_theta"]
            scaling = kind.rotary.scaling
            found = ("default", None) if scaling is None else (scaling.kind, scaling.factor)
            assert found == (rope["rope_type"], rope.get("factor"))


@pytest.mark.parametrize(
    "config",
    [
        hf("mistral"),
        hf("ministral", layer_types=["full_attention", "sliding_attention"]),
        hf("qwen2", use_sliding_window=True, max_window_layers=1),
        hf("qwen3", use_sliding_window=True, max_window_layers=0),
        hf("smollm3", use_sliding_window=True, no_rope_layers=[0, 1]),
        hf("phi3"),
        hf("gemma2"),
        hf("mistral", rope_scaling=LINEAR),
    ],
    ids=lambda config: f"{config['model_type']}{',linear' * ('rope_scaling' in config)}",
)
def test_a_window_that_no_text_is_longer_than_is_none(config: dict[str, object]) -> None:
    context = 48 * (2 if "rope_scaling" in config else 1)
    config |= {"max_position_embeddings": 48}
    with_window, acting, without = (read_config(config | {"sliding_window": x}) for x in (context, context - 1, 10**6))
    assert with_window.context == context
    assert with_window.windows == ()
    assert with_window == without
    assert set(acting.windows) - {None} == {context - 1}
    written = family_of(with_window).write_config(with_window)
    assert read_config(written) == with_window


def test_a_window_that_says_how_positions_turn_stays() -> None:
    config = hf("gemma3_text", max_position_embeddings=48, sliding_window=48, sliding_window_pattern=2)
    assert read_config(config).windows == (48, None)
    one_rotary = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    assert read_config(config | {"rope_parameters": one_rotary}).windows == ()


def test_multipliers_and_caps_are_those_of_transformers() -> None:
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
    granite = read_config(hf("granite") | {name: 2.0 + i for i, name in enumerate(names)})
    assert (granite.embedding_multiplier, granite.residual_multiplier) == (2.0, 3.0)
    assert (granite.attention_scale, granite.logits_divisor) == (4.0, 5.0)
    gemma = read_config(hf("gemma2"))
    theirs = transformers.AutoConfig.for_model(**hf("gemma2"))
    assert gemma.attention_soft_cap == theirs.attn_logit_softcapping
    assert gemma.logits_soft_cap == theirs.final_logit_softcapping
    assert gemma.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert read_config(hf("gemma3_text")).logits_soft_cap is None


def test_a_context_beyond_which_positions_turn_otherwise_ends_there() -> None:
    assert read_config(hf(rope_scaling={"type": "dynamic", "factor": 2.0})).context == 2048
    phi = hf("phi3", num_attention_heads=4, max_position_embeddings=131072, rope_scaling=LONGROPE)
    assert read_config(phi).context == 4096
    assert read_config(hf("gemma3_text", rope_scaling=STRETCHED)).context == 131072
    # One of the two kinds of layers is enough.
    long = LONGROPE | {"short_factor": [1.0] * 128, "long_factor": [2.0] * 128, "original_max_position_embeddings": 64}
    assert read_config(hf("gemma3_text", rope_scaling=long)).context == 64
    assert read_config(hf("gemma3_text", rope_parameters={"sliding_attention": long})).context == 64
    assert read_config(hf(rope_scaling=YARN, max_position_embeddings=1024)).context == 4096
    assert read_config(hf(rope_scaling=YARN, max_position_embeddings=8192)).context == 8192


def test_a_model_loaded_for_long_texts_is_the_same_target_with_its_full_context() -> None:
    config = read_config(hf("phi3", num_attention_heads=4, max_position_embeddings=131072, rope_scaling=LONGROPE))
    longer = config.for_long_texts()
    assert (config.context, longer.context) == (4096, 131072)
    assert fingerprint.same_constants(fingerprint.constants(config), longer)
    assert family_of(longer).write_config(longer) == family_of(config).write_config(config)
    for other in (hf(), hf(rope_scaling=LLAMA3), hf("phi3", num_attention_heads=4)):
        with pytest.raises(InputError, match="long_context changes nothing for this"):
            read_config(other).for_long_texts()


def test_no_key_value_heads_means_as_many_as_heads() -> None:
    """transformers 4 wrote null for it; 5 refuses that for Mistral."""
    for model_type in ("llama", "mistral", "qwen2"):
        assert read_config(hf(model_type, num_key_value_heads=None)).num_key_value_heads == 64


def test_biases_that_only_llama_reads() -> None:
    mistral = read_config(hf("mistral", attention_bias=True, mlp_bias=True))
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)
    qwen2 = read_config(hf("qwen2", attention_bias=True, mlp_bias=True))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hf("gpt2"), f"model_type 'gpt2' is not supported; supported: {', '.join(FAMILIES)}"),
        (hf("gemma3"), "model_type 'gemma3' is not supported (it has a vision tower; its text alone,"),
        (
            hf("gpt_oss"),
            "model_type 'gpt_oss' is not supported (it would need a mixture of experts, and attention sinks)",
        ),
        (hf("llama", vision_config={"hidden_size": 3}), "a vision tower (vision_config) is not supported"),
        ({}, "model_type None"),
        (hf(["llama"]), "model_type ['llama']"),
        (hf("mistral", sliding_window=0), "sliding_window must be a positive integer, found 0"),
        (hf("mistral", sliding_window="4096"), "sliding_window must be a positive integer, found '4096'"),
        (hf("qwen2", layer_types=["full_attention", "linear_attention"]), "layer_types must be a list of 'full_att"),
        (hf("qwen3", layer_types=["sliding_attention"] * 2), "'sliding_attention', but there is no sliding_window"),
        (
            hf("qwen3", layer_types=["sliding_attention"] * 2, sliding_window=8, use_sliding_window=False),
            "'sliding_attention', but use_sliding_window is false",
        ),
        (hf("qwen2", layer_types=["full_attention"]), "one for each of 2 layers, found ['full_attention']"),
        (hf("qwen2", layer_types="full_attention"), "layer_types must be a list of"),
        (hf("qwen3", max_window_layers="1"), "max_window_layers must be a positive integer, found '1'"),
        (hf("smollm3", no_rope_layers=[1]), "no_rope_layers must be a list of 0 and 1, one for each of 2 layers"),
        (hf("smollm3", no_rope_layer_interval=0), "no_rope_layer_interval must be a positive integer, found 0"),
        (hf("granite", logits_scaling=0), "logits_scaling must be a finite number above 0, found 0"),
        (hf("granite", residual_multiplier="1"), "residual_multiplier must be a finite number above 0, found '1'"),
        (hf("gemma2", final_logit_softcapping=-1), "final_logit_softcapping must be a finite number above 0"),
        (hf("gemma2", attn_logit_softcapping="50"), "attn_logit_softcapping must be a finite number above 0"),
        (hf("gemma2", query_pre_attn_scalar=0), "query_pre_attn_scalar must be a finite number above 0, found 0"),
        (hf("gemma2", hidden_activation="relu"), "hidden_activation 'relu' is not supported; supported: gelu_pytorch"),
        (hf("gemma2", use_bidirectional_attention=True), "use_bidirectional_attention true is not supported"),
        (hf("gemma3_text", attn_logit_softcapping=50.0), "attn_logit_softcapping must be null for gemma3_text"),
        (hf("gemma3_text", rope_parameters={"rope_theta": 1e4}), "'sliding_attention' alone, found 'rope_theta'"),
        (hf("gemma2", sliding_window=None), "sliding_window must be a number, found null; give layer_types"),
        (hf("gemma3_text", sliding_window=None), "sliding_window must be a number, found null; give layer_types"),
        (hf("gemma3_text", partial_rotary_factor=0.5), "partial_rotary_factor must be 1 for gemma3_text, found 0.5"),
        (
            hf("gemma3_text", rope_parameters={"sliding_attention": LINEAR | {"partial_rotary_factor": 0.5}}),
            "partial_rotary_factor must be 1 for gemma3_text, found 0.5 for 'sliding_attention'",
        ),
        (hf("gemma3_text", rope_scaling=YARN | {"truncate": False}), "truncate false is not supported for gemma3_text"),
        (hf("gemma3_text", sliding_window_pattern=0), "sliding_window_pattern must be a positive integer, found 0"),
        (hf("phi3", num_attention_heads=4, rope_scaling=LONGROPE | {"short_factor": [1.0]}), "must have 16 values"),
        (hf("phi3", num_attention_heads=4, rope_scaling=LONGROPE | {"long_factor": 3}), "must be a list of numbers"),
        (hf("phi3", num_attention_heads=4, rope_scaling=LONGROPE | {"long_factor": [0] * 16}), "long_factor must be"),
        (hf("phi3", rope_scaling=LINEAR), "rope type 'linear' is not supported for phi3; supported: default, longrope"),
        (hf("phi3", num_attention_heads=4, partial_rotary_factor=0.1), "an even number of head_dim (32), found 0.1"),
        (hf("phi3", num_attention_heads=4, partial_rotary_factor=2), "must be at most 1"),
        (hf(hidden_act="gelu"), "hidden_act 'gelu'"),
        (hf(quantization_config={"quant_method": "gptq"}), "quantized weights ('gptq')"),
        (hf(quantization_config="int8"), "quantized weights ('int8')"),
        (
            hf(quantization_config={"load_in_4bit": True, "llm_int8_threshold": 6.0}),
            "quantized weights ('load_in_4bit')",
        ),
        (hf("qwen2", is_causal=False), "is_causal false is not supported: tokens see those before them alone"),
        (hf(per_layer_config={"0": {"rms_norm_eps": 1e-2}}), "per_layer_config is not supported"),
        (hf(sliding_window="16"), "sliding_window '16' is not supported for llama"),
        (hf(sliding_window=16, max_position_embeddings=None), "max_position_embeddings must be a positive integer"),
        (hf(layer_types=5), "layer_types 5 is not supported for llama"),
        (hf(sliding_window=16), "sliding_window 16 is not supported for llama, whose layers see all positions"),
        (
            hf("olmo2", layer_types=["sliding_attention"]),
            "layer_types ['sliding_attention'] is not supported",
        ),
        (hf("granite", sliding_window=1), "sliding_window 1 is not supported for granite"),
        (hf(partial_rotary_factor=0.5), "partial_rotary_factor must be 1 for llama, found 0.5"),
        (hf(vocab_size=None), "vocab_size must be a positive integer, found None"),
        (hf(vocab_size=True), "vocab_size must be a positive integer, found True"),
        (hf(hidden_size="64"), "hidden_size must be a positive integer, found '64'"),
        (hf(hidden_size=64.0), "hidden_size must be a positive integer, found 64.0"),
        (hf(num_hidden_layers=0), "num_hidden_layers must be a positive integer, found 0"),
        (hf(num_attention_heads=-4), "num_attention_heads must be a positive integer, found -4"),
        (hf(num_attention_heads=0), "num_attention_heads must be a positive integer, found 0"),
        (hf(num_key_value_heads=0), "num_key_value_heads must be a positive integer, found 0"),
        (hf(num_key_value_heads=3), "must be a multiple of num_key_value_heads (3), found 64"),
        (hf(num_attention_heads=6), "hidden_size must be a multiple of num_attention_heads (6)"),
        (hf(head_dim=0), "head_dim must be a positive integer, found 0"),
        (hf(head_dim=5), "head_dim must be even for rotary embeddings, found 5"),
        (hf(max_position_embeddings=None), "max_position_embeddings must be a positive integer, found None"),
        (hf(rms_norm_eps=NAN), "rms_norm_eps must be a finite number above 0, found nan"),
        (hf(rms_norm_eps="1e-5"), "rms_norm_eps must be a finite number above 0, found '1e-5'"),
        (hf(rope_theta=0), "rope_theta must be a finite number above 0, found 0"),
        (hf(rope_theta=math.inf), "rope_theta must be a finite number above 0, found inf"),
        (hf(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false, found 'yes'"),
        (hf(attention_bias=1), "attention_bias must be true or false, found 1"),
        (hf(mlp_bias="true"), "mlp_bias must be true or false, found 'true'"),
        (hf(eos_token_id="</s>"), "eos_token_id must be a token id or a list of token ids, found '</s>'"),
        (hf(eos_token_id=[1, None]), "found [1, None]"),
        (hf(eos_token_id=True), "found True"),
        (hf(bos_token_id=[1, 2]), "bos_token_id must be one token id or null, found [1, 2]"),
        (hf(rope_scaling="linear"), "rope_scaling must be an object, found 'linear'"),
        (hf(rope_scaling={"type": "dynamic"}), "rope_scaling of rope type 'dynamic' needs 'factor', found ['type']"),
        (hf(rope_scaling={"factor": 4.0}), "rope_scaling has 'factor' but no rope_type that takes it"),
        (hf(rope_scaling=YARN | {"factor": 0}), "rope factor must be a finite number above 0, found 0"),
        (hf(rope_scaling=YARN | {"beta_fast": -1}), "rope beta_fast must be a finite number above 0, found -1"),
        (hf(rope_scaling=YARN | {"truncate": 1}), "rope truncate must be true or false, found 1"),
        (hf(rope_scaling=YARN | {"truncate": None}), "rope truncate must be true or false, found null"),
        (hf(rope_scaling=YARN, rope_theta=1), "rope_theta must be above 1 for rope type 'yarn', found 1"),
        (
            hf("gemma3_text", rope_parameters={"sliding_attention": YARN | {"rope_theta": 1}}),
            "rope_theta must be above 1 for rope type 'yarn', found 1",
        ),
        (hf(num_hidden_layers=2**31), "num_hidden_layers must be below 2**31, found 2147483648"),
        (hf(num_hidden_layers=10**5), "num_hidden_layers must be at most 10000, found 100000"),
        (hf("gemma2", num_hidden_layers=10**9), "num_hidden_layers must be at most 10000, found 1000000000"),
        (hf(max_position_embeddings=10**400), "max_position_embeddings must be below 2**31, found 1000"),
        (hf(rope_scaling=LINEAR | {"factor": 1e308}), "rope factor must be at most 1000000, found 1e+308"),
        (hf(rope_scaling=YARN | {"factor": 1e308}), "rope factor must be at most 1000000, found 1e+308"),
        (hf(rope_scaling=LONGROPE, head_dim=16), "rope short_factor must have 8 values, found 16"),
        (
            hf("gemma3_text", head_dim=16, rope_parameters={"sliding_attention": LONGROPE}),
            "rope short_factor must have 8 values, found 16",
        ),
        (
            hf(head_dim=32, rope_scaling=LONGROPE | {"factor": 2.0, "original_max_position_embeddings": 1}),
            "original_max_position_embeddings must be above 1 for rope type 'longrope', found 1",
        ),
        (hf("phi3", partial_rotary_factor=1e308), "partial_rotary_factor must be at most 1"),
        (hf(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": "1"}), "rope mscale must be a finite number"),
        (hf(rope_scaling={"type": "mrope", "mrope_section": [1]}), "rope type 'mrope' is not supported; supported:"),
        (hf(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope' needs 'short_factor'"),
        (hf(rope_scaling={"type": "linear"}), "rope_scaling of rope type 'linear' needs 'factor', found ['type']"),
        (hf(rope_scaling=LINEAR | {"factor": NAN}), "rope factor must be a finite number above 0, found nan"),
        (hf(rope_scaling=LINEAR | {"factor": True}), "rope factor must be a finite number above 0, found True"),
        (hf(rope_scaling=LINEAR | {"factor": "2"}), "rope factor must be a finite number above 0, found '2'"),
        (hf(rope_scaling=LINEAR | {"factor": 0}), "rope factor must be a finite number above 0, found 0"),
        (hf(rope_scaling={k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}), "needs 'low_freq_factor'"),
        (hf(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "must be above low_freq_factor (1.0), found 1.0"),
        (hf(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 0.5}), "positive integer, found 0.5"),
        (hf(rope_parameters={"partial_rotary_factor": 0.25}), "partial_rotary_factor must be 1 for llama, found 0.25"),
        (hf(rope_parameters={"full_attention": {"rope_type": "default"}}), "differs between layers ('full_attention')"),
    ],
)
def test_wrong_config_is_named_in_one_line(config: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_config(config, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert words in message
    assert "\n" not in message


def test_a_pattern_of_windows_says_nothing_beside_kinds_of_layers() -> None:
    """As for transformers, which writes null for it."""
    layers = hf("gemma3_text")["num_hidden_layers"]
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    config = read_config(hf("gemma3_text", layer_types=kinds, sliding_window=8, sliding_window_pattern=None))
    assert list(config.windows) == [8, None] * (layers // 2)


def test_configs_are_frozen_and_hashable() -> None:
    config = read_config(hf(rope_scaling=LINEAR))
    assert hash(config) == hash(read_config(hf(rope_scaling=LINEAR)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


def test_rope_scaling_of_another_kind() -> None:
    with pytest.raises(InputError, match="rope type 'default' is not supported"):
        RopeScaling("default", 1.0)


def test_every_family_is_found() -> None:
    assert [family.model_type for family in all_families()] == FAMILIES


def test_every_parameter_of_every_family_has_a_partition() -> None:
    mesh = sharding.Mesh(np.array([jax.devices()[0]] * 4).reshape(1, 2, 2), sharding.AXES)
    settings = {"phi3": {"num_attention_heads": 4}, "qwen3": {"attention_bias": True}}
    for name in FAMILIES:
        config = read_config(hf(name) | settings.get(name, {}))
        model = nnx.eval_shape(lambda config=config: TargetModel(config, rngs=nnx.Rngs(0)))
        paths = dict(zip(parameter_paths(model), jax.tree.leaves(model), strict=True))
        for path, x in paths.items():
            assert len(sharding.partition(path, x.shape, mesh)) <= len(x.shape)
        split = [path for path, x in paths.items() if any(sharding.partition(path, x.shape, mesh))]
        assert len(split) >= 4 * config.num_hidden_layers  # of each layer, all matrices


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("llama3_8b", 8_030_261_248),
        ("qwen3_8b", 8_190_735_360),
        ("qwen3_4b", 4_022_468_096),
        ("mistral_7b", 7_248_023_552),
    ],
)
def test_known_shapes_have_as_many_parameters_as_the_hub_says(shape: str, parameters: int) -> None:
    model = nnx.eval_shape(lambda: TargetModel(SHAPES[shape], rngs=nnx.Rngs(0)))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(model)) == parameters


TOY = '''"""Toy: attention and MLP side by side, from one norm, each channel gated."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

from kangaroo_jax.checks import check_positive
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import Family
from kangaroo_jax.model.families.config_json import require_silu, shared_fields, shared_keys
from kangaroo_jax.model.layers import MLP, Attention, RMSNorm


@dataclasses.dataclass(frozen=True)
class ToyConfig(ModelConfig):
    residual_multiplier: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_positive("residual_multiplier", self.residual_multiplier)


class ToyLayer(nnx.Module):
    def __init__(self, config, index, *, rngs, dtype=jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, config.attention_kinds[index], rngs=rngs, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)
        self.gate = nnx.Param(jnp.ones((2, config.hidden_size // 2), dtype))
        self.multiplier = config.residual_multiplier

    def __call__(self, x, context, keys, values):
        normed = self.input_layernorm(x)
        mixed, keys, values = self.self_attn(normed, context, keys, values)
        gate = self.multiplier * self.gate[...].reshape(-1)
        return x + gate * (mixed + self.mlp(normed)), keys, values


def read_config(contents):
    require_silu(contents)
    multiplier = contents.get("residual_multiplier", 1.0)
    return ToyConfig(**shared_fields(contents, max_positions=64, kv_heads=2, eos=0), residual_multiplier=multiplier)


def write_config(config):
    return shared_keys(config) | {"residual_multiplier": config.residual_multiplier}


FAMILY = Family(
    "toy",
    read_config,
    write_config,
    ToyLayer,
    tensor_name=lambda name: name if name.startswith("lm_head") else f"toy.{name}",
    partitions=((r"gate", (None, "model")),),
)
'''
TOY_CONFIG = hf("toy", hidden_size=24, num_attention_heads=4, head_dim=6, residual_multiplier=0.5)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path):
    """A checkpoint's folder, once the family's file lies where families are looked for."""
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(TOY)
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TOY_CONFIG))
    safetensors.numpy.save_file(toy_tensors(), folder / "model.safetensors")
    yield folder
    sys.modules.pop(f"{families.__name__}.toy", None)


def toy_tensors() -> dict[str, np.ndarray]:
    shapes = {"toy.embed_tokens.weight": (64, 24), "toy.norm.weight": (24,), "lm_head.weight": (64, 24)}
    for i in range(2):
        layer = f"toy.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (12, 24) for x in "kv"}
        shapes |= {f"{layer}.self_attn.q_proj.weight": (24, 24), f"{layer}.self_attn.o_proj.weight": (24, 24)}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (96, 24) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (24, 96), f"{layer}.gate.weight": (2, 12)}
        shapes |= {f"{layer}.input_layernorm.weight": (24,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(float(len(shape) == 1), 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def toy_logits(tokens: np.ndarray) -> np.ndarray:
    """The family's forward pass of one sequence, in float64."""
    weights = {name: x.astype(np.float64) for name, x in toy_tensors().items()}
    time, half = len(tokens), 3
    angles = np.arange(time)[:, None] / 10000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

    def norm(x, name):
        return weights[f"{name}.weight"] * x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)

    def turn(x):
        first, second = x[..., :half], x[..., half:]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x = weights["toy.embed_tokens.weight"][tokens]
    for i in range(2):
        layer = f"toy.layers.{i}"

        def linear(x, name, layer=layer):
            return x @ weights[f"{layer}.{name}_proj.weight"].T

        normed = norm(x, f"{layer}.input_layernorm")
        q, k, v = (linear(normed, f"self_attn.{name}").reshape(time, -1, 6) for name in "qkv")
        k, v = np.repeat(turn(k), 2, axis=1), np.repeat(v, 2, axis=1)
        scores = np.einsum("qhd,khd->hqk", turn(q), k) / 6**0.5
        scores = np.exp(np.where(np.tri(time, dtype=bool), scores, -np.inf))
        mixed = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(time, -1)
        inner = linear(normed, "mlp.gate")
        inner = linear(inner / (1 + np.exp(-inner)) * linear(normed, "mlp.up"), "mlp.down")
        x = x + 0.5 * weights[f"{layer}.gate.weight"].reshape(-1) * (linear(mixed, "self_attn.o") + inner)
    return norm(x, "toy.norm") @ weights["lm_head.weight"].T


def test_a_family_with_its_own_layer_field_names_and_partitions_is_one_file(toy: pathlib.Path, tmp_path) -> None:
    target = load_target(toy, "float32")
    assert target.config.residual_multiplier == 0.5
    tokens = np.random.default_rng(1).integers(0, 64, 11)
    positions = jnp.arange(11)[None]
    hidden, _ = shallow_apply(target.model, jnp.asarray(tokens)[None], positions, exit_layer=1)
    hidden, _ = deep_apply(target.model, hidden, positions, exit_layer=1)
    np.testing.assert_allclose(lm_head(target.model, hidden)[0], toy_logits(tokens), rtol=1e-4, atol=1e-4)

    save_target(target.model, tmp_path / "saved", jnp.float32)
    saved = safetensors.numpy.load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == toy_tensors().keys()
    one_device = sharding.make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices()[:1])
    again = load_target(tmp_path / "saved", "float32", one_device)
    assert again.config == target.config
    assert again.fingerprint == target.fingerprint
    jax.tree.map(np.testing.assert_array_equal, target.model, again.model)

    two = sharding.Mesh(np.array([jax.devices()[0]] * 2).reshape(1, 1, 2), sharding.AXES)
    assert sharding.partition("layers.1.gate", (2, 12), two) == jax.sharding.PartitionSpec(None, "model")


def test_a_familys_own_field_is_part_of_the_fingerprint(toy: pathlib.Path) -> None:
    before = load_target(toy, "float32").fingerprint
    (toy / "config.json").write_text(json.dumps(TOY_CONFIG | {"residual_multiplier": 0.25}))
    assert load_target(toy, "float32").fingerprint != before


def test_a_familys_refusals_are_named_with_the_file(toy: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"some/config.json: residual_multiplier must be .* above 0, found -1"):
        read_config(TOY_CONFIG | {"residual_multiplier": -1}, "some/config.json")
    with pytest.raises(InputError, match=f"supported: {', '.join([*FAMILIES, 'toy'])}"):
        read_config(TOY_CONFIG | {"model_type": "other"})


def test_a_family_whose_file_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=f"model_type 'toy' is not supported; supported: {', '.join(FAMILIES)}"):
        read_config(TOY_CONFIG)
