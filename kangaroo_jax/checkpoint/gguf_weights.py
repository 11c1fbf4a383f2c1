"""A GGUF file's tensors under Hugging Face's names, in Hugging Face's order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from kangaroo_jax.checkpoint.gguf_config import ROPE_FACTORS
from kangaroo_jax.checkpoint.gguf_file import GGUFFile
from kangaroo_jax.checkpoint.weights import Index, Pieces, Weights, join_pieces
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.families import family_of

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")

# llama.cpp turns neighbouring dimensions of queries and keys in this architecture where Hugging Face's code turns
# dimensions half a head apart, so its converter reorders their rows.
_PERMUTED = ("llama",)


def gguf_weights(file: GGUFFile, config: ModelConfig) -> Weights:
    """The tensors of a GGUF file, as of the Hugging Face checkpoint that it was converted from. A quantised tensor's
    rows are read and dequantised a few at a time; only the values that are asked for stay."""
    name_of = family_of(config).tensor_name
    names = {_hugging_face_name(name, name_of): name for name in file.tensors if name != ROPE_FACTORS}
    permuted = file.metadata["general.architecture"] in _PERMUTED

    def read(name: str, pieces: Pieces) -> np.ndarray:
        stored = names[name]
        order = config.head_dim if permuted and re.search(r"attn_[qk]\.", stored) else None
        return join_pieces([_read(file, stored, piece, order) for piece in pieces])

    return Weights(
        found={name: (file.tensors[stored].shape, file.tensors[stored].dtype) for name, stored in names.items()},
        files=dict.fromkeys(names, str(file.path)),
        read=read,
    )


def _hugging_face_name(name: str, name_of: Callable[[str], str]) -> str:
    """A tensor's name in a Hugging Face checkpoint; its own where it would not be there."""
    match = _NAME.fullmatch(name)
    layer, part, kind = match.groups() if match else (None, None, None)
    if layer is not None and part in _LAYER:
        return name_of(f"layers.{layer}.{_LAYER[part]}.{kind}")
    if layer is None and part in _OTHER:
        return name_of(f"{_OTHER[part]}.{kind}")
    return name


def _read(file: GGUFFile, name: str, index: Index, head_dim: int | None) -> np.ndarray:
    """A part of a tensor; `head_dim` undoes the order of rows within heads of that size."""
    shape = file.tensors[name].shape
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    start, stop = bounds[0]
    # Complete heads, so that their rows can be put in order.
    first, last = (start, stop) if head_dim is None else (start - start % head_dim, -(-stop // head_dim) * head_dim)
    if len(shape) == 1:
        values = file.read_rows(name, 0, 1)[0, first:last]
    else:
        values = file.read_rows(name, first, last)[:, slice(*bounds[1])]
    if head_dim is None:
        return values
    pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)[start - first : stop - first]
