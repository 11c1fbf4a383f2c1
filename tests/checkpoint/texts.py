"""Texts that tokenizers are compared on, and small SentencePiece models."""

from __future__ import annotations

import io
import pathlib
import random

import sentencepiece

_DOCS = pathlib.Path(__file__).parents[2] / "docs"

TEXTS = [
    "def main():\n    print('hello', 42)\n",
    "It's 2023, isn't it? I'LL pay 1234567 EUR.",
    "  two  spaces,\ttabs\t\tand\r\nlines\n\n\n ",
    "naïve café, Ünïcödé, 一二三 こんにちは, русский, עברית, १२३ ½ ²",
    "emoji 🦘🦘 and joined 👩‍👩‍👧, a\u0301 combining",
    "snake_case CamelCase HTTPServer a+b==c != [x]{y}<z>/path\\to",
    "",
    " ",
]


def random_texts() -> list[str]:
    """Words of the documentation in random order."""
    rng = random.Random(0)
    words = (_DOCS / "train.md").read_text().split()
    return [" ".join(rng.choices(words, k=30)) for _ in range(50)]


def train_sentencepiece(**settings: object) -> bytes:
    """The contents of a small tokenizer.model with Llama's settings, or others, trained on the documentation."""
    written = io.BytesIO()
    settings = {
        "vocab_size": 700,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>"],
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "minloglevel": 2,
    } | settings
    lines = (_DOCS / "decode.md").read_text().splitlines()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **settings)
    return written.getvalue()
