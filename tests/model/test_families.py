"""What families make of a config.json, compared with what transformers makes of it; and a family made here, in a file.

What a config.json means to transformers is in its models/{llama,mistral,qwen2}/configuration_*.py; needs no torch.
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

from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model import families, sharding
from kangaroo_jax.model.config import RopeScaling
from kangaroo_jax.model.families import all_families, read_config
from kangaroo_jax.model.target import deep_apply, lm_head, shallow_apply

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
        assert read_config(hf(model_type, num_key_value_heads=None)).num_key_value_heads == 64


def test_biases_that_only_llama_reads() -> None:
    mistral = read_config(hf("mistral", attention_bias=True, mlp_bias=True))
    assert (mistral.qkv_bias, mistral.o_bias, mistral.mlp_bias) == (False, False, False)
    qwen2 = read_config(hf("qwen2", attention_bias=True, mlp_bias=True))
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
        read_config(config, "some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert words in message
    assert "\n" not in message


def test_configs_are_frozen_and_hashable() -> None:
    config = read_config(hf(rope_scaling=LINEAR))
    assert hash(config) == hash(read_config(hf(rope_scaling=LINEAR)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3


def test_rope_scaling_of_another_kind() -> None:
    with pytest.raises(InputError, match="rope type 'default' is not supported"):
        RopeScaling("default", 1.0)


def test_every_family_is_found() -> None:
    assert [family.model_type for family in all_families()] == ["llama", "mistral", "qwen2"]


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
    def __init__(self, config, *, rngs, dtype=jnp.float32):
        self.input_layernorm = RMSNorm(config, dtype)
        self.self_attn = Attention(config, rngs=rngs, dtype=dtype)
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
    with pytest.raises(InputError, match="supported: llama, mistral, qwen2, toy"):
        read_config(TOY_CONFIG | {"model_type": "other"})


def test_a_family_whose_file_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="model_type 'toy' is not supported; supported: llama, mistral, qwen2"):
        read_config(TOY_CONFIG)
