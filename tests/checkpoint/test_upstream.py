"""The authors' adapters, as they saved them, against the layer written out in PyTorch on their tensors.

How their whole decoding loop behaves with them is compared in tests/decode/test_golden.py.
"""

import json
import pathlib
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.checkpoint import upstream
from kangaroo_jax.checkpoint.adapter import load_adapter, metadata_of, named_leaves, save_adapter
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import adapter_apply
from kangaroo_jax.model.drafts.memory import MemoryAdapter

torch = pytest.importorskip("torch", reason="the authors' adapters are PyTorch files, which need torch to read")
import safetensors.torch  # noqa: E402 - needs torch

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"


@pytest.fixture(scope="module", params=["mha", "gqa"])
def pair(request):
    """Target and the authors' adapter folder."""
    target = load_target(str(GOLDEN / f"tiny-{request.param}"), "float32")
    return target, GOLDEN / f"tiny-{request.param}-adapter"


def reference(tensors, config, hidden):
    """RMSNorm, causal attention with rotary positions, residual, RMSNorm, in float64."""
    tensors = {name: x.double() for name, x in tensors.items()}
    batch, time, _ = hidden.shape

    def norm(x, weight):
        return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)

    half = config.head_dim // 2
    angles = torch.arange(time)[:, None] / config.rope_theta ** (torch.arange(half) / half)

    def heads(name, turned):
        x = normed @ tensors[f"layers.0.self_attn.{name}_proj.weight"].T
        x = x.reshape(batch, time, -1, config.head_dim).transpose(1, 2)
        if turned:  # pairs (i, i + half) are turned by the angle of i
            first, second = x[..., :half], x[..., half:]
            cos, sin = angles.cos(), angles.sin()
            x = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return x.repeat_interleave(config.num_attention_heads // x.shape[1], dim=1)

    normed = norm(hidden, tensors["layers.0.input_layernorm.weight"])
    q, k, v = heads("q", True), heads("k", True), heads("v", False)
    scores = q @ k.transpose(-1, -2) / config.head_dim**0.5
    scores = scores.masked_fill(torch.ones(time, time, dtype=torch.bool).triu(1), -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, -1)
    out = hidden + mixed @ tensors["layers.0.self_attn.o_proj.weight"].T
    return norm(out, tensors["norm.weight"])


def test_output_equals_the_layer_written_out(pair):
    target, folder = pair
    adapter = upstream.load_upstream(folder, target, jnp.float32)
    assert load_adapter(folder, target).exit_layer is None
    hidden = np.random.default_rng(0).normal(size=(2, 9, target.config.hidden_size)).astype(np.float32)
    found, _ = adapter_apply(adapter, jnp.asarray(hidden), jnp.broadcast_to(jnp.arange(9), (2, 9)))
    expected = reference(torch.load(folder / "pytorch_model.bin"), target.config, torch.tensor(hidden).double()).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_folder_as_newer_versions_save_it_gives_the_same_adapter(pair, tmp_path):
    target, folder = pair
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    wrapped = {f"module.{name}": x.contiguous() for name, x in tensors.items()}
    expected = named_leaves(load_adapter(folder, target).model)
    for name, save in (("model.safetensors", safetensors.torch.save_file), ("pytorch_model.bin", torch.save)):
        for form, named in (
            ("plain", {x.removeprefix("module."): y for x, y in wrapped.items()}),
            ("wrapped", wrapped),
        ):
            copy = tmp_path / form / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(folder / "config.json", copy.parent)
            save(named, copy)
            found = load_adapter(copy.parent, target)
            assert found.exit_layer is None
            for path, x in named_leaves(found.model).items():
                assert np.array_equal(x, expected[path]), (form, name, path)
            copy.unlink()


def convert(**arguments):
    words = [f"--{name}={value}" for name, value in arguments.items()]
    command = [sys.executable, "-m", "kangaroo_jax.cli.convert", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("pair", ["gqa"], indirect=True)
def test_command_converts(pair, tmp_path):
    target, folder = pair
    done = convert(adapter=folder, target=target.name, exit_layer=3, output=tmp_path / "converted")
    assert done.returncode == 0, done.stderr
    converted, original = load_adapter(tmp_path / "converted", target), load_adapter(folder, target)
    assert converted.exit_layer == 3
    for path, x in named_leaves(original.model).items():
        assert np.array_equal(named_leaves(converted.model)[path], x)


@pytest.mark.parametrize("pair", ["gqa"], indirect=True)
def test_command_names_what_is_wrong(pair, tmp_path):
    target, folder = pair
    done = convert(adapter=folder, target=target.name, exit_layer=8, output=tmp_path / "converted")
    assert done.returncode == 2
    assert done.stderr == "convert: error: exit_layer: expected 1 to 7 (the target has 8 layers), found 8\n"
    assert not (tmp_path / "converted").exists()


def test_command_names_a_flag_that_is_missing(tmp_path):
    done = convert(adapter=GOLDEN / "tiny-gqa-adapter", target="y", output=tmp_path / "converted")
    assert done.returncode == 2
    assert done.stderr.startswith("convert: error: --exit_layer is missing; Number of shallow layers")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(GOLDEN / "tiny-gqa-adapter", folder)
    return folder


@pytest.fixture(scope="module")
def gqa():
    return load_target(str(GOLDEN / "tiny-gqa"), "float32")


@pytest.mark.long
def test_command_writes_an_adapter_of_our_own_in_bfloat16(gqa, tmp_path):
    adapter = MemoryAdapter(gqa.config, rngs=nnx.Rngs(0), mlp_size=8)
    training = {"steps": 3}
    save_adapter(tmp_path / "run" / "3", adapter, exit_layer=3, target=gqa, training=training)
    done = convert(adapter=tmp_path / "run", target=gqa.name, output=tmp_path / "written")
    assert done.returncode == 0, done.stderr
    assert metadata_of(tmp_path / "written")["training"] == training
    written = load_adapter(tmp_path / "written", gqa)
    assert written.exit_layer == 3
    for path, x in named_leaves(adapter).items():
        assert np.array_equal(named_leaves(written.model)[path], x.astype(jnp.bfloat16).astype(jnp.float32)), path
    in_int8 = load_target(gqa.name, "float32", weights="int8")
    save_adapter(tmp_path / "int8" / "3", adapter, exit_layer=3, target=in_int8, training=training)
    done = convert(adapter=tmp_path / "int8", target=gqa.name, output=tmp_path / "written_int8")
    assert done.returncode == 0, done.stderr
    assert load_adapter(tmp_path / "written_int8", in_int8).other_target is None  # for the target that it was made for
    done = convert(adapter=tmp_path / "run", target=gqa.name, exit_layer=2, output=tmp_path / "other")
    assert done.stderr == "convert: error: --exit_layer: the adapter was trained for 3; leave the flag out\n"
    assert not (tmp_path / "other").exists()


def message_for(folder, target) -> str:
    with pytest.raises(InputError) as error:
        upstream.load_upstream(folder, target, jnp.float32)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 256, "config.json: hidden_size is not that of the target"),
        ("num_attention_heads", 8, "num_attention_heads is not that of the target"),
        ("num_key_value_heads", 4, "expected 2, found 4"),
        ("vocab_size", 32000, "expected 259, found 32000"),
        ("rope_theta", 5e5, "expected 10000.0, found 500000.0"),
        ("rms_norm_eps", 1e-5, "expected 1e-06, found 1e-05"),
    ],
)
def test_a_config_that_is_not_the_targets_is_named(copy, gqa, key, value, expected):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    assert expected in message_for(copy, gqa)


def test_missing_files_are_named(copy, gqa):
    (copy / "pytorch_model.bin").rename(copy / "other.bin")
    assert "no weights; expected model.safetensors or pytorch_model.bin" in message_for(copy, gqa)
    (copy / "config.json").unlink()
    assert "config.json: no such file" in message_for(copy, gqa)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda x: x.pop("norm.weight"), "tensor norm.weight is missing; expected shape [128], found nothing"),
        (
            lambda x: x.update({"layers.0.self_attn.k_proj.weight": torch.zeros(128, 128)}),
            "tensor layers.0.self_attn.k_proj.weight has the wrong shape; expected [64, 128], found [128, 128]",
        ),
        (lambda x: x.update({"layers.0.mlp.up_proj.weight": torch.zeros(2)}), "layers.0.mlp.up_proj.weight is surplus"),
        (
            lambda x: x.update({"norm.weight": torch.ones(128, dtype=torch.float64)}),
            "tensor norm.weight has an unsupported dtype; expected F32, F16, BF16, found torch.float64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(copy, gqa, change, expected):
    tensors = torch.load(copy / "pytorch_model.bin")
    change(tensors)
    torch.save(tensors, copy / "pytorch_model.bin")
    assert expected in message_for(copy, gqa)


def test_a_truncated_file_is_named(copy, gqa):
    file = copy / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:1000])
    assert "pytorch_model.bin: truncated or not a PyTorch state dict" in message_for(copy, gqa)


def test_half_precision_is_read_exactly(copy, gqa):
    tensors = {name: x.to(torch.bfloat16) for name, x in torch.load(copy / "pytorch_model.bin").items()}
    torch.save(tensors, copy / "pytorch_model.bin")
    loaded = upstream.load_upstream(copy, gqa, jnp.float32)
    expected = tensors["layers.0.self_attn.o_proj.weight"].float().numpy().T
    assert np.array_equal(loaded.layers[0].self_attn.o_proj[...], expected)
