"""A random target of two layers with a tokenizer, and an adapter for it: in memory, and as folders for commands."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import string

import jax
import tokenizers
from flax import nnx
from transformers import PreTrainedTokenizerFast

from kangaroo_jax import load_target
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, save_adapter
from kangaroo_jax.checkpoint.target import Target, save_target
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel

CONTEXT = 768  # tokens; a token is a character; held-out prompts have 600
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_SPECIAL = ["<s>", "</s>", "<unk>"]
_VOCABULARY = [*string.printable[:97], *_SPECIAL]

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=len(_VOCABULARY),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=CONTEXT,
    bos_token_id=_VOCABULARY.index("<s>"),
    eos_token_ids=(_VOCABULARY.index("</s>"),),
)


EXIT_LAYER = 1


def save_model(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Writes both into `folder`; the paths of the target, with a chat template and BOS, and of the adapter."""
    save_target(_model(), folder / "model", "float32")
    _tokenizer().save_pretrained(folder / "model")
    target = load_target(str(folder / "model"), "float32")
    save_adapter(folder / "adapter", small_adapter().model, exit_layer=EXIT_LAYER, target=target)
    return folder / "model", folder / "adapter"


@functools.cache
def small_target() -> Target:
    """Without a tokenizer; nothing ends its answers."""
    return Target(model=_model(), tokenizer=None, name="small", fingerprint="small", eos_token_ids=())


@functools.cache
def small_chat_target() -> Target:
    """The same with a tokenizer and a chat template."""
    return dataclasses.replace(small_target(), tokenizer=_tokenizer())


@functools.cache
def small_adapter() -> TrainedAdapter:
    return TrainedAdapter(Adapter(CONFIG, rngs=nnx.Rngs(1)), EXIT_LAYER, "small adapter", target_fingerprint=None)


def _model() -> TargetModel:
    """The weights are large enough that greedy text wanders, those of the later layers small enough that drafts are
    often right."""
    model = jax.tree.map(lambda x: x * 12 if x.ndim > 1 else x, TargetModel(CONFIG, rngs=nnx.Rngs(0)))
    for layer in list(model.layers)[EXIT_LAYER:]:
        layer.self_attn.o_proj[...] *= 0.15
        layer.mlp.down_proj[...] *= 0.15
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    ids = {token: i for i, token in enumerate(_VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
