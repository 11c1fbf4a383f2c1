"""Tiny random targets and adapters whose drafts are right often but not always, for the decoding tests."""

from __future__ import annotations

import dataclasses
import functools

import jax
import tokenizers
from flax import nnx
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.kinds import KINDS
from kangaroo_jax.model.target import TargetModel

LAYERS = 4
VOCABULARY = 48
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
)


@functools.cache
def tiny_target(seed: int = 0) -> Target:
    """A random model, its weights large enough that greedy text wanders, its later layers weak enough that a draft
    from the earlier ones often agrees."""
    model = TargetModel(CONFIG, rngs=nnx.Rngs(seed))
    leaves, structure = jax.tree.flatten(model)
    model = jax.tree.unflatten(structure, [x * 12 if x.ndim > 1 else x for x in leaves])
    for layer in list(model.layers)[1:]:
        layer.self_attn.o_proj[...] *= 0.15
        layer.mlp.down_proj[...] *= 0.15
    return Target(model=model, tokenizer=None, name="tiny", fingerprint="tiny", eos_token_ids=())


@functools.cache
def lettered_target() -> Target:
    """The tiny target with a tokenizer of one letter per token."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}, unk_token="a")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return dataclasses.replace(tiny_target(), tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))


@functools.cache
def tiny_adapter(
    exit_layer: int | None, seed: int = 1, num_layers: int = 1, kind: str = Adapter.kind, mlp_size: int = 0
) -> TrainedAdapter:
    adapter = KINDS[kind](CONFIG, rngs=nnx.Rngs(seed), num_layers=num_layers, mlp_size=mlp_size)
    strong = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, adapter)  # so that what its attention reads matters
    return TrainedAdapter(strong, exit_layer, "tiny adapter", target_fingerprint=None)
