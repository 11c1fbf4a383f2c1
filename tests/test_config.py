"""Settings, compared with what transformers makes of the same config.json, and with hand-written expectations.

What a config.json means to transformers is in its models/{llama,mistral,qwen2}/configuration_*.py; needs no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import transformers

from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.config import DraftConfig, ModelConfig, RopeScaling, SamplingConfig, TreeConfig
from kangaroo_jax.errors import InputError

NAN = float("nan")
LINEAR = {"type": "linear", "factor": 2.0}
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
    ],
    ids=lambda config: ",".join(f"{k}={v}" for k, v in config.items() if k not in hf() or k == "model_type")[11:60],
)
@pytest.mark.parametrize("rewritten", [False, True], ids=["as is", "rewritten"])
def test_means_what_it_means_to_transformers(config: dict[str, object], rewritten: bool) -> None:
    theirs = transformers.AutoConfig.for_model(**{key: _copy(value) for key, value in config.items()})
    head_dim = config.get("head_dim")
    rope = theirs.rope_parameters
    kind = rope["rope_type"]
    ours = ModelConfig.from_hf(theirs.to_diff_dict() if rewritten else config)
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
    assert ours.head_dim == (128 // ours.num_attention_heads if head_dim is None else head_dim)
    assert ours.o_bias == getattr(theirs, "attention_bias", False)
    assert ours.qkv_bias == (ours.o_bias or ours.model_type == "qwen2")
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.rope_theta == rope["rope_theta"]
    if kind == "default":
        assert ours.rope_scaling is None
    else:
        fields = dataclasses.asdict(ours.rope_scaling)
        assert fields.pop("kind") == kind
        assert all(fields[key] == rope[key] for key in rope if key not in ("rope_type", "type", "rope_theta"))
    assert ours.bos_token_id == theirs.bos_token_id
    eos = theirs.eos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))


def _copy(value: object) -> object:
    return dict(value) if isinstance(value, dict) else value  # transformers writes into the dicts it is given


def test_no_key_value_heads_means_as_many_as_heads() -> None:
    """transformers 4 wrote null for it; 5 refuses that for Mistral."""
    for model_type in ("llama", "mistral", "qwen2"):
        assert ModelConfig.from_hf(hf(model_type, num_key_value_heads=None)).num_key_value_heads == 64


def test_biases_that_only_llama_reads() -> None:
    mistral = ModelConfig.from_hf(hf("mistral", attention_bias=True, mlp_bias=True))
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)
    qwen2 = ModelConfig.from_hf(hf("qwen2", attention_bias=True, mlp_bias=True))
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (hf("gemma"), "model_type 'gemma' is not supported; supported: llama, mistral, qwen2"),
        ({}, "model_type None"),
        (hf(["llama"]), "model_type ['llama']"),
        (hf("mistral", sliding_window=4096), "mistral with sliding_window 4096"),
        ({k: v for k, v in hf("mistral").items() if k != "sliding_window"}, "mistral with sliding_window 4096 (the"),
        (hf("qwen2", use_sliding_window=True), "qwen2 with use_sliding_window"),
        (hf("qwen2", layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
        (hf(hidden_act="gelu"), "hidden_act 'gelu'"),
        (hf(quantization_config={"quant_method": "gptq"}), "quantized weights ('gptq')"),
        (hf(quantization_config="int8"), "quantized weights ('int8')"),
        (hf(partial_rotary_factor=0.5), "partial_rotary_factor must be 1, found 0.5"),
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
        (hf(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic' is not supported; supported:"),
        (hf(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope type 'yarn'"),
        (hf(rope_scaling={"type": "mrope", "mrope_section": [1]}), "rope type 'mrope'"),
        (hf(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope'"),
        (hf(rope_scaling={"type": "linear"}), "rope_scaling of rope type 'linear' needs 'factor', found ['type']"),
        (hf(rope_scaling=LINEAR | {"factor": NAN}), "rope factor must be a finite number above 0, found nan"),
        (hf(rope_scaling=LINEAR | {"factor": True}), "rope factor must be a finite number above 0, found True"),
        (hf(rope_scaling=LINEAR | {"factor": "2"}), "rope factor must be a finite number above 0, found '2'"),
        (hf(rope_scaling=LINEAR | {"factor": 0}), "rope factor must be a finite number above 0, found 0"),
        (hf(rope_scaling={k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}), "needs 'low_freq_factor'"),
        (hf(rope_scaling=LLAMA3 | {"high_freq_factor": 1.0}), "must be above low_freq_factor (1.0), found 1.0"),
        (hf(rope_scaling=LLAMA3 | {"original_max_position_embeddings": 0.5}), "positive integer, found 0.5"),
        (hf(rope_parameters={"partial_rotary_factor": 0.25}), "rope_parameters.partial_rotary_factor must be 1"),
        (hf(rope_parameters={"full_attention": {"rope_type": "default"}}), "differs between layers ('full_attention')"),
    ],
)
def test_wrong_config_is_named_in_one_line(config: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig.from_hf(config, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert words in message
    assert "\n" not in message


def test_configs_are_frozen_and_hashable() -> None:
    config = ModelConfig.from_hf(hf(rope_scaling=LINEAR))
    assert hash(config) == hash(ModelConfig.from_hf(hf(rope_scaling=LINEAR)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


def test_rope_scaling_of_another_kind() -> None:
    with pytest.raises(InputError, match="rope type 'default' is not supported"):
        RopeScaling("default", 1.0)


def test_draft_defaults_are_the_paper_s() -> None:
    assert DraftConfig() == DraftConfig(exit_layer=None, max_draft_len=6, threshold=0.6)
    assert DraftConfig(exit_layer=1, max_draft_len=1, threshold=0) == DraftConfig(1, 1, 0.0)
    assert DraftConfig(threshold=1).threshold == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": 0}, "exit_layer must be a positive integer, found 0"),
        ({"exit_layer": 2.0}, "exit_layer must be a positive integer, found 2.0"),
        ({"exit_layer": True}, "exit_layer must be a positive integer, found True"),
        ({"max_draft_len": 0}, "max_draft_len must be a positive integer, found 0"),
        ({"max_draft_len": "6"}, "max_draft_len must be a positive integer, found '6'"),
        ({"max_draft_len": None}, "max_draft_len must be a positive integer, found None"),
        ({"threshold": -0.1}, "threshold must be between 0 and 1, found -0.1"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1, found 1.5"),
        ({"threshold": NAN}, "threshold must be between 0 and 1, found nan"),
        ({"threshold": None}, "threshold must be between 0 and 1, found None"),
        ({"threshold": True}, "threshold must be between 0 and 1, found True"),
    ],
)
def test_wrong_draft_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DraftConfig(**settings)
    assert str(caught.value) == message


SINGLE, TREE = DraftConfig(2, 6, 0.3), DraftConfig(2, 6, 0.1, TreeConfig(3, 12))


@pytest.mark.parametrize(
    ("given", "over_single", "over_tree"),
    [
        ({}, SINGLE, TREE),
        ({"tree": True}, DraftConfig(2, 6, 0.4, TreeConfig(10, 32)), TREE),
        ({"tree": False}, SINGLE, DraftConfig(2, 6, 0.6)),
        ({"tree": True, "threshold": 0.2, "tree_budget": 20}, (2, 6, 0.2, 10, 20), (2, 6, 0.2, 3, 20)),
        ({"tree": True, "max_draft_len": 4, "tree_topk": 5}, (2, 4, 0.4, 5, 32), (2, 4, 0.1, 5, 12)),
        ({"tree": False, "threshold": 0.0, "max_draft_len": 9}, DraftConfig(2, 9, 0.0), DraftConfig(2, 9, 0.0)),
        ({"max_draft_len": 2}, DraftConfig(2, 2, 0.3), (2, 2, 0.1, 3, 12)),
        ({"tree_topk": 5}, "tree_topk and --tree_budget change nothing without --tree", (2, 6, 0.1, 5, 12)),
        ({"max_draft_len": 13}, DraftConfig(2, 13, 0.3), "tree_budget must be at least max_draft_len (13)"),
        ({"tree": True, "tree_budget": 5}, *["tree_budget must be at least max_draft_len (6)"] * 2),
    ],
)
def test_what_is_given_goes_before_what_is_written(given, over_single, over_tree) -> None:
    for written, expected in ((SINGLE, over_single), (TREE, over_tree)):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=re.escape(expected)):
                DraftOverrides(**given).over(written)
        else:
            if isinstance(expected, tuple):
                expected = DraftConfig(*expected[:3], TreeConfig(*expected[3:]))
            assert DraftOverrides(**given).over(written) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tree": False, "tree_topk": 3}, "change nothing with --notree"),
        ({"tree_topk": 0}, "tree_topk must be a positive integer, found 0"),
        ({"tree": True, "tree_budget": -1}, "tree_budget must be a positive integer, found -1"),
        ({"tree": True, "tree_budget": 4, "max_draft_len": 5}, "tree_budget must be at least max_draft_len (5)"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1, found 1.5"),
    ],
)
def test_what_cannot_be_given_is_named_before_anything_is_read(given, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DraftOverrides(**given)


def test_how_settings_are_named_in_reports() -> None:
    assert str(SINGLE) == "gamma 6, eta 0.3"
    assert str(TREE) == "gamma 6, eta 0.1, trees of K 3 and budget 12"


def test_sampling_defaults_are_greedy() -> None:
    assert SamplingConfig() == SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    assert SamplingConfig(1, 1, 5, 2**32 - 1) == SamplingConfig(1.0, 1.0, 5, 2**32 - 1)
    assert hash(SamplingConfig(seed=[1, 2])) == hash(SamplingConfig(seed=(1, 2)))
    assert SamplingConfig(seed=range(3)).seed == (0, 1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().temperature = 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number, 0 or above, found -0.1"),
        ({"temperature": NAN}, "temperature must be a finite number, 0 or above, found nan"),
        ({"temperature": math.inf}, "temperature must be a finite number, 0 or above, found inf"),
        ({"temperature": None}, "temperature must be a finite number, 0 or above, found None"),
        ({"temperature": True}, "temperature must be a finite number, 0 or above, found True"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, found 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, found 1.01"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1, found nan"),
        ({"top_p": "0.9"}, "top_p must be above 0 and at most 1, found '0.9'"),
        ({"top_k": -1}, "top_k must be an integer, 0 or above, found -1"),
        ({"top_k": 2.0}, "top_k must be an integer, 0 or above, found 2.0"),
        ({"top_k": True}, "top_k must be an integer, 0 or above, found True"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**32 - 1, found -1"),
        ({"seed": 2**32}, f"seed must be an integer from 0 to 2**32 - 1, found {2**32}"),
        ({"seed": 0.5}, "seed must be an integer from 0 to 2**32 - 1, found 0.5"),
        ({"seed": "7"}, "seed must be an integer from 0 to 2**32 - 1, found '7'"),
        ({"seed": [1, None]}, "seed must be an integer from 0 to 2**32 - 1, found None"),
    ],
)
def test_wrong_sampling_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingConfig(**settings)
    assert str(caught.value) == message
