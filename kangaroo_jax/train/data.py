"""Text in, batches of token windows out.

Documents come from text files, from JSONL files with a "text" in each line, or from the standard library (the demo).
They are tokenised once, joined with EOS between them and cut into windows. A batch is a dict of `tokens` and
`loss_mask`, both [batch, time]; another kind of data only has to make such windows.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence

import grain
import numpy as np
from jaxtyping import Float, Int

from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.demo import corpus
from kangaroo_jax.errors import InputError

STANDARD_LIBRARY = "stdlib"
_TOKENIZED_AT_ONCE = 256  # documents; the tokenizer works through them in parallel


@dataclasses.dataclass(frozen=True)
class Windows:
    """Fixed-length pieces of text.

    Attributes:
      tokens: token ids.
      loss_mask: weight of each position in the loss.
    """

    tokens: Int[np.ndarray, "windows time"]
    loss_mask: Float[np.ndarray, "windows time"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self.tokens[index], "loss_mask": self.loss_mask[index]}

    def take(self, indices: Sequence[int] | np.ndarray) -> Windows:
        return Windows(self.tokens[indices], self.loss_mask[indices])

    @property
    def fingerprint(self) -> str:
        """Identifies the data: a resumed run must see what it saw before."""
        digest = hashlib.sha256(self.tokens.tobytes())
        digest.update(self.loss_mask.tobytes())
        return digest.hexdigest()[:16]


def find_files(patterns: Sequence[str]) -> list[pathlib.Path]:
    """The files that paths and globs stand for, sorted within each pattern, each file once.

    Raises:
      InputError: for no patterns, or one that matches no file.
    """
    if not patterns:
        raise InputError("data.files: empty; expected paths or globs of text or JSONL files, separated by commas")
    files = {}
    for pattern in patterns:
        matches = sorted(glob.glob(str(pathlib.Path(pattern).expanduser()), recursive=True))
        matches = [pathlib.Path(match) for match in matches if pathlib.Path(match).is_file()]
        if not matches:
            raise InputError(f"{pattern}: no such file; expected paths or globs of text or JSONL files")
        files |= dict.fromkeys(matches)
    return list(files)


def read_documents(files: Sequence[pathlib.Path]) -> Iterator[str]:
    """The texts in `files`: one per line of a .jsonl file (its "text"), one per file of any other kind (UTF-8).

    Raises:
      InputError: naming file and line, for text that is not UTF-8, a line that is not JSON, or one without "text".
    """
    for path in files:
        if path.suffix != ".jsonl":
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror})") from None
            continue
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield _json_text(line, f"{path}:{number}")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _json_text(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); expected one object a line"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets as deep
        raise InputError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        found = f"keys {', '.join(sorted(record)) or 'none'}" if isinstance(record, dict) else type(record).__name__
        raise InputError(f'{where}: expected an object with a string under "text", found {found}')
    try:
        record["text"].encode()
    except UnicodeEncodeError as error:  # half an emoji, written as an escape
        raise InputError(f'{where}: "text" is not valid Unicode (character {error.start})') from None
    return record["text"]


def tokenize(documents: Iterator[str], target: Target) -> Int[np.ndarray, " tokens"]:
    """One stream of token ids: each document as the tokenizer encodes a prompt (with BOS where it adds one), then EOS.

    Raises:
      InputError: for a target without a tokenizer or without an EOS token.
    """
    tokenizer = target.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{target.name}: has no tokenizer, which training on text needs; expected tokenizer.json or "
            "tokenizer.model beside its config.json"
        )
    end = tokenizer.eos_token_id
    if end is None and target.eos_token_ids:
        end = target.eos_token_ids[0]
    if end is None:
        raise InputError(f"{target.name}: neither the tokenizer nor config.json names an EOS token; set eos_token_id")
    parts, texts = [np.zeros((0,), np.int32)], []

    def encode() -> None:
        if texts:  # verbose: the tokenizer would warn of every document that is longer than the context
            parts.extend(np.asarray([*ids, end], np.int32) for ids in tokenizer(texts, verbose=False)["input_ids"])
            texts.clear()

    for text in documents:
        texts.append(text)
        if len(texts) == _TOKENIZED_AT_ONCE:
            encode()
    encode()
    return np.concatenate(parts)


def cut(stream: Int[np.ndarray, " tokens"], sequence_length: int) -> Windows:
    """Consecutive windows of `sequence_length` tokens, all positions counted in the loss; a shorter rest is dropped."""
    count = len(stream) // sequence_length
    tokens = stream[: count * sequence_length].reshape(count, sequence_length)
    return Windows(tokens, np.ones(tokens.shape, np.float32))


def load_windows(
    files: str, evaluation_files: str, held_out: float, target: Target, sequence_length: int
) -> tuple[Windows, Windows]:
    """Training and held-out windows.

    Args:
      files: paths or globs separated by commas, or "stdlib" for the Python standard library's sources.
      evaluation_files: the same for the held-out text. Empty: the standard library's held-out modules for "stdlib",
        else every n-th window of `files`, so that a share `held_out` is kept. Those come from documents that are
        trained on elsewhere; give files of their own for a stricter measure.
      held_out: share of the windows to keep for evaluation where there are no evaluation files.
      target: its tokenizer is used.
      sequence_length: tokens in a window.

    Raises:
      InputError: for files that are missing or malformed, or too little text.
    """
    windows = cut(tokenize(_documents(files, held_out=False), target), sequence_length)
    if evaluation_files or files == STANDARD_LIBRARY:
        evaluation = _documents(evaluation_files or STANDARD_LIBRARY, held_out=True)
        return windows, cut(tokenize(evaluation, target), sequence_length)
    kept = np.arange(len(windows)) % max(2, round(1 / held_out)) == 0
    return windows.take(~kept), windows.take(kept)


def check_files(files: str, evaluation_files: str) -> None:
    """Raises `InputError` for paths or globs (as for `load_windows`) that match nothing; reads none of them."""
    for name in (files, evaluation_files or STANDARD_LIBRARY):
        if name != STANDARD_LIBRARY:
            find_files(_patterns(name))


def _patterns(files: str) -> list[str]:
    return [pattern.strip() for pattern in files.split(",") if pattern.strip()]


def _documents(files: str, held_out: bool) -> Iterator[str]:
    if files == STANDARD_LIBRARY:
        return iter(corpus.standard_library(held_out).values())
    return read_documents(find_files(_patterns(files)))


def training_batches(windows: Windows, batch_size: int, seed: int) -> grain.DatasetIterator:
    """Endless batches in an order shuffled anew each epoch. `get_state` and `set_state` of the iterator save and
    restore the position exactly.

    Raises:
      InputError: for fewer windows than one batch.
    """
    if len(windows) < batch_size:
        raise InputError(
            f"data.files: too little text for one batch; expected at least {batch_size} windows of "
            f"{windows.tokens.shape[1]} tokens, found {len(windows)}; give more text or a smaller batch_size"
        )
    dataset = grain.MapDataset.source(windows).shuffle(seed).repeat().batch(batch_size, drop_remainder=True)
    # The windows are in memory: a short queue is enough to hide the copying.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def evaluation_batches(windows: Windows, batch_size: int, most: int) -> list[dict[str, np.ndarray]]:
    """At most `most` windows, evenly spread over `windows`, always the same. The last batch is filled up with
    positions that do not count.

    Raises:
      InputError: for no windows at all.
    """
    if not len(windows):
        raise InputError(
            f"data.evaluation_files: too little held-out text; expected at least one window of "
            f"{windows.tokens.shape[1]} tokens, found none; give more text or a shorter sequence_length"
        )
    count = min(most, len(windows))
    windows = windows.take(np.arange(count) * len(windows) // count)
    padding = [(0, -count % batch_size), (0, 0)]
    tokens, mask = np.pad(windows.tokens, padding), np.pad(windows.loss_mask, padding)
    starts = range(0, len(tokens), batch_size)
    return [{"tokens": tokens[i : i + batch_size], "loss_mask": mask[i : i + batch_size]} for i in starts]
