"""The tokenizer that lies beside a target's weights."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from typing import Any

from kangaroo_jax.errors import InputError, one_line


def load_tokenizer(folder: pathlib.Path, vocab_size: int) -> Any:
    """The tokenizer in a checkpoint's folder, of transformers; None where there is none.

    Raises:
      InputError: for one that cannot be read, that needs code of its own, or whose ids a model of `vocab_size` lacks.
    """
    if not any((folder / file).exists() for file in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    # transformers would say at import that torch is missing, which its tokenizers do not need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        if _is_generic(folder):
            # As AutoTokenizer would, which takes seconds longer to import.
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        else:
            from transformers import AutoTokenizer

            # Said, not left out: transformers would ask on the terminal whether to run code that lies in the folder.
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        if "custom code" not in str(error):
            raise InputError(f"{folder}: the tokenizer could not be read ({one_line(error)})") from None
        raise InputError(
            f"{folder}: the tokenizer comes with code of its own, which is never run; save the tokenizer as "
            "tokenizer.json (a fast tokenizer), and remove auto_map from tokenizer_config.json"
        ) from None
    except Exception as error:  # transformers raises bare exceptions of many kinds here
        raise InputError(f"{folder}: the tokenizer could not be read ({one_line(error)})") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}; use the tokenizer the weights were trained with"
        )
    return tokenizer


def vocabulary_digest(tokenizer: Any) -> str:
    """Identifies what a tokenizer's ids stand for, however it makes them of a text."""
    vocabulary = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def _is_generic(folder: pathlib.Path) -> bool:
    """Whether a tokenizer is all in tokenizer.json, without a class or code of its own."""
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # what is wrong with it is AutoTokenizer's to say
    return (
        (folder / "tokenizer.json").exists()
        and isinstance(config, dict)
        and config.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")
        and "auto_map" not in config
    )
