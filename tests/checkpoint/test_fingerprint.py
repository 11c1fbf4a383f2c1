"""Fingerprints: an adapter is accepted by the target it was trained for, and by no other, whatever the version of this
package that recorded it."""

import dataclasses
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kangaroo_jax import demo
from kangaroo_jax.checkpoint.adapter import load_adapter, read_metadata, save_adapter
from kangaroo_jax.checkpoint.fingerprint import constants, fingerprints, same_constants
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig, RopeScaling

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"
SAMPLES = {"embed_tokens.weight": np.arange(8, dtype=np.float32), "norm.weight": np.ones(4, np.float32)}


def config(kind: type[ModelConfig] = ModelConfig, **changes: object) -> ModelConfig:
    shape = {
        "model_type": "llama",
        "vocab_size": 61,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
    }
    return kind(**(shape | changes))


def copy_of(original: pathlib.Path, folder: pathlib.Path, **changes: object) -> pathlib.Path:
    """A target's folder with keys of its config.json changed."""
    shutil.copytree(original, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_the_demo_keeps_its_fingerprints_or_every_saved_adapter_is_refused() -> None:
    """The first is recorded in adapters of today, the second in those from before fingerprints had a version. Where
    this fails, what is hashed has changed: put it back, or give the new digest a version of its own and keep these."""
    target = load_target(demo.MODEL, "float32")
    assert (target.fingerprint, *target.other_fingerprints)[:2] == ("v2:49f3979cb506909b", "d008550125e251b5")


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_adapters_from_before_fingerprints_had_a_version_are_accepted(variant: str) -> None:
    folder = GOLDEN / f"tiny-{variant}-adapter-orbax"
    target = load_target(GOLDEN / f"tiny-{variant}", "float32")
    assert read_metadata(folder)["target"]["fingerprint"] in target.other_fingerprints
    load_adapter(folder, target)


def test_follows_the_weights_whatever_dtype_they_are_loaded_in(tmp_path: pathlib.Path) -> None:
    folder = copy_of(GOLDEN / "tiny-gqa", tmp_path / "target")
    original = load_target(folder, "float32")
    again = load_target(folder, "bfloat16")
    assert (again.fingerprint, again.other_fingerprints) == (original.fingerprint, original.other_fingerprints)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] += 1e-3
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    other = load_target(folder, "float32")
    assert not {other.fingerprint, *other.other_fingerprints} & {original.fingerprint, *original.other_fingerprints}


def test_an_adapter_outlives_an_edit_of_the_context_length_alone(tmp_path: pathlib.Path) -> None:
    longer = load_target(copy_of(demo.MODEL, tmp_path / "longer", max_position_embeddings=4096), "float32")
    assert longer.config.max_position_embeddings == 4096
    adapter = load_adapter(demo.ADAPTER, longer)
    turned = load_target(copy_of(demo.MODEL, tmp_path / "turned", rope_theta=20000.0), "float32")
    with pytest.raises(InputError, match="trained for another target"):
        load_adapter(demo.ADAPTER, turned)
    save_adapter(tmp_path / "adapter", adapter.model, exit_layer=2, target=longer)
    load_adapter(tmp_path / "adapter", load_target(demo.MODEL, jnp.float32))


def test_a_field_added_later_counts_only_where_it_is_not_its_default() -> None:
    field = ("qk_norm", bool, dataclasses.field(default=False))
    later = dataclasses.make_dataclass("Later", [field], bases=(ModelConfig,), frozen=True)
    before = fingerprints(config(), SAMPLES)
    assert fingerprints(config(later), SAMPLES) == before
    assert not set(fingerprints(config(later, qk_norm=True), SAMPLES)) & set(before)


def test_a_field_added_to_rotary_scaling_later_counts_only_where_it_is_not_its_default() -> None:
    field = ("attention_factor", float, dataclasses.field(default=1.0))
    later = dataclasses.make_dataclass("Later", [field], bases=(RopeScaling,), frozen=True)
    before = fingerprints(config(rope_scaling=RopeScaling("linear", 2.0)), SAMPLES)[0]
    assert fingerprints(config(rope_scaling=later("linear", 2.0)), SAMPLES)[0] == before
    assert fingerprints(config(rope_scaling=later("linear", 2.0, attention_factor=0.5)), SAMPLES)[0] != before


@pytest.mark.parametrize("changes", [{"max_position_embeddings": 64}, {"bos_token_id": 3}, {"eos_token_ids": (1, 2)}])
def test_what_no_logit_depends_on_does_not_count(changes: dict[str, object]) -> None:
    assert fingerprints(config(**changes), SAMPLES)[0] == fingerprints(config(), SAMPLES)[0]


def test_an_adapter_serves_the_same_model_under_another_model_type(tmp_path: pathlib.Path) -> None:
    """A Mistral whose window no text is longer than is a Llama."""
    same = {"model_type": "mistral", "sliding_window": 1024, "max_position_embeddings": 1024}
    mistral = load_target(copy_of(demo.MODEL, tmp_path / "mistral", **same), "float32")
    adapter = load_adapter(demo.ADAPTER, mistral)
    assert adapter.other_target is None
    save_adapter(tmp_path / "adapter", adapter.model, exit_layer=2, target=mistral)
    assert load_adapter(tmp_path / "adapter", load_target(demo.MODEL, "float32")).other_target is None
    windowed = load_target(copy_of(demo.MODEL, tmp_path / "windowed", **same | {"sliding_window": 1023}), "float32")
    with pytest.raises(InputError, match="trained for another target"):
        load_adapter(demo.ADAPTER, windowed)


def test_a_model_type_that_means_the_same_model_is_no_other_shape() -> None:
    recorded = constants(config(model_type="mistral"))
    assert same_constants(recorded, config())
    assert not same_constants(recorded, config(num_key_value_heads=3))
    assert not same_constants(recorded | {"model_type": "olmo2"}, config())


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "olmo2"},
        {"num_attention_heads": 4},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": 1e-5},
        {"rope_theta": 20000.0},
        {"rope_scaling": RopeScaling("linear", 2.0)},
        {"tie_word_embeddings": True},
        {"o_bias": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_logits_depend_on_counts(changes: dict[str, object]) -> None:
    assert not set(fingerprints(config(**changes), SAMPLES)) & set(fingerprints(config(), SAMPLES))


def test_the_weights_and_their_names_count() -> None:
    before = fingerprints(config(), SAMPLES)
    values = SAMPLES | {"norm.weight": np.zeros(4, np.float32)}
    assert not set(fingerprints(config(), values)) & set(before)
    names = {"embed_tokens.weight": SAMPLES["embed_tokens.weight"], "other.weight": SAMPLES["norm.weight"]}
    assert fingerprints(config(), names)[0] != before[0]
