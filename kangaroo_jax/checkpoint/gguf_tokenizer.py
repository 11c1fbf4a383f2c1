"""The tokenizer in a GGUF file's metadata, as one of transformers.

transformers' own conversion needs torch, and knows fewer of the ways in which llama.cpp splits text (not SmolLM's).
What is built here is what llama.cpp does (its src/llama-vocab.cpp), in the parts that the models' own tokenizer.json
files use.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kangaroo_jax.checkpoint.gguf_file import GGUFFile
from kangaroo_jax.checkpoint.sentencepiece_bpe import add_special, sentencepiece_bpe
from kangaroo_jax.checkpoint.tokenizer import check_ids
from kangaroo_jax.errors import InputError, one_line

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{_OTHERS}"
_LLAMA3 = rf"{_CONTRACTIONS}{_WORDS}|\p{{N}}{{1,3}}{_OTHERS}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def _bytes(gpt2_words: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2_words)


# How text is split before merges, by tokenizer.ggml.pre; names that llama.cpp treats alike stand together.
_SPLITS = {
    ("llama-bpe", "llama3", "llama-v3", "dbrx", "smaug-bpe"): [_split(_LLAMA3), _bytes(False)],
    ("tekken",): [_split(_TEKKEN), _bytes(False)],
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"): [_split(_QWEN2), _bytes(False)],
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"): [
        pre_tokenizers.Digits(individual_digits=True),
        _bytes(True),
    ],
    ("gpt-2", "olmo", "mpt", "phi-2"): [_bytes(True)],
    ("deepseek-v3",): [
        _split(r"\p{N}{1,3}"),
        _split(r"[\x{4E00}-\x{9FA5}\x{3040}-\x{30FF}]+"),
        _split(_DEEPSEEK3),
        _bytes(False),
    ],
}
# A word that is a token is taken as it is, whatever the merges would make of it.
_IGNORE_MERGES = ("llama-bpe", "llama3", "llama-v3", "tekken")
_COMPOSED = ("qwen2",)  # Qwen's tokenizer.json normalises text to NFC; llama.cpp does not
_BEGIN_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "tekken")  # where the file does not say


def gguf_tokenizer(file: GGUFFile, vocab_size: int) -> Any:
    """The tokenizer and chat template in a GGUF file; None where there is none.

    Raises:
      InputError: for a kind of tokenizer that is not supported, metadata that do not fit together, or ids that a model
        of `vocab_size` lacks.
    """
    kind = _get(file, "model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("llama", "gpt2"):
        raise InputError(
            f"{file.path}: a tokenizer of the kind {kind!r} is not supported; supported: llama (SentencePiece), "
            "gpt2 (byte-level BPE)"
        )
    tokens = _get(file, "tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):
        raise InputError(f"{file.path}: tokenizer.ggml.tokens must be a list of tokens, found none")
    types = _get(file, "token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"{file.path}: tokenizer.ggml.token_type must have an entry for each of {len(tokens)} tokens")
    try:
        tokenizer = _sentencepiece(file, tokens, types) if kind == "llama" else _byte_level(file, tokens, types)
        found = _for_transformers(file, tokenizer, tokens)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises bare exceptions
        raise InputError(f"{file.path}: its tokenizer could not be read ({one_line(error)})") from None
    check_ids(found, vocab_size, file.path)
    return found


def _get(file: GGUFFile, key: str, default: Any = None) -> Any:
    return file.metadata.get(f"tokenizer.ggml.{key}", default)


def _special(file: GGUFFile, key: str, tokens: Sequence[str]) -> str | None:
    number = _get(file, f"{key}_token_id")
    if number is None:
        return None
    if not isinstance(number, int) or not 0 <= number < len(tokens):
        raise InputError(
            f"{file.path}: tokenizer.ggml.{key}_token_id must be one of {len(tokens)} tokens, found {number!r}"
        )
    return tokens[number]


def _byte_level(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """BPE on bytes, after the text is split into words."""
    pre = _get(file, "pre")
    split = next((steps for names, steps in _SPLITS.items() if pre in names), None)
    if split is None:
        supported = ", ".join(name for names in _SPLITS for name in names)
        raise InputError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; supported: {supported}; "
            "a file from before it was written must be converted again"
        )
    merges = _get(file, "merges")
    if not isinstance(merges, list) or not all(isinstance(merge, str) and merge for merge in merges):
        raise InputError(f"{file.path}: tokenizer.ggml.merges must be a list of merges; convert the model again")
    tokenizer = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(tokens)},
            [_merge(merge) for merge in merges],
            ignore_merges=pre in _IGNORE_MERGES,
        )
    )
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    add_special(tokenizer, tokens, types)
    return tokenizer


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line[1:].partition(" ")  # the first character is the left token's, even where it is a space
    return line[0] + left, right


def _sentencepiece(file: GGUFFile, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = _get(file, "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{file.path}: tokenizer.ggml.scores must have an entry for each of {len(tokens)} tokens")
    prefix = "always" if _get(file, "add_space_prefix", True) else "never"
    return sentencepiece_bpe(tokens, scores, types, prefix=prefix)


def _for_transformers(file: GGUFFile, tokenizer: Tokenizer, tokens: Sequence[str]) -> Any:
    named = {f"{name}_token": _special(file, name, tokens) for name in ("bos", "eos")}
    named |= {"unk_token": _special(file, "unknown", tokens), "pad_token": _special(file, "padding", tokens)}
    sentencepiece = _get(file, "model") == "llama"
    begin = _get(file, "add_bos_token", sentencepiece or _get(file, "pre") in _BEGIN_WITH_BOS)
    end = _get(file, "add_eos_token", False)
    before = [named["bos_token"]] if begin and named["bos_token"] else []
    after = [named["eos_token"]] if end and named["eos_token"] else []
    if before or after:
        around = dict.fromkeys(before + after)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1", *(f"{t}:1" for t in after)],
            special_tokens=[(token, tokens.index(token)) for token in around],
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # transformers would say at import that torch is missing, which its tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        name_or_path=str(file.path),
        **named,
    )
