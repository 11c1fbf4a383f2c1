"""Small GGUF files, as llama.cpp's convert_hf_to_gguf.py writes them from a Hugging Face checkpoint."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import gguf
import numpy as np

from tests.tokens import byte_tokenizer

TYPE = gguf.GGMLQuantizationType
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # types of tokens
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"

SHAPE = {
    "vocab_size": 260,
    "hidden_size": 256,  # the block of the largest quantisations
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def dequantizable() -> list[gguf.GGMLQuantizationType]:
    """Every type of values that the gguf package turns into numbers."""
    found = []
    for kind in TYPE:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
            found.append(kind)
        except NotImplementedError:
            pass
    return found


def blocks(rng: np.random.Generator, shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random weights in a type: quantised where the package can, else blocks of random bytes whose values are those of
    weights."""
    try:
        return gguf.quantize(rng.normal(0, 0.05, shape).astype(np.float32), kind)
    except NotImplementedError:
        pass
    values, size = gguf.GGML_QUANT_SIZES[kind]
    pool = np.zeros((0, size), np.uint8)
    while len(pool) < 32:
        drawn = rng.integers(0, 256, (1024, size), np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.dequantize(drawn, kind)).max(-1)
        pool = np.concatenate([pool, drawn[(largest > 0.001) & (largest < 0.4)]])  # not a number is neither
    return pool[rng.integers(0, len(pool), int(np.prod(shape)) // values)].reshape(*shape[:-1], -1)


def tensors(
    rng: np.random.Generator,
    kind: gguf.GGMLQuantizationType,
    shape: Mapping[str, int] = SHAPE,
    *,
    tied: bool = False,
    qkv_bias: bool = False,
    head_norms: bool = False,
) -> dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType]]:
    """A model's tensors by llama.cpp's names; matrices in the type, the rest in float32."""
    hidden, width = shape["hidden_size"], shape["intermediate_size"]
    queries = shape["num_attention_heads"] * shape["head_dim"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    matrices = {"token_embd": (shape["vocab_size"], hidden)}
    if not tied:
        matrices["output"] = (shape["vocab_size"], hidden)
    vectors = {"output_norm.weight": (1.0, hidden)}
    for i in range(shape["num_hidden_layers"]):
        of_layer = {
            "attn_q": (queries, hidden),
            "attn_k": (keys, hidden),
            "attn_v": (keys, hidden),
            "attn_output": (hidden, queries),
            "ffn_gate": (width, hidden),
            "ffn_up": (width, hidden),
            "ffn_down": (hidden, width),
        }
        matrices |= {f"blk.{i}.{name}": size for name, size in of_layer.items()}
        vectors |= {f"blk.{i}.{name}_norm.weight": (1.0, hidden) for name in ("attn", "ffn")}
        if head_norms:
            vectors |= {f"blk.{i}.attn_{x}_norm.weight": (1.0, shape["head_dim"]) for x in "qk"}
        if qkv_bias:
            sizes = (queries, keys, keys)
            vectors |= {f"blk.{i}.attn_{x}.bias": (0.0, size) for x, size in zip("qkv", sizes, strict=True)}
    found = {f"{name}.weight": (blocks(rng, size, kind), kind) for name, size in matrices.items()}
    return found | {
        name: (rng.normal(mean, 0.1, size).astype(np.float32), TYPE.F32) for name, (mean, size) in vectors.items()
    }


def metadata(architecture: str = "llama", shape: Mapping[str, int] = SHAPE) -> dict[str, object]:
    """A model's metadata, with bytes as tokens."""
    tokenizer = byte_tokenizer()
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    vocabulary.append("he")
    padding = [f"[PAD{i}]" for i in range(len(vocabulary), shape["vocab_size"])]
    return {
        "general.name": "test",
        f"{architecture}.block_count": shape["num_hidden_layers"],
        f"{architecture}.context_length": 128,
        f"{architecture}.embedding_length": shape["hidden_size"],
        f"{architecture}.feed_forward_length": shape["intermediate_size"],
        f"{architecture}.attention.head_count": shape["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": shape["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary + padding,
        "tokenizer.ggml.token_type": [_NORMAL] * 256 + [_CONTROL] * 2 + [_NORMAL] + [_UNUSED] * len(padding),
        "tokenizer.ggml.merges": ["h e"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def write(
    path: pathlib.Path,
    entries: Mapping[str, object],
    weights: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]],
    architecture: str = "llama",
) -> pathlib.Path:
    """Writes a GGUF file. Entries that are None are left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (data, kind) in weights.items():
        plain = kind in (TYPE.F32, TYPE.F16)
        writer.add_tensor(name, data, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
