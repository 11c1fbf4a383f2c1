"""Targets loaded with int8 weights, compared with float targets of the dequantized ones."""

import json
import pathlib
import shutil
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kangaroo_jax import adapters
from kangaroo_jax.checkpoint.adapter import load_adapter, read_metadata, save_adapter
from kangaroo_jax.checkpoint.target import Target, load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import DraftVocabulary
from kangaroo_jax.model.naming import parameter_paths
from kangaroo_jax.model.ops import as_arrays
from kangaroo_jax.model.quantized import QuantizedArray
from kangaroo_jax.model.sharding import make_mesh
from kangaroo_jax.model.target import logits
from kangaroo_jax.preflight.compiling import abstract_target
from tests.checkpoint.forward import assert_same_logits, forward
from tests.checkpoint.gguf_files import TYPE, metadata, tensors, write

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "fixtures" / "golden"
FIXTURES = ROOT / "tests" / "fixtures" / "hf_logits"
TOKENS = jnp.asarray([[72, 101, 108, 108, 111, 32, 119, 111]])


def rounded(matrix: np.ndarray) -> np.ndarray:
    """A matrix of [outputs, inputs] after int8: each value the nearest of 255 multiples of its row's step."""
    step = np.abs(matrix).max(axis=1, keepdims=True) / np.float32(127)  # float32, which decides near-ties
    step[step == 0] = 1
    return np.round(matrix / step) * step


def rounded_copy(original: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint in floats with the weights that int8 leaves."""
    shutil.copytree(original, folder)
    file = folder / "model.safetensors"
    found = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: rounded(x) if x.ndim == 2 else x for name, x in found.items()}, file)
    return folder


@pytest.mark.parametrize("variant", ["gqa", pytest.param("mha", marks=pytest.mark.long)])
def test_logits_are_those_of_a_float_target_with_the_dequantized_weights(variant, tmp_path):
    original = GOLDEN / f"tiny-{variant}"
    target = load_target(original, "float32", weights="int8")
    exact = load_target(rounded_copy(original, tmp_path / "copy"), "float32")
    expected = np.asarray(forward(exact.model, TOKENS))
    assert_same_logits(forward(target.model, TOKENS), expected, 1e-5)
    assert np.abs(np.asarray(forward(load_target(original, "float32").model, TOKENS)) - expected).max() > 0
    assert (target.model.weights, target.model.arithmetic) == ("int8", "float32, int8 weights")
    assert (target.model.dtype, exact.model.weights) == (jnp.float32, "float")


@pytest.mark.parametrize("name", ["phi3", *(pytest.param(x, marks=pytest.mark.long) for x in ("gemma2", "olmo2"))])
def test_other_families_too_fused_tensors_among_them(name, tmp_path):
    original = FIXTURES / name
    tokens = np.load(original / "tokens.npy")
    target = load_target(original, "float32", weights="int8")
    exact = load_target(rounded_copy(original, tmp_path / "copy"), "float32")
    assert_same_logits(forward(target.model, tokens), np.asarray(forward(exact.model, tokens)), 1e-5)
    assert target.model.layers[0].mlp.gate_up_proj[...].values.dtype == jnp.int8


def test_a_draft_vocabulary_takes_rows_of_the_int8_head():
    model = load_target(GOLDEN / "tiny-gqa", "float32", weights="int8").model
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, model.config.hidden_size)), jnp.float32)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    some = DraftVocabulary(model, jnp.asarray([7, 2, 200]))
    assert some.weight.values.dtype == jnp.int8
    expected = np.asarray(logits(model.config, hidden, head[...].as_array()))[..., [7, 2, 200]]
    np.testing.assert_allclose(logits(model.config, hidden, some.weight[...]), expected, rtol=1e-5, atol=1e-5)


def test_blocks_of_a_gguf_file_are_rounded_again_per_channel(tmp_path):
    stored = tensors(np.random.default_rng(0), TYPE.Q5_0)
    target = load_target(write(tmp_path / "model.gguf", metadata(), stored), "float32", weights="int8")
    matrix = gguf.dequantize(*stored["token_embd.weight"])
    found = target.model.embed_tokens[...].as_array()
    np.testing.assert_allclose(found, rounded(matrix), rtol=1e-6, atol=1e-9)
    # Rounding a second time moves most values: a block's step is finer than its row's.
    assert 0 < np.abs(found - matrix).max() <= 0.5001 * np.abs(matrix).max() / 127
    assert target.is_rounded


def as_float32(path: pathlib.Path, weights: str) -> tuple[Target, dict[str, np.ndarray]]:
    """A target, and the weights that it multiplies."""
    target = load_target(path, "float32", weights=weights)
    arrays = as_arrays(target.model)
    return target, dict(zip(parameter_paths(arrays), map(np.asarray, jax.tree.leaves(arrays)), strict=True))


def test_a_gguf_file_of_q8_0_keeps_its_own_values(tmp_path):
    """With one float16 scale for 32 of them: all weights are those of the float target, bit for bit."""
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(0), TYPE.Q8_0))
    (target, found), (exact, expected) = as_float32(path, "int8"), as_float32(path, "float")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
    assert_same_logits(forward(target.model, TOKENS), np.asarray(forward(exact.model, TOKENS)), 1e-5)
    stored = jax.tree.leaves(target.model, is_leaf=lambda x: isinstance(x, QuantizedArray))
    matrices = [x for x in stored if isinstance(x, QuantizedArray)]
    assert len(matrices) == 2 + 4 * 2
    assert all(sum(x.nbytes for x in jax.tree.leaves(matrix)) == matrix.values.size * 34 / 32 for matrix in matrices)
    # They are the checkpoint's weights, so its name and fingerprint are too.
    assert (target.fingerprint, target.title, target.is_rounded) == (exact.fingerprint, exact.title, False)
    assert target.bytes_read < 0.3 * exact.bytes_read


def test_blocks_are_rounded_per_channel_where_a_compiler_would_copy_them(tmp_path, monkeypatch):
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(0), TYPE.Q8_0))
    monkeypatch.setattr("kangaroo_jax.model.quantized.product_on", lambda devices: "direct")  # as on accelerators
    target = load_target(path, "float32", weights="int8")
    assert target.is_rounded
    assert target.model.embed_tokens[...].scales.shape == (260, 1)


def test_what_else_a_gguf_file_has_is_rounded(tmp_path):
    """Keys alone are not Q8_0: they, and the queries and values that are one matrix with them."""
    stored, others = (tensors(np.random.default_rng(0), kind) for kind in (TYPE.Q8_0, TYPE.Q5_0))
    stored |= {name: x for name, x in others.items() if "attn_k." in name}
    path = write(tmp_path / "model.gguf", metadata(), stored)
    (target, found), (_, expected) = as_float32(path, "int8"), as_float32(path, "float")
    changed = {name for name, weight in expected.items() if not np.array_equal(found[name], weight)}
    assert changed == {f"layers.{i}.self_attn.qkv_proj" for i in range(2)}
    assert target.is_rounded
    assert target.title == f"{target.name} (int8 weights)"


def test_shapes_of_preflight_are_those_of_loading_and_take_little_more_than_a_byte_per_weight():
    target = load_target(GOLDEN / "tiny-gqa", "bfloat16", weights="int8")
    abstract = abstract_target(target.config, "bfloat16", make_mesh({"data": 1, "fsdp": 1, "model": 1}), "int8")
    assert jax.tree.structure(abstract) == jax.tree.structure(target.model)
    found, expected = ([(x.shape, x.dtype) for x in jax.tree.leaves(tree)] for tree in (target.model, abstract))
    assert found == expected
    floats = load_target(GOLDEN / "tiny-gqa", "bfloat16")
    in_int8, in_bfloat16 = (sum(x.nbytes for x in jax.tree.leaves(x.model)) for x in (target, floats))
    assert in_int8 < 0.55 * in_bfloat16  # rows are short here, and a scale is 4 bytes


# Adapters


def test_an_adapter_knows_whether_it_was_trained_with_int8_or_float_weights(tmp_path):
    folder = GOLDEN / "tiny-gqa-adapter-orbax"  # from before fingerprints had a version
    floats, target = (load_target(GOLDEN / "tiny-gqa", "float32", weights=x) for x in ("float", "int8"))
    assert target.fingerprint == f"{floats.fingerprint}:int8"
    assert load_adapter(folder, floats).other_target is None
    adapter = load_adapter(folder, target)
    assert adapter.other_target == f"{read_metadata(folder)['target']['name']} (float weights)"
    assert adapter.model.layers[0].self_attn.qkv_proj.dtype == jnp.float32
    assert adapters.find(target, [GOLDEN / "tiny-mha-adapter-orbax", folder]) == folder
    save_adapter(tmp_path / "own", adapter.model, exit_layer=2, target=target)
    assert load_adapter(tmp_path / "own", target).other_target is None
    assert load_adapter(tmp_path / "own", floats).other_target == f"{floats.name} (int8 weights)"


# What is wrong is named


def test_unknown_weights():
    with pytest.raises(InputError, match="weights must be float or int8, found 'int4'"):
        load_target(GOLDEN / "tiny-gqa", weights="int4")


def test_a_checkpoint_that_is_quantized_already(tmp_path):
    folder = tmp_path / "gptq"
    shutil.copytree(GOLDEN / "tiny-gqa", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"quantized weights \('gptq'\) are not supported; use the unquantized"):
        load_target(folder, weights="int8")


def test_a_matrix_that_is_int8_already(tmp_path):
    folder = tmp_path / "int8"
    shutil.copytree(GOLDEN / "tiny-gqa", folder)
    file, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
    found = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(found | {name: np.ones(found[name].shape, np.int8)}, file)
    with pytest.raises(InputError, match=f"{name} has an unsupported dtype; expected F32, F16, BF16, found I8"):
        load_target(folder, weights="int8")


# Memory

_MEASURE = """
import sys
from kangaroo_jax.bench.load_cost import measure_load
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.model.sharding import make_mesh
load_target(sys.argv[2], "float32", weights="int8")  # what the first load of anything costs
cost = measure_load(sys.argv[1], "bfloat16", make_mesh({"data": 1, "fsdp": 1, "model": 1}), "int8")
print(cost.host_growth, cost.total_bytes)
"""


@pytest.mark.long
@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_loading_peaks_below_1_15_of_the_weights_and_a_tensor(tmp_path):
    vocab, hidden, width, layers = 16384, 1024, 2816, 8
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj": (width, hidden) for x in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (hidden, width)}
        shapes |= {f"{layer}.{x}_layernorm": (hidden,) for x in ("input", "post_attention")}
    noise = np.random.default_rng(0).standard_normal(vocab * hidden, np.float32).astype(jnp.bfloat16)
    weights = {f"{name}.weight": noise[: np.prod(shape)].reshape(shape) for name, shape in shapes.items()}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    config = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 8} | config))
    command = [sys.executable, "-c", _MEASURE, tmp_path, GOLDEN / "tiny-gqa"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    growth, total = map(int, done.stdout.split())
    assert total < 0.52 * sum(x.nbytes for x in weights.values())
    assert growth > 0.9 * total, "the weights are not in memory: the measurement is broken"
    assert growth < 1.15 * total + max(x.nbytes for x in weights.values()), f"the peak is {growth / total:.2f}"
