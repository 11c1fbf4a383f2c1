"""The token cache: data files are tokenised once, and then read in random order.

A cache is a folder named after a hash of everything that its contents depend on: the bytes of the data files, the
tokenizer and the template. It holds the token ids (ArrayRecord), an index (lengths, the parts that count in the loss,
where each record came from) and, written last, a manifest with the SHA-256 of both. The folder gets its final name when
it is complete. A folder that does not match its manifest is made again.

Where the caches are in a bucket, this machine has a copy of each that it uses, because ArrayRecord reads files alone.
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
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Bool, Int

from kangaroo_jax import json_text, paths
from kangaroo_jax.buckets import Bucket, is_bucket
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.records import BadRecord, Entry, Place, Source, read_records
from kangaroo_jax.errors import InputError
from kangaroo_jax.report import SILENT, Report

_VERSION = 1
_AT_ONCE = 256  # records given to the tokenizer at a time; it processes them in parallel
_LISTED = 10  # bad records to name at most
_TOKENS, _INDEX, _BAD, _MANIFEST = "tokens.array_record", "index.npz", "bad_records.txt", "manifest"


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """The tokens of all records, in the order of the data.

    Attributes:
      lengths: tokens in each record.
      counted: the runs of positions that count in the loss, as [start, end) in the concatenation of all records.
      places: source, line and list item of each record.
      sources: the data files.
      fingerprint: hash of the token ids and of what counts.
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
        """Where each record starts in the concatenation of all records."""
        return np.cumsum(self.lengths) - self.lengths

    def tokens(self, record: int) -> Int[np.ndarray, " tokens"]:
        return np.frombuffer(self._data[int(record)], "<i4")

    def describe(self, record: int) -> str:
        """File and line of a record."""
        return Place(*map(int, self.places[record])).describe(self.sources)


@dataclasses.dataclass(frozen=True)
class CacheFolder:
    """What holds the caches.

    Attributes:
      path: the folder on this machine.
      bucket: where the caches are, if they are in a bucket; `path` then has copies.
    """

    path: pathlib.Path
    bucket: Bucket | None = None

    def __str__(self) -> str:
        return str(self.bucket or self.path)

    def fetch(self, name: str) -> dict[str, int]:
        """Copies the files of the cache called `name` that are in the bucket and not, or of another size, here.
        Returns the name and size of all that the bucket has; nothing without a bucket.

        Raises:
          InputError: for too little room.
        """
        if self.bucket is None:
            return {}
        there = Bucket(f"{self.bucket}/{name}")
        stored, folder = there.list(), self.path / name
        wanted = {file: size for file, size in stored.items() if _size_of(folder / file) != size}
        if wanted:
            folder.mkdir(parents=True, exist_ok=True)
            needed, free = sum(wanted.values()), shutil.disk_usage(folder).free
            if needed > free:
                raise InputError(
                    f"data.cache: a copy of {there} needs {needed} bytes in {folder}, of which {free} are free; make "
                    "room, or name another place with XDG_CACHE_HOME"
                )
            there.fetch(folder, wanted)
        return stored

    def send(self, name: str, files: Sequence[str]) -> None:
        """Writes files of the cache called `name` to the bucket, if there is one."""
        if self.bucket is not None:
            Bucket(f"{self.bucket}/{name}").send(self.path / name, files)


def _size_of(path: pathlib.Path) -> int:
    return path.stat().st_size if path.is_file() else -1


def cache_folder(setting: str) -> CacheFolder:
    """What holds the caches: `data.cache`, or the user's cache folder if that is empty.

    Raises:
      InputError: where no home folder is known, and one is needed.
    """
    if setting and not is_bucket(setting):
        return CacheFolder(paths.expanded(setting).absolute())
    folder = paths.cache_folder()
    if folder is None:
        wrong = (
            f"{setting} needs a home folder for its copies; set XDG_CACHE_HOME"
            if setting
            else ("empty, and no home folder is known here; name a folder with --config.data.cache=...")
        )
        raise InputError(f"data.cache: {wrong}")
    if not setting:
        return CacheFolder(folder.absolute() / "data")
    bucket = Bucket(setting)
    copies = hashlib.sha256(str(bucket).encode()).hexdigest()[:16]
    return CacheFolder(folder.absolute() / "buckets" / copies, bucket)


def open_cache(
    folder: CacheFolder, sources: Sequence[Source], encoder: Encoder, max_bad_share: float, report: Report = SILENT
) -> TokenCache:
    """The tokens of `sources`, read from `folder` or made there first.

    Processes that share the folder wait while one of them makes the cache. If each machine has a folder of its own,
    each makes the same cache.

    Args:
      folder: holds the caches of all data.
      sources: the data files.
      encoder: turns their records into tokens.
      max_bad_share: up to this share of all records may be bad; they are skipped.
      report: takes what there is to say about the data.

    Raises:
      InputError: for files that cannot be read, too many bad records, no good record, or a folder that cannot be
        written. Nothing is left behind then.
    """
    key = _key(sources, encoder)
    path = folder.path / key
    manifest, made = _manifest(path), False  # before locking: a complete cache may be on a read-only disk
    if manifest is None:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            with locked(folder.path / f"{key}.lock", "the tokens", report) as held:
                folder.fetch(key)
                manifest = _manifest(path)  # again: another process may have made it meanwhile
                if made := manifest is None:
                    if path.exists():
                        report.say(f"{folder}/{key}: damaged; making it again")
                        shutil.rmtree(path, ignore_errors=True)
                    if held:
                        # Left by killed processes of this machine: under the lock, no live one writes them.
                        for left in folder.path.glob(f"{key}.{socket.gethostname()}.*.tmp"):
                            shutil.rmtree(left, ignore_errors=True)
                    manifest = _make(path, sources, encoder, max_bad_share, report)
        except OSError as error:
            raise InputError(
                f"data.cache: {folder} cannot be written ({error.strerror}); name another folder"
            ) from None
    _store(folder, key, manifest)
    _check_bad(manifest, max_bad_share, sources)
    _describe(manifest, path, sources, made, report)
    with np.load(path / _INDEX) as index:
        arrays = {name: index[name] for name in ("lengths", "counted", "places")}
    data = ArrayRecordDataSource(str(path / _TOKENS))
    return TokenCache(**arrays, sources=sources, fingerprint=manifest["fingerprint"], _data=data)


def _key(sources: Sequence[Source], encoder: Encoder) -> str:
    """A hash of everything that the cache's contents depend on. Names and dates of the files are not part of it, so a
    copy of the files uses the same cache."""
    digest = hashlib.sha256(f"{_VERSION} {encoder.fingerprint}".encode())
    for source in sources:
        with source.open() as file:
            digest.update(hashlib.file_digest(file, "sha256").digest() + bytes([source.holds_records]))
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def locked(path: pathlib.Path, what: str, report: Report) -> Iterator[bool]:
    """Holds a file lock, which the system releases however the process ends. Yields False on a file system without
    locks. `what` says in the message what the holder of the lock makes."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say(f"{path.parent}: waiting for another process that makes {what}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # some Lustre mounts: every process makes the cache, and the first to finish wins
            yield False
            return
        yield True


def _manifest(path: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a cache; None if it is missing or the files do not match it."""
    try:
        checksum, _, text = (path / _MANIFEST).read_text().partition("\n")
        if checksum != _sha256(text):
            return None
        manifest = json_text.parse(text)
        for name, expected in manifest["files"].items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return None
    except (OSError, ValueError):
        return None
    return manifest


def _store(folder: CacheFolder, key: str, manifest: dict[str, Any]) -> None:
    """Writes a complete cache to the bucket, if there is one that lacks it; the manifest last."""
    if folder.bucket is None:
        return
    here = {name: _size_of(folder.path / key / name) for name in (*manifest["files"], _MANIFEST)}
    if not here.items() <= Bucket(f"{folder.bucket}/{key}").list().items():
        folder.send(key, list(manifest["files"]))
        folder.send(key, [_MANIFEST])


def _make(
    path: pathlib.Path, sources: Sequence[Source], encoder: Encoder, max_bad_share: float, report: Report
) -> dict[str, Any]:
    """Makes the cache in a temporary folder beside `path`, which is renamed when all files are on disk."""
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        manifest = _write(unfinished, sources, encoder, report)
        # Checked before the rename, so that data that is refused leaves no cache.
        _check_bad(manifest, max_bad_share, sources)
        for name in manifest["files"]:
            to_disk(unfinished / name)
        text = json.dumps(manifest)
        (unfinished / _MANIFEST).write_text(f"{_sha256(text)}\n{text}")
        to_disk(unfinished / _MANIFEST)
        try:
            unfinished.rename(path)
        except OSError:
            if _manifest(path) is None:  # otherwise another process was first
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


def _write(folder: pathlib.Path, sources: Sequence[Source], encoder: Encoder, report: Report) -> dict[str, Any]:
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
        with report.bar("tokenising", 1.0) as bar:
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
                    share = low + (high - low) * entry.read
                    bar.show(share, f"{len(lengths)} records, {total / 1e6:.1f} M tokens")
            if waiting:
                add(waiting)
            bar.show(1.0, f"{len(lengths)} records, {total / 1e6:.1f} M tokens")
        writer.close()
    except RuntimeError as error:  # ArrayRecord's error for a full disk
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
            f"data.max_bad_share {max_bad_share} allows: fix them, or raise it)"
        )
    if not good:
        raise InputError(
            f"{sources[0].name}: nothing to train on in {len(sources)} files of data; expected texts, or conversations "
            "that an assistant answers"
        )


def _describe(
    manifest: dict[str, Any], path: pathlib.Path, sources: Sequence[Source], made: bool, report: Report
) -> None:
    """Says how many records there are, and the first bad ones."""
    count, listed = manifest["bad_count"], manifest["bad"]
    if made or count:
        report.say(
            f"data: {manifest['records']} records, {manifest['tokens'] / 1e6:.1f} M tokens; "
            f"left out: {manifest['empty']} with nothing to learn, {count} bad",
        )
    for *place, reason in listed:
        report.say(f"  {Place(*place).describe(sources)}: {reason}")
    if count > len(listed):
        report.say(f"  and {count - len(listed)} more, see {path / _BAD}")


def _shares(sources: Sequence[Source]) -> list[float]:
    """For the progress bar: where each source starts, and the last one ends, as shares of all bytes."""
    sizes = [source.size for source in sources]
    ends = np.cumsum([0, *sizes]) / max(1, sum(sizes))
    return ends.tolist()
