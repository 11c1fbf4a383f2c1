"""decode.py --compare on a checkpoint of every family that transformers wrote, beside transformers' own greedy tokens.

Windows are shorter than the prompts, and the texts longer than the rings that hold them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib

import numpy as np
import pytest

from kangaroo_jax.checkpoint.adapter import adapter_from_parameters, save_adapter
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.train.step import initial_parameters
from tests.decode.models import LETTERS, lettered_target
from tests.decode.test_families import SETTINGS
from tests.decode_commands import decode_in_one_process

PROMPT_TOKENS, NEW_TOKENS, EXIT_LAYER = 110, 60, 2
_SHAPE = {
    "vocab_size": len(LETTERS),
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def write_checkpoint(model_type: str, folder: pathlib.Path, prompt: list[int]) -> list[int]:
    """Writes a random model with a tokenizer of letters; its greedy tokens after the prompt, by transformers."""
    import torch

    from tests.fixtures.make_hf_logits import make_model

    tokens = torch.tensor([prompt])
    for seed in range(100):
        model = make_model(model_type, _SHAPE | SETTINGS[model_type], seed)
        with torch.no_grad():
            for layer in list(model.model.layers)[1:]:  # weak enough for drafts from the earlier ones to be right often
                layer.self_attn.o_proj.weight *= 0.15
                layer.mlp.down_proj.weight *= 0.15
                if hasattr(layer, "post_feedforward_layernorm"):  # a norm of what is added; Gemma's counts from one
                    for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm):
                        norm.weight.fill_(-0.85 if hasattr(layer, "pre_feedforward_layernorm") else 0.15)
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        found = found[0, len(prompt) :].tolist()
        if len(set(found)) > 8:  # most random models soon repeat a token
            model.save_pretrained(folder)
            lettered_target().tokenizer.save_pretrained(folder)
            return found
    raise AssertionError(f"no seed gives a {model_type} whose text wanders")


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_compare_says_identical_and_gives_the_text_of_transformers(tmp_path: pathlib.Path) -> None:
    lines, expected = [], []
    for seed, model_type in enumerate(SETTINGS):
        folder = tmp_path / model_type
        prompt = np.random.default_rng(seed).integers(0, len(LETTERS), PROMPT_TOKENS).tolist()
        expected.append("".join(LETTERS[token] for token in write_checkpoint(model_type, folder, prompt)))
        target = load_target(folder, "float32")
        # Where training starts.
        parameters = initial_parameters(target.model, EXIT_LAYER, "layer", 0, AdapterConfig("kangaroo"))
        adapter = adapter_from_parameters(target.config, parameters)
        save_adapter(folder / "adapter", adapter, exit_layer=EXIT_LAYER, target=target)
        text = "".join(LETTERS[token] for token in prompt)
        drafts = ["--max_draft_len=2", "--threshold=0", f"--max_new_tokens={NEW_TOKENS}"]
        files = [f"--model={folder}", f"--adapter={folder / 'adapter'}"]
        lines.append(["--compare", "--json", *drafts, *files, f"--prompt={text}"])
    results = decode_in_one_process(lines, os.environ)
    for model_type, text, (code, out, error) in zip(SETTINGS, expected, results, strict=True):
        assert code == 0, (model_type, error)
        *shown, last = out.splitlines()
        assert any(line.split() == ["identical", "yes"] for line in shown), (model_type, out)
        result = json.loads(last)
        assert result["text"] == text, model_type
        assert 1 < result["mean_accept_length"] < 3, model_type  # drafts both accepted and refused
