"""Gives an adapter that is trained already a draft vocabulary (training does it with --config.draft_vocabulary).

    python -m kangaroo_jax.cli.draft_vocabulary --adapter=runs/llama3 --model=FOLDER_OR_HUB_ID \\
        --files='sharegpt/*.json' --size=32000

Counts the tokens that are learned from the training data (answers in conversations, all of a text), and writes the
most frequent of them to draft_vocabulary.npy in the adapter's folder, where load_adapter finds them. Drafts then come
from these alone, and a draft step reads only their rows of the LM head; verification stays over the full vocabulary, so
the output does not change. Removing the file undoes it.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax.cli import command_line

_ADAPTER = flags.DEFINE_string("adapter", None, "The adapter's folder.")
_MODEL = flags.DEFINE_string("model", None, "Its target: a folder in Hugging Face format, or a hub id.")
_FILES = flags.DEFINE_string("files", None, "Paths and globs of training data, separated by commas.")
_SIZE = flags.DEFINE_integer("size", None, "Tokens in the draft vocabulary.")
_TEMPLATE = flags.DEFINE_string("template", "", "Chat template, as data.template in a configuration.")
_CACHE = flags.DEFINE_string("cache", "", "Folder for the token ids, as data.cache in a configuration.")

_MAX_BAD_SHARE = 0.01  # as in the configurations


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command_line.run("draft_vocabulary", _write, argv, usage=__doc__)


def _write() -> None:
    command_line.require(_ADAPTER, _MODEL, _FILES, _SIZE)
    from kangaroo_jax import load_adapter, load_target
    from kangaroo_jax.checkpoint.adapter import write_draft_vocabulary
    from kangaroo_jax.cli.report import TerminalReport
    from kangaroo_jax.data import chat
    from kangaroo_jax.data.cache import cache_folder, open_cache
    from kangaroo_jax.data.encode import Encoder
    from kangaroo_jax.data.records import find_sources
    from kangaroo_jax.errors import InputError
    from kangaroo_jax.train.draft_vocabulary import choose, count_tokens

    if _TEMPLATE.value not in ("", *chat.NAMED):
        raise InputError(f"--template: expected {', '.join(chat.NAMED)} or none, found {_TEMPLATE.value!r}")
    sources = find_sources(_FILES.value)
    target = load_target(_MODEL.value, "bfloat16")
    load_adapter(_ADAPTER.value, target)  # so that a wrong folder is named before the data is read
    encoder, report = Encoder(target, _TEMPLATE.value), TerminalReport()
    cache = open_cache(cache_folder(_CACHE.value), sources, encoder, _MAX_BAD_SHARE, report)
    counts = count_tokens(cache, target.config.vocab_size)
    token_ids = choose(counts, _SIZE.value, target.eos_token_ids)
    path = write_draft_vocabulary(_ADAPTER.value, token_ids)
    covered = counts[token_ids].sum() / counts.sum()
    print(f"wrote {path}: {len(token_ids)} of {len(counts)} tokens, {covered:.2%} of those in the data")


if __name__ == "__main__":
    main()
