"""A GGUF file's tensors under Hugging Face's names, in Hugging Face's order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable

import gguf
import numpy as np

from kangaroo_jax.checkpoint.gguf_config import ROPE_FACTORS
from kangaroo_jax.checkpoint.gguf_file import GGUFFile
from kangaroo_jax.checkpoint.weights import Index, Int8Blocks, Pieces, Weights, join_pieces
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

    def head_rows(stored: str) -> int | None:
        return config.head_dim if permuted and re.search(r"attn_[qk]\.", stored) else None

    def read(name: str, pieces: Pieces) -> np.ndarray:
        stored = names[name]
        return join_pieces([_read(file, stored, piece, head_rows(stored)) for piece in pieces])

    def read_int8(name: str, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        stored = names[name]
        return _in_order(lambda *bounds: file.read_q8_0(stored, *bounds), rows, head_rows(stored))

    int8 = gguf.GGMLQuantizationType.Q8_0
    sizes = {
        name: gguf.GGML_QUANT_SIZES[int8][0]
        for name, stored in names.items()
        if file.tensors[stored].kind == int8 and len(file.tensors[stored].shape) == 2
    }
    return Weights(
        found={name: (file.tensors[stored].shape, file.tensors[stored].dtype) for name, stored in names.items()},
        files=dict.fromkeys(names, str(file.path)),
        read=read,
        int8=Int8Blocks(sizes, read_int8),
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
    rows, *columns = (slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))

    def read(first: int, last: int) -> tuple[np.ndarray]:
        if len(shape) == 1:
            return (file.read_rows(name, 0, 1)[0, first:last],)
        return (file.read_rows(name, first, last)[:, columns[0]],)

    return _in_order(read, rows, head_dim)[0]


def _in_order(
    read: Callable[[int, int], tuple[np.ndarray, ...]], rows: slice, head_dim: int | None
) -> tuple[np.ndarray, ...]:
    """Rows in Hugging Face's order, of arrays that `read` gives from one row to another."""
    start, stop = rows.start, rows.stop
    if head_dim is None:
        return read(start, stop)
    first, last = start - start % head_dim, -(-stop // head_dim) * head_dim  # complete heads

    def ordered(values: np.ndarray) -> np.ndarray:
        pairs = values.reshape(-1, head_dim // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)[start - first : stop - first]

    return tuple(map(ordered, read(first, last)))
