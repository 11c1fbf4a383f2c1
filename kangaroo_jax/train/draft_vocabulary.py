"""Chooses the tokens that drafts are made of, for an adapter of a target with a large vocabulary.

    python -m kangaroo_jax.train.draft_vocabulary --adapter=runs/llama3 --model=FOLDER_OR_HUB_ID \\
        --files='sharegpt/*.json' --size=32000

Counts the tokens that are learned from the training data (answers in conversations, all of a text), and writes the
most frequent of them to draft_vocabulary.npy in the adapter's folder, where load_adapter finds them. Drafts then come
from these alone, and a draft step reads their rows of the LM head in place of the whole; verification stays over the
whole vocabulary, so the output does not change. Removing the file undoes it.
"""

from __future__ import annotations

import argparse

import numpy as np
from jaxtyping import Int

from kangaroo_jax.checkpoint.adapter import load_adapter, write_draft_vocabulary
from kangaroo_jax.checkpoint.huggingface import load_target
from kangaroo_jax.cli import command_line
from kangaroo_jax.data import chat
from kangaroo_jax.data.cache import TokenCache, cache_folder, open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.records import find_sources
from kangaroo_jax.errors import InputError

_NAME = "draft_vocabulary"
_MAX_BAD_SHARE = 0.01  # the configs'


def count_tokens(cache: TokenCache, vocab_size: int) -> Int[np.ndarray, " vocab"]:
    """How often each token follows a position that counts in the loss."""
    counts = np.zeros(vocab_size, np.int64)
    starts = cache.starts
    for record, (start, length) in enumerate(zip(starts, cache.lengths, strict=True)):
        tokens = cache.tokens(record)
        run = np.searchsorted(cache.counted[:, 1], start, side="right")
        while run < len(cache.counted) and cache.counted[run, 0] < start + length:
            first, end = cache.counted[run] - start
            counts += np.bincount(tokens[max(first, 0) + 1 : min(end, length) + 1], minlength=vocab_size)
            run += 1
    return counts


def choose(counts: Int[np.ndarray, " vocab"], size: int, always: tuple[int, ...]) -> Int[np.ndarray, " size"]:
    """The `size` most frequent tokens, ascending; `always` are among them, and the lower id is of two as frequent.

    Raises:
      InputError: for a size that is not below the vocabulary's.
    """
    if not len(always) < size < len(counts):
        raise InputError(f"--size: expected more than {len(always)} and less than {len(counts)}, found {size}")
    ranked = counts.astype(np.float64)
    ranked[list(always)] = np.inf
    return np.sort(np.argsort(-ranked, kind="stable")[:size])


def main() -> None:
    parser = argparse.ArgumentParser(prog=_NAME, description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="The adapter's folder.")
    parser.add_argument("--model", required=True, help="Its target: a folder in Hugging Face format, or a hub id.")
    parser.add_argument("--files", required=True, help="Paths and globs of training data, separated by commas.")
    parser.add_argument("--size", required=True, type=int, help="Tokens in the draft vocabulary.")
    parser.add_argument("--template", default="", choices=["", *chat.NAMED], help="As data.template in a config.")
    parser.add_argument("--cache", default="", help="As data.cache in a config.")
    args = parser.parse_args()
    try:
        sources = find_sources(args.files)
        target = load_target(args.model)
        load_adapter(args.adapter, target)  # wrong folders are named before the data is read
        cache = open_cache(cache_folder(args.cache), sources, Encoder(target, args.template), _MAX_BAD_SHARE)
        counts = count_tokens(cache, target.config.vocab_size)
        token_ids = choose(counts, args.size, target.eos_token_ids)
        path = write_draft_vocabulary(args.adapter, token_ids)
    except InputError as error:
        command_line.fail(_NAME, error)
    covered = counts[token_ids].sum() / counts.sum()
    print(f"wrote {path}: {len(token_ids)} of {len(counts)} tokens, {covered:.2%} of those in the data")


if __name__ == "__main__":
    main()
