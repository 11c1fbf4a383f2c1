"""Buckets: locations that begin with gs:// or s3://, through fsspec's clients (gcsfs and s3fs). No other module knows
those.

An object is complete or not there; a folder of several objects may be half-written, so whoever writes one writes last
an object that says it is complete. Clients retry what a service answers for a moment (429, 5xx), and connections that
are refused or cut; what takes too long or comes short is asked for again here. After that it is one line.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, BinaryIO

from kangaroo_jax.errors import InputError, MachineError, one_line

SCHEMES = ("gs://", "s3://")
_CLIENTS = {"gs://": "gcsfs", "s3://": "s3fs"}
_SILENCE = 20.0  # seconds without a byte, after which a request is given up and, a few times, made again
_ATTEMPTS = 3  # at what takes too long or comes short
_AT_ONCE = 8  # files that are sent or fetched at a time
_LOGIN = {
    "gs://": "attach a service account to the machine, or run `gcloud auth application-default login`",
    "s3://": "attach a role to the machine, or set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
}
_ROLE = {"gs://": "roles/storage.objectUser", "s3://": "s3:ListBucket, s3:GetObject, s3:PutObject and s3:DeleteObject"}


class _ShortError(Exception):
    """Fewer bytes came than were asked for."""


def is_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether a location is in a bucket."""
    return str(path).startswith(SCHEMES)


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A folder in a bucket. Names are those of objects below it, such as "20/metadata/metadata".

    Every method raises:
      InputError: for a missing client, bucket, permission or credential.
      MachineError: for a service that fails or cannot be reached, after retrying.

    Attributes:
      url: gs://BUCKET/FOLDER or s3://BUCKET/FOLDER.
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.scheme + self.url.removeprefix(self.scheme).strip("/"))
        if self.url == self.scheme:
            raise InputError(f"{self.url}: the bucket's name is missing; expected {self.scheme}BUCKET/FOLDER")

    def __str__(self) -> str:
        return self.url

    @property
    def scheme(self) -> str:
        return self.url[: len(SCHEMES[0])]

    @property
    def parent(self) -> tuple[Bucket, str]:
        """The folder that holds the object of this location, and its name there."""
        folder, _, name = self.url.rpartition("/")
        if folder == self.scheme.removesuffix("/"):
            raise InputError(f"{self.url}: is a bucket; expected {self.scheme}BUCKET/NAME")
        return Bucket(folder), name

    def list(self) -> dict[str, int]:
        """Name -> bytes of each object below, sorted by name; empty where there are none."""
        prefix = self._key("")
        try:
            found = self._ask("", lambda client: client.find(prefix, detail=True))
        except FileNotFoundError:
            raise InputError(f"{self.url}: there is no such bucket, or it is not visible with this login") from None
        return {
            key.removeprefix(prefix): int(about["size"])
            for key, about in sorted(found.items())
            if key.startswith(prefix) and not key.endswith("/")
        }

    def read(self, name: str) -> bytes:
        """An object. Raises `FileNotFoundError` where there is none."""
        return self._ask(name, lambda client: client.cat_file(self._key(name)))

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Parts of an object, each [start, stop) in bytes, requested together. Raises `FileNotFoundError`."""
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]

        def read(client: Any) -> list[bytes]:
            found = client.cat_ranges([self._key(name)] * len(ranges), starts, stops, on_error="raise")
            for part, start, stop in zip(found, starts, stops, strict=True):
                if len(part) != stop - start:
                    raise _ShortError(f"{len(part)} bytes of {stop - start}")
            return found

        return self._ask(name, read) if ranges else []

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """An object as a file, which is read in pieces."""
        try:
            with self._ask(name, lambda client: client.open(self._key(name), "rb")) as file:
                yield file
        except Exception as error:  # also of the caller's own code, whose other errors are not ours to explain
            if type(error).__module__.partition(".")[0] not in _LIBRARIES and not isinstance(error, OSError):
                raise
            raise self._explained(name, error) from None

    def write(self, name: str, content: bytes) -> None:
        """Writes an object, or replaces it."""
        self._writing(name, lambda client: client.pipe_file(self._key(name), content))

    def create(self, name: str, content: bytes) -> bool:
        """Writes an object unless there is one of that name; whether it did. Of several that try, one does."""
        try:
            self._writing(name, lambda client: client.pipe_file(self._key(name), content, mode="create"))
        except FileExistsError:
            return False
        return True

    def send(self, folder: pathlib.Path, names: Iterable[str]) -> None:
        """Writes the files of these names in a folder. Files are streamed."""

        def send(name: str) -> None:
            self._writing(name, lambda client: client.put_file(str(folder / name), self._key(name)))

        _together(send, names)

    def fetch(self, folder: pathlib.Path, sizes: dict[str, int]) -> None:
        """Copies objects into a folder. A file has its name when it is complete. Files are streamed.

        Args:
          folder: on this machine.
          sizes: of those wanted, from `list`.
        """

        for name in sizes:
            if not {"", ".", ".."}.isdisjoint(name.split("/")):  # would be written somewhere else
                raise InputError(f"{self.url}/{name}: the name of this object is no path in the folder; remove it")

        def fetch(name: str) -> None:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")

            def get(client: Any) -> None:
                client.get_file(self._key(name), str(unfinished))
                if (found := unfinished.stat().st_size) != sizes[name]:
                    raise _ShortError(f"{found} bytes of {sizes[name]}")

            try:
                self._ask(name, get)
                unfinished.replace(path)
            except FileNotFoundError:
                raise MachineError(f"{self.url}/{name}: was removed while it was read; run the command again") from None
            finally:
                unfinished.unlink(missing_ok=True)

        _together(fetch, sizes)

    def copy(self, name: str, other: str) -> None:
        """Copies an object within the bucket."""
        self._writing(name, lambda client: client.cp_file(self._key(name), self._key(other)))

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there are passed over."""

        def remove(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                self._ask(name, lambda client: client.rm_file(self._key(name)))

        _together(remove, names)

    @contextlib.contextmanager
    def named(self, folder: pathlib.Path) -> Iterator[None]:
        """Inside, messages about files in `folder` name the objects that these are copies of."""
        try:
            yield
        except (InputError, MachineError) as error:
            raise type(error)(self.shown(str(error), folder)) from None

    def shown(self, message: str, folder: pathlib.Path) -> str:
        """A message about files in `folder`, as one about this location."""
        return message.replace(str(folder), self.url)

    def _key(self, name: str) -> str:
        return f"{self.url.removeprefix(self.scheme)}/{name}"

    def _writing(self, name: str, request: Callable[[Any], Any]) -> None:
        try:
            self._ask(name, request)
        except FileNotFoundError:
            raise InputError(f"{self.url}: there is no such bucket, or it is not visible with this login") from None

    def _ask(self, name: str, request: Callable[[Any], Any]) -> Any:
        """What a request of the client gives, with what is wrong in one line. `FileNotFoundError` and `FileExistsError`
        are the caller's."""
        client, attempt = _client(self.scheme), 1
        while True:
            try:
                return request(client)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:  # of the client, the HTTP library under it, and the login's library
                if attempt == _ATTEMPTS or not _is_passing(error):
                    raise self._explained(name, error) from None
            time.sleep(2.0**attempt)
            attempt += 1

    def _explained(self, name: str, error: Exception) -> InputError | MachineError:
        where = f"{self.url}/{name}".removesuffix("/")
        if isinstance(error, FileNotFoundError):
            return InputError(f"{where}: no such object")
        said = f"{type(error).__name__}: {error} {error.__cause__}"  # Amazon's own code is in the cause
        code = getattr(error, "code", None)
        if any(word in said for word in ("Forbidden", "AccessDenied", "Access Denied")) or code == 403:
            return InputError(
                f"{where}: this login may not do that ({one_line(error)}); give it {_ROLE[self.scheme]} on the bucket"
            )
        if code == 401 or isinstance(error, PermissionError) or any(word in said for word in _CREDENTIALS):
            return InputError(
                f"{where}: the login is missing, expired or not valid ({one_line(error)}); {_LOGIN[self.scheme]}, then "
                "run the same command again"
            )
        if isinstance(error, OSError) and error.filename:  # of this machine's disk
            return MachineError(f"{error.filename}: {error.strerror}; make room")
        return MachineError(
            f"{where}: the storage service fails or cannot be reached ({type(error).__name__}: {one_line(error)}); "
            "run the same command again later"
        )


_LIBRARIES = ("gcsfs", "s3fs", "fsspec", "aiohttp", "aiobotocore", "botocore", "google", "requests", "urllib3")
_CREDENTIALS = ("RefreshError", "DefaultCredentialsError", "Credentials", "ExpiredToken", "InvalidAccessKeyId", "Token")


def _is_passing(error: Exception) -> bool:
    """Whether a request that failed so is worth another, and the client has not tried again itself."""
    damaged = type(error).__name__ in ("FlexibleChecksumError", "ChecksumError")  # on its way here
    return damaged or isinstance(error, _ShortError) or type(error) is TimeoutError


def _together(function: Callable[[str], None], names: Iterable[str]) -> None:
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as executor:
        for _ in executor.map(function, names):
            pass


@functools.cache
def _client(scheme: str) -> Any:
    try:
        if scheme == "gs://":
            import aiohttp
            from gcsfs.core import GCSFileSystem

            # It says with a traceback what is one line here.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            patience = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            return GCSFileSystem(use_listings_cache=False, requests_timeout=patience)
        from s3fs import S3FileSystem

        logging.getLogger("s3fs").setLevel(logging.CRITICAL)
        patience = {"connect_timeout": _SILENCE, "read_timeout": _SILENCE}
        return S3FileSystem(use_listings_cache=False, config_kwargs=patience)
    except ImportError:
        raise InputError(
            f"{scheme}...: needs {_CLIENTS[scheme]}, which is not installed; pip install 'kangaroo-jax[bucket]'"
        ) from None


class Copy:
    """A folder on this machine with copies of some of a bucket's objects; a context manager, which removes it.

    Attributes:
      bucket: whose objects they are.
      path: the folder.
      sizes: name -> bytes of all objects of the bucket when the copy was begun.
    """

    def __init__(self, bucket: Bucket):
        self.bucket, self.sizes = bucket, bucket.list()
        self.path = pathlib.Path(tempfile.mkdtemp(prefix="kangaroo_jax-")).resolve()

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def fetch_all(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Copies the objects of the names that are `wanted`, but for those that are there."""
        there = self.path.joinpath
        self.bucket.fetch(self.path, {x: n for x, n in self.sizes.items() if wanted(x) and not there(x).exists()})


def matching(pattern: str) -> dict[str, int]:
    """URL -> bytes of the objects that a pattern with `*`, `?`, `[...]` and `**` names, sorted.

    Raises:
      InputError, MachineError: as `Bucket`.
    """
    folder = Bucket(pattern)
    try:
        found = folder._ask("", lambda client: client.glob(folder.url.removeprefix(folder.scheme), detail=True))
    except FileNotFoundError:
        return {}
    return {f"{folder.scheme}{key}": about["size"] for key, about in sorted(found.items()) if about["type"] == "file"}


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """A file, or an object of a bucket.

    Raises:
      OSError: for a file that cannot be read.
      InputError: for an object that is not there; and as `Bucket`.
    """
    if not is_bucket(path):
        return pathlib.Path(path).read_bytes()
    folder, name = Bucket(str(path)).parent
    try:
        return folder.read(name)
    except FileNotFoundError:
        raise InputError(f"{path}: no such object") from None
