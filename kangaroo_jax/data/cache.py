"""Tokens on disk: made once from data files, then read at random.

A cache is a folder named after all that its contents follow from: the bytes of the data files, the tokenizer and the
template. It holds the token ids (ArrayRecord), an index (the lengths, the parts that count in the loss, the places the
records came from) and, written last, a manifest with the SHA-256 of both. The folder appears under its name when it is
complete; one whose bytes are not what the manifest says is made again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Int
from tqdm import tqdm

from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.records import BadRecord, Entry, Place, Source, read_records
from kangaroo_jax.errors import InputError

_VERSION = 1
_AT_ONCE = 256  # records; the tokenizer works through them in parallel
_LISTED = 10  # bad records that are printed
_TOKENS, _INDEX, _BAD, _MANIFEST = "tokens.array_record", "index.npz", "bad_records.txt", "manifest"


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The tokens of all records, in the order of the data.

    Attributes:
      lengths: tokens in each record.
      counted: the runs of positions that count in the loss, [start, end) in the row of all records' tokens.
      places: source, line and list item of each record.
      sources: the data files.
      fingerprint: of the token ids and what counts.
    """

    lengths: Int[np.ndarray, " records"]
    counted: Int[np.ndarray, "runs 2"]
    places: Int[np.ndarray, "records 3"]
    sources: Sequence[Source]
    fingerprint: str
    _data: ArrayRecordDataSource

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> Int[np.ndarray, " records"]:
        """Where each record starts in the row of all records' tokens."""
        return np.cumsum(self.lengths) - self.lengths

    def tokens(self, record: int) -> Int[np.ndarray, " tokens"]:
        return np.frombuffer(self._data[int(record)], "<i4")

    def describe(self, record: int) -> str:
        """File and line of a record."""
        return Place(*map(int, self.places[record])).describe(self.sources)


def cache_folder(setting: str) -> pathlib.Path:
    """The folder that holds the caches: `data.cache`, or the user's cache folder if that is empty.

    Raises:
      InputError: for a bucket; ArrayRecord reads files.
    """
    if "://" in setting:
        raise InputError(f"data.cache: expected a folder, found {setting}; mount the bucket, or name a local folder")
    root = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "kangaroo_jax" / "data"
    return (pathlib.Path(setting) if setting else root).expanduser().absolute()


def open_cache(
    folder: pathlib.Path, sources: Sequence[Source], encoder: Encoder, max_bad_share: float, quiet: bool = False
) -> TokenCache:
    """The tokens of `sources`, read from `folder` or made there first.

    Processes that share the folder wait while one of them makes the cache. Where the folder is each machine's own,
    each machine makes its own, and they are the same.

    Args:
      folder: holds the caches of all data.
      sources: the data files.
      encoder: makes their records tokens.
      max_bad_share: the most bad records, as a share of all, that are skipped.
      quiet: print nothing and draw no progress.

    Raises:
      InputError: for files that cannot be read, too many bad records, none that is good, or a folder that cannot be
        written. Nothing is left behind then.
    """
    key = _key(sources, encoder)
    path = folder / key
    manifest, made = _manifest(path), False  # looked for first: a folder that is complete may be read-only
    if manifest is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder / f"{key}.lock", "the tokens", quiet) as held:
                manifest = _manifest(path)  # another process may have made it meanwhile
                if made := manifest is None:
                    if path.exists():
                        _say(quiet, f"{path}: damaged; making it again")
                        shutil.rmtree(path, ignore_errors=True)
                    if held:
                        # What killed processes of this machine left behind is nobody's.
                        for left in folder.glob(f"{key}.{socket.gethostname()}.*.tmp"):
                            shutil.rmtree(left, ignore_errors=True)
                    manifest = _make(path, sources, encoder, max_bad_share, quiet)
        except OSError as error:
            raise InputError(
                f"data.cache: {folder} cannot be written ({error.strerror}); name another folder"
            ) from None
    _check_bad(manifest, max_bad_share, sources)
    _report(manifest, path, sources, made, quiet)
    with np.load(path / _INDEX) as index:
        arrays = {name: index[name] for name in ("lengths", "counted", "places")}
    data = ArrayRecordDataSource(str(path / _TOKENS))
    return TokenCache(**arrays, sources=sources, fingerprint=manifest["fingerprint"], _data=data)


def _key(sources: Sequence[Source], encoder: Encoder) -> str:
    """What the cache's contents follow from. Names and dates do not matter: a copy of the files uses the same cache."""
    digest = hashlib.sha256(f"{_VERSION} {encoder.fingerprint}".encode())
    for source in sources:
        with source.open() as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() + bytes([source.holds_records]))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str, quiet: bool) -> Iterator[bool]:
    """Holds a lock that ends with the process, however it ends; False where the file system has none. `what` is made
    by the process that holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(quiet, f"{path.parent}: waiting for another process that makes {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some Lustre mounts; each process makes the cache, and the first that is done wins
            yield False
            return
        yield True


def _manifest(path: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a cache whose files are what it says, or None."""
    try:
        checksum, _, text = (path / _MANIFEST).read_text().partition("\n")
        if checksum != _sha256(text):
            return None
        manifest = json.loads(text)
        for name, expected in manifest["files"].items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
    except (OSError, ValueError):
        return None
    return manifest


def _make(
    path: pathlib.Path, sources: Sequence[Source], encoder: Encoder, max_bad_share: float, quiet: bool
) -> dict[str, Any]:
    """Makes the cache in a folder beside `path` and renames it when all is on disk."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        manifest = _write(unfinished, sources, encoder, quiet)
        # Checked before the rename: what is refused leaves no cache.
        _check_bad(manifest, max_bad_share, sources)
        for name in manifest["files"]:
            to_disk(unfinished / name)
        text = json.dumps(manifest)
        (unfinished / _MANIFEST).write_text(f"{_sha256(text)}\n{text}")
        to_disk(unfinished / _MANIFEST)
        try:
            unfinished.rename(path)
        except OSError:
            if _manifest(path) is None:  # else another process, on a machine that shares the folder, was first
                raise
        return manifest
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def to_disk(path: pathlib.Path) -> None:
    """Waits until a file's bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(folder: pathlib.Path, sources: Sequence[Source], encoder: Encoder, quiet: bool) -> dict[str, Any]:
    """Writes tokens, index and the list of bad records; returns the manifest."""
    lengths, counted, places, bad = [], [], [], []
    empty = total = 0
    digest = hashlib.sha256()
    try:
        writer = ArrayRecordWriter(str(folder / _TOKENS), "group_size:1")
    except RuntimeError as error:
        raise InputError(f"data.cache: {folder} cannot be written ({error})") from None

    def add(entries: list[Entry]) -> None:
        nonlocal empty, total
        made = encoder.encode([entry.place for entry in entries], [entry.content for entry in entries], sources)
        for entry, tokens in zip(entries, made, strict=True):
            if isinstance(tokens, BadRecord):
                bad.append((*entry.place, str(tokens)))
            elif not tokens.counts.any():
                empty += 1
            else:
                data = tokens.ids.astype("<i4").tobytes()
                writer.write(data)
                runs = _runs(tokens.counts) + total
                digest.update(hashlib.sha256(data).digest() + runs.astype("<i8").tobytes())
                lengths.append(len(tokens.ids))
                counted.append(runs)
                places.append(entry.place)
                total += len(tokens.ids)

    try:
        with tqdm(
            total=100,
            desc="tokenising",
            disable=quiet,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        ) as bar:
            waiting, starts = [], _shares(sources)
            for entry in read_records(sources):
                if isinstance(entry.content, BadRecord):
                    bad.append((*entry.place, str(entry.content)))
                elif entry.content is None:
                    empty += 1
                else:
                    waiting.append(entry)
                if len(waiting) == _AT_ONCE:
                    add(waiting)
                    waiting.clear()
                    low, high = starts[entry.place.source : entry.place.source + 2]
                    bar.n = 100 * (low + (high - low) * entry.read)
                    bar.set_postfix_str(f"{len(lengths)} records, {total / 1e6:.1f} M tokens", refresh=False)
                    bar.update(0)
            if waiting:
                add(waiting)
            bar.n = 100
            bar.set_postfix_str(f"{len(lengths)} records, {total / 1e6:.1f} M tokens")
        writer.close()
    except RuntimeError as error:  # what ArrayRecord says of a full disk
        raise InputError(f"data.cache: {folder} cannot be written ({error})") from None
    finally:
        if writer.is_open():
            with contextlib.suppress(RuntimeError):
                writer.close()
    np.savez(
        folder / _INDEX,
        lengths=np.asarray(lengths, np.int64),
        counted=np.concatenate([np.zeros((0, 2), np.int64), *counted]),
        places=np.asarray(places, np.int64).reshape(-1, 3),
    )
    lines = [f"{Place(*place).describe(sources)}: {reason}\n" for *place, reason in bad]
    (folder / _BAD).write_text("".join(lines), encoding="utf-8")
    hashes = {}
    for name in (_TOKENS, _INDEX, _BAD):
        with (folder / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return {
        "files": hashes,
        "fingerprint": digest.hexdigest(),
        "records": len(lengths),
        "tokens": total,
        "empty": empty,
        "bad_count": len(bad),
        "bad": bad[:_LISTED],
    }


def _runs(counts: Bool[np.ndarray, " tokens"]) -> Int[np.ndarray, "runs 2"]:
    """[start, end) of each run of True."""
    edges = np.flatnonzero(np.diff(counts, prepend=False, append=False))
    return edges.reshape(-1, 2).astype(np.int64)


def _check_bad(manifest: dict[str, Any], max_bad_share: float, sources: Sequence[Source]) -> None:
    """Raises `InputError` for too many bad records, or for no good ones."""
    count, good = manifest["bad_count"], manifest["records"]
    total = count + good + manifest["empty"]
    if count > max_bad_share * total:
        *place, reason = manifest["bad"][0]
        more = f"; {count - 1} more" if count > 1 else ""
        raise InputError(
            f"{Place(*place).describe(sources)}: {reason}{more} ({count} of {total} records are bad, more than "
            f"data.max_bad_share {max_bad_share} allows: mend them, or raise it)"
        )
    if not good:
        raise InputError(
            f"{sources[0].name}: nothing to train on in {len(sources)} files of data; expected texts, or conversations "
            "that an assistant answers"
        )


def _report(manifest: dict[str, Any], path: pathlib.Path, sources: Sequence[Source], made: bool, quiet: bool) -> None:
    """Says how many records there are, and lists the bad ones."""
    count, listed = manifest["bad_count"], manifest["bad"]
    if made or count:
        _say(
            quiet,
            f"data: {manifest['records']} records, {manifest['tokens'] / 1e6:.1f} M tokens; "
            f"left out: {manifest['empty']} with nothing to learn, {count} bad",
        )
    for *place, reason in listed:
        _say(quiet, f"  {Place(*place).describe(sources)}: {reason}")
    if count > len(listed):
        _say(quiet, f"  and {count - len(listed)} more, see {path / _BAD}")


def _shares(sources: Sequence[Source]) -> list[float]:
    """Where each source starts, and the last ends, as shares of all their bytes."""
    sizes = [len(source.text) if source.path is None else source.path.stat().length for source in sources]
    ends = np.cumsum([0, *sizes]) / max(1, sum(sizes))
    return ends.tolist()


def _say(quiet: bool, message: str) -> None:
    if not quiet:
        tqdm.write(message, file=sys.stderr)
