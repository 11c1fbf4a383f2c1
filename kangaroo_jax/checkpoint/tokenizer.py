"""The tokenizer that lies beside a target's weights."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from tokenizers import processors

from kangaroo_jax import json_text
from kangaroo_jax.checkpoint.sentencepiece_bpe import read_sentencepiece
from kangaroo_jax.errors import InputError, one_line


def load_tokenizer(folder: pathlib.Path, vocab_size: int) -> Any:
    """The tokenizer in a checkpoint's folder, of transformers; None where there is none.

    Raises:
      InputError: for one that cannot be read, that needs code of its own, or whose ids a model of `vocab_size` lacks.
    """
    files = [file for file in ("tokenizer.json", "tokenizer.model", "vocab.json") if (folder / file).exists()]
    if not files:
        return None
    # transformers would say at import that torch is missing, which its tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        tokenizer = _read(folder, files[0])
    except InputError:
        raise
    except Exception as error:  # transformers raises bare exceptions of many kinds here
        raise InputError(f"{folder}: the tokenizer could not be read ({one_line(error)})") from None
    check_ids(tokenizer, vocab_size, folder)
    return tokenizer


def check_ids(tokenizer: Any, vocab_size: int, where: pathlib.Path) -> None:
    """Raises `InputError` for a tokenizer whose vocabulary is larger than a model's.

    Tokens that were added to it, such as one for padding, may lie beyond: they matter only in a text that has them,
    which is refused then.
    """
    added = tokenizer.get_added_vocab()
    largest = max((id for token, id in tokenizer.get_vocab().items() if token not in added), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{where}: the tokenizer has token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer the weights were trained with"
        )


def end_tokens(configured: Sequence[int], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """The token ids that end a text: those that a checkpoint's configuration names, and its tokenizer's EOS, which may
    be another one. Ids that a model of `vocab_size` lacks are left out: it never writes them."""
    own = () if tokenizer is None or tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    return tuple(dict.fromkeys(id for id in (*configured, *own) if 0 <= id < vocab_size))


def not_in_vocabulary(id: int, tokenizer: Any, vocab_size: int) -> str:
    """Why a text with a token that a model of `vocab_size` lacks cannot be used. The token is named where the tokenizer
    has it."""
    known = tokenizer is not None and tokenizer.is_fast and 0 <= id < 2**31
    token = tokenizer.convert_ids_to_tokens(id) if known else None
    found = f"token id {id}" if token is None else f"the token {token!r} (id {id})"
    return f"{found} is outside the vocabulary of {vocab_size}; leave it out"


def vocabulary_digest(tokenizer: Any) -> str:
    """Identifies what a tokenizer's ids stand for, however it makes them of a text."""
    vocabulary = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _read(folder: pathlib.Path, file: str) -> Any:
    config = _contents(folder / "tokenizer_config.json")
    if "AutoTokenizer" in (config.get("auto_map") or ()):
        raise InputError(
            f"{folder}: the tokenizer comes with code of its own, which is never run; save the tokenizer as "
            "tokenizer.json (a fast tokenizer), and remove auto_map from tokenizer_config.json"
        )
    if file == "vocab.json":
        from transformers import AutoTokenizer

        # Said, not left out: transformers would ask on the terminal whether to run code that lies in the folder.
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    from transformers import PreTrainedTokenizerFast

    # Not the class that tokenizer_config.json names: transformers 5 builds a tokenizer of that class's own steps, and
    # leaves out those of tokenizer.json.
    if file == "tokenizer.json":
        return PreTrainedTokenizerFast.from_pretrained(folder)
    return _from_sentencepiece(folder, config)


# Of LlamaTokenizer, whose files tokenizer.model are, where no other file says.
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def _from_sentencepiece(folder: pathlib.Path, config: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = read_sentencepiece(folder / "tokenizer.model", config.get("legacy") is not False)
    named = _contents(folder / "special_tokens_map.json") | config
    known = tokenizer.get_vocab()
    missing = {name: token for name, token in _LLAMA.items() if name not in named and token in known}
    begin = (missing | named).get("bos_token")
    begin = begin["content"] if isinstance(begin, dict) else begin
    if begin and config.get("add_bos_token", True):
        if begin not in known:
            raise InputError(f"{folder}: bos_token {begin!r} is not in tokenizer.model; expected one of its pieces")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", f"{begin}:1", "$B:1"], special_tokens=[(begin, known[begin])]
        )
    return PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=tokenizer, **missing)


def _contents(file: pathlib.Path) -> dict[str, Any]:
    """The contents of one of a tokenizer's JSON files; nothing where transformers will say what is wrong with it."""
    try:
        contents = json_text.parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return contents if isinstance(contents, dict) else {}
