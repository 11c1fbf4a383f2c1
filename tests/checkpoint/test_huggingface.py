"""Targets in Hugging Face format, compared with transformers (torch).

The logits in tests/fixtures/hf_logits/ come from transformers through tests/fixtures/make_hf_logits.py; where torch is
installed, transformers also runs beside us on random configurations. Damaged checkpoints are made here, one for each
thing that can be wrong, and must be named in one line.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from kangaroo_jax import demo, generate_plain
from kangaroo_jax.checkpoint import folder_source
from kangaroo_jax.checkpoint.target import Target, default_dtype, load_target, save_target
from kangaroo_jax.engine.prompts import encode_prompts
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ROPE_KINDS
from kangaroo_jax.model.families import all_families
from kangaroo_jax.model.sharding import make_mesh
from kangaroo_jax.model.target import shallow_apply
from tests.checkpoint.forward import assert_same_logits, forward
from tests.tokens import byte_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "hf_logits"
VARIANTS = sorted(folder.name for folder in FIXTURES.iterdir())

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A good checkpoint, to be damaged."""
    return pathlib.Path(shutil.copytree(FIXTURES / "gqa", tmp_path / "target"))


def read_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write_tensors(folder: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(file: pathlib.Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def shard(folder: pathlib.Path) -> dict[str, list[str]]:
    """Splits model.safetensors in two, as save_pretrained does. Returns the tensors of each shard."""
    tensors = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-0000{i}-of-00002.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        shards[file] = part
    write_index(folder, shards)
    return shards


def write_index(folder: pathlib.Path, shards: dict[str, list[str]]) -> None:
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: pathlib.Path | str, *words: str, dtype: str = "float32", compute_dtype: str | None = None) -> str:
    """Loads what cannot be loaded; the message is one line with all of `words` in it."""
    with pytest.raises(InputError) as caught:
        load_target(folder, dtype, compute_dtype=compute_dtype)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


# Logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_equal_stored_ones_of_transformers(variant: str) -> None:
    target = load_target(FIXTURES / variant, "float32")
    assert {leaf.dtype for leaf in jax.tree.leaves(target.model)} == {jnp.dtype("float32")}
    tokens, expected = (np.load(FIXTURES / variant / f"{name}.npy") for name in ("tokens", "logits"))
    assert_same_logits(forward(target.model, tokens), expected, 1e-4)


def test_fixtures_cover_every_variant() -> None:
    configs = [json.loads((FIXTURES / name / "config.json").read_text()) for name in VARIANTS]
    ropes = [config["rope_parameters"] for config in configs]
    rope = {x["rope_type"] for rope in ropes for x in ([rope] if "rope_type" in rope else rope.values())}
    assert {config["model_type"] for config in configs} == {family.model_type for family in all_families()}
    assert rope == {"default", *ROPE_KINDS}
    assert any(c["num_key_value_heads"] == c["num_attention_heads"] for c in configs)
    assert any(c["num_key_value_heads"] < c["num_attention_heads"] for c in configs)
    assert any(c.get("head_dim", 8) != c["hidden_size"] // c["num_attention_heads"] for c in configs)
    assert {c.get("tie_word_embeddings") for c in configs} == {True, False}
    assert any(c.get("attention_bias") for c in configs)
    assert any(c.get("mlp_bias") for c in configs)


@pytest.mark.parametrize("variant", ["gqa", "llama3", "mlp_bias", "qwen2_tied"])
def test_bfloat16_logits_are_near_stored_ones_of_transformers(variant: str) -> None:
    """bfloat16 keeps 8 bits. Of the logits' scale, transformers' own bfloat16 is off by 0.5 % on average and 7.5 % at
    most on these models."""
    target = load_target(FIXTURES / variant, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(target.model)} == {jnp.dtype("bfloat16")}
    tokens, expected = (np.load(FIXTURES / variant / f"{name}.npy") for name in ("tokens", "logits"))
    found = forward(target.model, tokens)
    assert_same_logits(found, expected, 0.1)
    assert np.abs(np.asarray(found) - expected).mean() < 0.007 * np.abs(expected).max()


@pytest.mark.parametrize("variant", ["linear", "llama3", "rope_theta"])
def test_old_spelling_of_rope_keys_gives_the_same_logits(variant: str, tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(FIXTURES / variant, tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope["type"] == "default" else rope
    (folder / "config.json").write_text(json.dumps(config))
    tokens, expected = (np.load(folder / f"{name}.npy") for name in ("tokens", "logits"))
    assert_same_logits(forward(load_target(folder, "float32").model, tokens), expected, 1e-4)


# Formats


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_files_load_in_every_dtype(folder: pathlib.Path, stored: np.dtype) -> None:
    write_tensors(folder, {name: x.astype(stored) for name, x in read_tensors(folder).items()})
    expected = read_tensors(folder)["model.embed_tokens.weight"]
    assert expected.dtype == stored
    for dtype in ("float32", "bfloat16", "float16"):
        found = load_target(folder, dtype).model.embed_tokens[...]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), expected.astype(dtype))


def test_shards_give_the_same_arrays_as_one_file(folder: pathlib.Path) -> None:
    whole = load_target(folder, "float32")
    shard(folder)
    parts = load_target(folder, "float32")
    jax.tree.map(np.testing.assert_array_equal, whole.model, parts.model)
    assert whole.fingerprint == parts.fingerprint


def test_stored_rotary_frequencies_and_tied_head_are_no_surplus(tmp_path: pathlib.Path) -> None:
    folder = shutil.copytree(FIXTURES / "tied", tmp_path / "target")
    before = load_target(folder, "float32")
    tensors = read_tensors(folder)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_tensors(folder, tensors)
    jax.tree.map(np.testing.assert_array_equal, before.model, load_target(folder, "float32").model)


@needs_torch
def test_a_head_that_is_not_the_embedding_it_should_be_tied_to_is_used_as_in_transformers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tests.fixtures.make_hf_logits import logits_of

    monkeypatch.setattr(folder_source, "_BAND", 100)  # several, the last of which differs alone
    folder = shutil.copytree(FIXTURES / "tied", tmp_path / "target")
    tensors = read_tensors(folder)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1] = head[0] + 1
    write_tensors(folder, tensors | {"lm_head.weight": head})
    target = load_target(folder, "float32")
    assert not target.config.tie_word_embeddings
    assert target.fingerprint != load_target(FIXTURES / "tied", "float32").fingerprint
    tokens = np.arange(12)[None]
    expected = logits_of(read_by_transformers(folder, torch.float32), tokens)
    assert_same_logits(forward(target.model, jnp.asarray(tokens)), expected, 1e-4)
    write_tensors(folder, tensors | {"lm_head.weight": head[:-1]})
    refused(folder, "lm_head.weight", "wrong shape")


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_target_loads_as_identical_arrays(variant: str, tmp_path: pathlib.Path) -> None:
    target = load_target(FIXTURES / variant, "bfloat16")
    save_target(target.model, tmp_path, jnp.bfloat16)
    again = load_target(tmp_path, "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, target.model, again.model)
    assert again.config == target.config


def test_linear_rope_scaling_multiplies_the_context_and_llama3s_does_not(tmp_path: pathlib.Path) -> None:
    linear = load_target(FIXTURES / "linear", "float32")
    given = linear.config.max_position_embeddings
    factor = linear.config.rope_scaling.factor
    assert factor > 1
    last = int(given * factor)
    assert len(encode_prompts(linear, [[1] * (last - 1)], 1, None)[0]) == last - 1
    with pytest.raises(InputError, match=f"the context is {last}"):
        encode_prompts(linear, [[1] * last], 1, None)
    llama3 = load_target(FIXTURES / "llama3", "float32")
    with pytest.raises(InputError, match=f"the context is {llama3.config.max_position_embeddings};"):
        encode_prompts(llama3, [[1] * llama3.config.max_position_embeddings], 1, None)


def test_generation_config_overrides_the_end_of_sequence(folder: pathlib.Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert load_target(folder, "float32").eos_token_ids == (7, 9)
    (folder / "generation_config.json").unlink()
    assert load_target(folder, "float32").eos_token_ids == (2,)


def with_eos(source: pathlib.Path, folder: pathlib.Path, configured: object, token: str | None) -> Target:
    """A copy of a target whose configuration names one EOS and whose tokenizer another."""
    shutil.copytree(source, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": configured}))
    tokenizer = byte_tokenizer("<pad>", "<beyond>")
    tokenizer.eos_token = token
    tokenizer.save_pretrained(folder)
    return load_target(folder, "float32")


@pytest.mark.parametrize(
    ("configured", "token", "expected"),
    [
        (7, "<s>", (7, 256)),
        (257, "</s>", (257,)),
        ([7, 257], "</s>", (7, 257)),
        (7, None, (7,)),
        # It is not written by a model that has no row for it.
        (7, "<beyond>", (7,)),
        ([7, 259], "<s>", (7, 256)),
    ],
)
def test_eos_ids_are_the_configurations_and_the_tokenizers(configured, token, expected, target_folder, tmp_path):
    target = with_eos(target_folder, tmp_path / "target", configured, token)
    assert target.config.vocab_size == 259
    assert target.eos_token_ids == expected


def test_a_text_ends_at_the_tokenizers_eos_too(target, target_folder, tmp_path: pathlib.Path) -> None:
    written = generate_plain(target, [[5]], 20, eos_token_ids=()).tokens[0]
    end = written.index(written[6])
    token = target.tokenizer.convert_ids_to_tokens(written[end])
    other = with_eos(target_folder, tmp_path / "target", 257, token)
    assert 257 not in written
    assert generate_plain(other, [[5]], 20).tokens[0] == written[: end + 1]
    assert generate_plain(other, [[5]], 20, eos_token_ids=[257]).tokens[0] == written  # unless the caller says


# transformers beside us


def random_variant(seed: int) -> tuple[str, dict[str, object]]:
    rng = np.random.default_rng(seed)
    architecture = ("llama", "mistral", "qwen2")[seed % 3]
    kv_heads, groups = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    head_dim = 2 * int(rng.integers(2, 8))
    settings = {
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * groups,
        "hidden_size": kv_heads * groups * int(rng.integers(6, 12)),
        "head_dim": head_dim,
        "intermediate_size": int(rng.integers(20, 60)),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "vocab_size": int(rng.integers(40, 90)),
        "rms_norm_eps": float(10.0 ** rng.integers(-6, -2)),
        "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 16,
    }
    factors = {"factor": float(rng.uniform(1.5, 8)), "original_max_position_embeddings": 8}
    llama3 = factors | {"low_freq_factor": 1.0, "high_freq_factor": float(rng.uniform(2, 5))}
    kind, fields = [("default", {}), ("linear", {"factor": factors["factor"]}), ("llama3", llama3)][rng.integers(3)]
    settings["rope_parameters"] = {"rope_type": kind, "rope_theta": float(rng.uniform(100, 1e6)), **fields}
    if architecture == "llama":
        settings |= {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    if architecture == "mistral":
        settings["sliding_window"] = None
    return architecture, settings


def split_pytorch(model: object, folder: pathlib.Path, dtype: object) -> None:
    """Two pytorch_model*.bin and their index, as transformers 4 wrote them (5 writes safetensors alone)."""
    import torch

    state = {name: x.to(dtype) for name, x in model.state_dict().items()}
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-0000{i + 1}-of-00002.bin"
        part = {name: x.clone() for name, x in list(state.items())[i::2]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_by_transformers(folder: pathlib.Path, dtype: object) -> object:
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@needs_torch
@pytest.mark.parametrize("seed", range(9))
def test_logits_equal_those_of_transformers_beside_us(seed: int, tmp_path: pathlib.Path) -> None:
    import torch

    from tests.fixtures.make_hf_logits import logits_of, make_model

    model = make_model(*random_variant(seed), seed)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 24))
    stored = (torch.float32, torch.float16, torch.bfloat16)[seed // 3]
    model.to(stored).save_pretrained(tmp_path / "safetensors", max_shard_size="20KB")
    assert len(list((tmp_path / "safetensors").glob("model-*.safetensors"))) > 1
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "safetensors" / "config.json", tmp_path / "bin")
    split_pytorch(model, tmp_path / "bin", stored)
    targets = [load_target(tmp_path / name, "float32") for name in ("safetensors", "bin")]
    reference = read_by_transformers(tmp_path / "safetensors", torch.float32)
    assert_same_logits(forward(targets[0].model, tokens), logits_of(reference, tokens), 1e-4)
    jax.tree.map(np.testing.assert_array_equal, targets[0].model, targets[1].model)
    assert targets[0].fingerprint == targets[1].fingerprint


@needs_torch
@pytest.mark.parametrize("seed", range(3))
def test_transformers_loads_what_we_save(seed: int, tmp_path: pathlib.Path) -> None:
    import torch

    from tests.fixtures.make_hf_logits import logits_of, make_model

    model = make_model(*random_variant(seed), seed)
    model.save_pretrained(tmp_path / "theirs")
    save_target(load_target(tmp_path / "theirs", "float32").model, tmp_path / "ours", jnp.float32)
    again = read_by_transformers(tmp_path / "ours", torch.float32)
    tokens = np.random.default_rng(seed).integers(0, model.config.vocab_size, (2, 24))
    np.testing.assert_array_equal(logits_of(again, tokens), logits_of(model, tokens))


@needs_torch
def test_bfloat16_is_as_near_float32_as_that_of_transformers(tmp_path: pathlib.Path) -> None:
    import torch

    from tests.fixtures.make_hf_logits import logits_of, make_model

    model = make_model("llama", {"num_hidden_layers": 3, "num_key_value_heads": 2}, seed=0)
    model.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (4, 48))
    exact = logits_of(model, tokens)
    ours = np.asarray(forward(load_target(tmp_path, "bfloat16").model, tokens))
    theirs = logits_of(read_by_transformers(tmp_path, torch.bfloat16), tokens)
    assert np.abs(ours - exact).mean() < 1.25 * np.abs(theirs - exact).mean()


# Memory

_MEASURE = """
import pathlib, re, sys
import jax.numpy as jnp
from kangaroo_jax.checkpoint.target import load_target
if sys.argv[3] == "torch":
    import torch
load_target(sys.argv[4], "float32")  # what the first load of anything costs
status = lambda key: int(re.search(rf"{key}:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
target = load_target(sys.argv[1], sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("numpy", "float16"),
        pytest.param("numpy", "bfloat16", marks=pytest.mark.long),
        pytest.param("torch", "float16", marks=[needs_torch, pytest.mark.long]),
    ],
)
def test_peak_host_memory_is_below_1_3_of_the_checkpoint(kind: str, dtype: str, tmp_path: pathlib.Path) -> None:
    """On CPU, where the weights themselves are host memory too."""
    hidden, width, layers, vocab = 1024, 2816, 8, 4096
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj": (width, hidden) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, width)}
        shapes |= {f"{layer}.{x}_layernorm": (hidden,) for x in ("input", "post_attention")}
    noise = np.random.default_rng(0).standard_normal(vocab * hidden, np.float32).astype(dtype)
    names = list(shapes)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        tensors = {f"{name}.weight": noise[: np.prod(shapes[name])].reshape(shapes[name]) for name in part}
        file = f"{i}.safetensors" if kind == "numpy" else f"{i}.bin"
        if kind == "numpy":
            safetensors.numpy.save_file(tensors, tmp_path / file)
        else:
            import torch

            torch.save({name: torch.from_numpy(x.copy()) for name, x in tensors.items()}, tmp_path / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = "model.safetensors.index.json" if kind == "numpy" else "pytorch_model.bin.index.json"
    (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
    config = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8} | config))
    size = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert size > 200e6
    command = [sys.executable, "-c", _MEASURE, tmp_path, dtype, kind, FIXTURES / "gqa"]
    growth = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert growth > 0.9 * size, "the weights are not in memory: the measurement is broken"
    assert growth < 1.3 * size, f"the peak is {growth / size:.2f} of the checkpoint"


# What is wrong is named


def test_missing_tensor(folder: pathlib.Path) -> None:
    tensors = read_tensors(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_tensors(folder, tensors)
    refused(folder, "model.safetensors", "model.layers.1.mlp.up_proj.weight", "missing", "expected shape [48, 32]")


def test_surplus_tensor(folder: pathlib.Path) -> None:
    write_tensors(folder, read_tensors(folder) | {"model.layers.0.extra.weight": np.zeros((2, 3), np.float32)})
    refused(folder, "model.safetensors", "model.layers.0.extra.weight", "surplus", "found shape [2, 3]")


def test_layers_beyond_the_config_are_surplus(folder: pathlib.Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    refused(folder, "model.safetensors", "model.layers.1.", "surplus")


def test_head_missing_where_embeddings_are_not_tied(folder: pathlib.Path) -> None:
    tensors = read_tensors(folder)
    del tensors["lm_head.weight"]
    write_tensors(folder, tensors)
    refused(folder, "model.safetensors", "lm_head.weight", "expected shape [67, 32]", "found nothing")


def test_wrong_shape(folder: pathlib.Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    write_tensors(folder, read_tensors(folder) | {name: np.zeros((32, 32), np.float32)})
    refused(folder, "model.safetensors", name, "expected [16, 32]", "found [32, 32]")


@pytest.mark.parametrize(("dtype", "found"), [("float64", "F64"), ("int8", "I8"), ("int64", "I64"), ("bool", "BOOL")])
def test_unsupported_stored_dtype(folder: pathlib.Path, dtype: str, found: str) -> None:
    name = "model.norm.weight"
    write_tensors(folder, read_tensors(folder) | {name: np.ones(32, dtype)})
    refused(folder, "model.safetensors", name, "expected F32, F16, BF16", f"found {found}")


def test_value_beyond_float16(folder: pathlib.Path) -> None:
    tensors = read_tensors(folder)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 1e5
    write_tensors(folder, tensors)
    refused(folder, "model.safetensors", "model.layers.1.mlp.down_proj.weight", "65504", "100000", dtype="float16")
    assert np.isfinite(np.asarray(load_target(folder, "bfloat16").model.layers[1].mlp.down_proj[...], np.float32)).all()


@pytest.mark.parametrize("dtype", ["float64", "int8", "half", "nonsense", "float8_e4m3fn"])
def test_unsupported_dtype_asked_for(folder: pathlib.Path, dtype: str) -> None:
    if dtype == "half":  # numpy's other name for float16
        assert load_target(folder, dtype).model.dtype == jnp.float16
        return
    refused(folder, "dtype", "float32, float16, bfloat16", f"found {dtype!r}", dtype=dtype)


def test_weights_are_computed_with_in_the_dtype_that_is_asked_for(folder: pathlib.Path) -> None:
    dtype, compute_dtype = "bfloat16", "float32"
    target = load_target(folder, dtype, compute_dtype=compute_dtype).model
    assert (target.dtype, target.compute_dtype) == (dtype, compute_dtype)
    tokens = jnp.arange(12)[None]
    hidden, _ = shallow_apply(target, tokens, jnp.arange(12)[None], exit_layer=1)
    assert hidden.dtype == compute_dtype
    # The same weights, rounded first, in the dtype that is computed in.
    rounded = jax.tree.map(lambda x: x.astype(compute_dtype), load_target(folder, dtype).model)
    np.testing.assert_array_equal(np.asarray(forward(target, tokens)), np.asarray(forward(rounded, tokens)))
    assert load_target(folder, dtype).model.compute_dtype == dtype
    refused(folder, "compute_dtype must be one of float32, float16, bfloat16, found 'int8'", compute_dtype="int8")


def test_default_dtype_is_float32_on_cpu_and_bfloat16_on_accelerators(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_target(folder).model.dtype == jnp.float32  # the tests run on CPU
    assert default_dtype() == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert load_target(folder).model.dtype == jnp.bfloat16
    assert load_target(folder, "float32").model.dtype == jnp.float32
    assert default_dtype() == "bfloat16"
    # What counts is where the weights go, not the default device.
    mesh = make_mesh({"data": 1, "fsdp": 1, "model": 1}, jax.devices("cpu")[:1])
    assert load_target(folder, mesh=mesh).model.dtype == jnp.float32


def damaged(data: bytes, kind: str) -> bytes:
    header = int.from_bytes(data[:8], "little")
    return {
        "empty": b"",
        "cut in the length": data[:5],
        "cut in the header": data[: 8 + header // 2],
        "cut in the data": data[:-100],
        "one header byte": data[:40] + b"\x00" + data[41:],
        "header of another dtype": data.replace(b'"F32"', b'"F33"', 1),
        "offset beyond the data": data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
        "header length": b"\xff" * 8 + data[8:],
        "surplus data": data + b"\x00" * 64,
        "a web page": b"<!DOCTYPE html><html><body>Access denied</body></html>",
        "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "empty",
        "cut in the length",
        "cut in the header",
        "cut in the data",
        "one header byte",
        "header of another dtype",
        "offset beyond the data",
        "header length",
        "surplus data",
        "a web page",
        "a Git LFS pointer",
    ],
)
def test_corrupt_safetensors(folder: pathlib.Path, kind: str) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(damaged(data, kind))
    assert file.read_bytes() != data
    refused(folder, str(file), "truncated or not a safetensors file", "fetch it again")


def test_corrupt_shard_is_the_one_named(folder: pathlib.Path) -> None:
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(folder, str(file), "truncated")


def test_weights_that_cannot_be_opened(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, str(folder / "model.safetensors"))


def test_no_weights(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder), "no weights", "model.safetensors", "pytorch_model.bin")


def test_missing_shard(folder: pathlib.Path) -> None:
    shard(folder)
    file = folder / "model-00002-of-00002.safetensors"
    file.unlink()
    refused(folder, str(file), "no such file", "model.safetensors.index.json")


def test_tensor_in_two_shards(folder: pathlib.Path) -> None:
    shards = shard(folder)
    first, second = shards
    extra = safetensors.numpy.load_file(folder / first)
    name = shards[first][0]
    tensors = safetensors.numpy.load_file(folder / second) | {name: extra[name]}
    safetensors.numpy.save_file(tensors, folder / second)
    refused(folder, second, name, "expected in one file", first)


def test_tensor_that_the_index_names_and_its_shard_lacks(folder: pathlib.Path) -> None:
    shards = shard(folder)
    first, second = shards
    name = shards[first].pop()
    shards[second].append(name)
    write_index(folder, shards)
    refused(folder, second, name, "missing", "model.safetensors.index.json", f"found in {first}")
    shards[second][-1] = "model.layers.7.mlp.up_proj.weight"
    write_index(folder, shards)
    refused(folder, second, "model.layers.7.mlp.up_proj.weight", "found nowhere")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", ("not valid JSON",)),
        ("[]", ("expected a JSON object", "list")),
        ("{}", ("weight_map", "None")),
        ('{"weight_map": {}}', ("weight_map", "{}")),
        ('{"weight_map": {"lm_head.weight": "../model.safetensors"}}', ("lm_head.weight", "'../model.safetensors'")),
        ('{"weight_map": {"lm_head.weight": 3}}', ("lm_head.weight", "found 3")),
    ],
)
def test_bad_index(folder: pathlib.Path, index: str, words: tuple[str, ...]) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, "model.safetensors.index.json", *words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("not valid JSON",)),
        (b'{"model_type": "llama"', ("not valid JSON",)),
        (b"\xff\xfe\x00", ("not valid JSON",)),
        (b"[" * 100_000, ("not valid JSON",)),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", ("not valid JSON",)),
        (b'["llama"]', ("expected a JSON object", "list")),
        (b'{"model_type": "gpt2"}', ("model_type 'gpt2'", "gemma2, gemma3_text, granite, llama, ")),
        (b"{}", ("model_type None",)),
    ],
)
def test_bad_config(folder: pathlib.Path, content: bytes, words: tuple[str, ...]) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, str(folder / "config.json"), *words)


def test_a_peft_adapter_is_not_passed_over(folder: pathlib.Path) -> None:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused(folder, str(folder), "adapter_config.json", "merge it into its base model")


def test_missing_config(folder: pathlib.Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "no such file")
    (folder / "config.json").mkdir()
    refused(folder, str(folder / "config.json"), "cannot be read")


@pytest.mark.parametrize(("content", "words"), [("{", ("not valid JSON",)), ('{"eos_token_id": "</s>"}', ("'</s>'",))])
def test_bad_generation_config(folder: pathlib.Path, content: str, words: tuple[str, ...]) -> None:
    (folder / "generation_config.json").write_text(content)
    refused(folder, str(folder / "generation_config.json"), *words)


def test_bad_tokenizer(folder: pathlib.Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, str(folder), "the tokenizer could not be read")


def test_code_that_comes_with_a_tokenizer_is_neither_run_nor_asked_about(folder: pathlib.Path, monkeypatch) -> None:
    shutil.copy(demo.MODEL / "tokenizer.json", folder)
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    proof = folder / "ran"
    (folder / "own.py").write_text(
        f"open({str(proof)!r}, 'w')\nfrom transformers import PreTrainedTokenizerFast\n\n\n"
        "class Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    refused(folder, str(folder), "code of its own, which is never run")
    assert not proof.exists()


def test_tokenizer_of_another_model(folder: pathlib.Path) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(80)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    refused(folder, str(folder), "token id 79", "ends at 66")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"w0": 0, "w1": 1}, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    assert load_target(folder, "float32").tokenizer.encode("w1 w0 w1") == [1, 0, 1]


def test_file_where_a_folder_is_expected(folder: pathlib.Path) -> None:
    refused(folder / "config.json", str(folder / "config.json"), "expected a folder", "GGUF", "found a file")


def test_no_such_folder(folder: pathlib.Path) -> None:
    refused(folder / "nowhere", str(folder / "nowhere"), "no such folder")


def test_hub_out_of_reach(tmp_path: pathlib.Path) -> None:
    """With a hub that does not answer: one line, at once; and what is in the cache still loads."""
    snapshot = tmp_path / "hub" / "models--someone--cached" / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(FIXTURES / "gqa", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    script = (
        "from kangaroo_jax.checkpoint.target import load_target\n"
        "print(load_target('someone/cached', 'float32').fingerprint)\n"
        "load_target('someone/else')\n"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert time.monotonic() - start < 60
    assert done.stdout.strip() == load_target(FIXTURES / "gqa", "float32").fingerprint
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("kangaroo_jax.errors.InputError: someone/else: no such folder")
    assert "Hugging Face hub" in last


# PyTorch files


@pytest.fixture
def pytorch_folder(folder: pathlib.Path) -> pathlib.Path:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = {name: torch.from_numpy(x) for name, x in read_tensors(folder).items()}
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_pytorch_file_gives_the_same_arrays(pytorch_folder: pathlib.Path) -> None:
    found, expected = (load_target(x, "float32") for x in (pytorch_folder, FIXTURES / "gqa"))
    jax.tree.map(np.testing.assert_array_equal, found.model, expected.model)
    assert found.fingerprint == expected.fingerprint


def test_pytorch_file_without_torch(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
    refused(folder, str(folder / "pytorch_model.bin"), "needs torch", "pip install torch")


@pytest.mark.parametrize("kind", ["empty", "cut", "not a state dict", "a list", "a number", "code", "old format"])
def test_bad_pytorch_file(pytorch_folder: pathlib.Path, kind: str) -> None:
    import torch

    file = pytorch_folder / "pytorch_model.bin"
    words = ("truncated or not a PyTorch state dict",)
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "cut":
        file.write_bytes(file.read_bytes()[:-2000])
    elif kind == "not a state dict":
        torch.save({"state": {"weight": torch.ones(2)}, "step": 3}, file)
        words = ("'state'", "expected a tensor", "found dict")
    elif kind == "a list":
        torch.save([torch.ones(2)], file)
        words = ("expected a PyTorch state dict", "found list")
    elif kind == "a number":
        torch.save({"weight": torch.ones(2), "step": 3}, file)
        words = ("'step'", "expected a tensor", "found int")
    elif kind == "code":
        file.write_bytes(pickle.dumps({"weight": os.getcwd}))
    else:
        torch.save({"weight": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        words = (*words, "zip format")
    refused(pytorch_folder, str(file), *words)


def test_pytorch_file_never_runs_code(pytorch_folder: pathlib.Path) -> None:
    import torch

    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (pytorch_folder / "ran",))

    torch.save({"weight": Trap()}, pytorch_folder / "pytorch_model.bin")
    refused(pytorch_folder, str(pytorch_folder / "pytorch_model.bin"))
    assert not (pytorch_folder / "ran").exists()


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_unsupported_dtype_in_a_pytorch_file(pytorch_folder: pathlib.Path, dtype: str) -> None:
    import torch

    file = pytorch_folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors | {"model.norm.weight": torch.ones(32, dtype=getattr(torch, dtype))}, file)
    refused(pytorch_folder, str(file), "model.norm.weight", "expected F32, F16, BF16", f"found torch.{dtype}")
