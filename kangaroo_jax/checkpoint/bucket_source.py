"""A target in a folder of Hugging Face's format in a bucket: small files are fetched, weights are read where they
are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from kangaroo_jax.buckets import Bucket, Copy
from kangaroo_jax.checkpoint.folder_source import folder_source
from kangaroo_jax.checkpoint.source import Source
from kangaroo_jax.errors import InputError

_SMALL = (".json", ".jinja", ".model", "merges.txt")


@contextlib.contextmanager
def bucket_source(url: str) -> Iterator[Source]:
    """Opens a folder with config.json, safetensors, and maybe a tokenizer. What is small is on disk inside.

    Raises:
      InputError: for a missing or corrupt object, or a model or file that is not supported; and as `Bucket`.
    """
    bucket = Bucket(url)
    with Copy(bucket) as copy, bucket.named(copy.path):
        if bucket.url.endswith(".gguf") or ("config.json" not in copy.sizes and _has(copy, ".gguf")):
            raise InputError(f"{url}: GGUF files are read from a disk; copy it there, and give that file")
        if not copy.sizes:
            raise InputError(f"{url}: no such folder in the bucket; expected a target in Hugging Face format")
        copy.fetch_all(lambda name: "/" not in name and name.endswith(_SMALL))
        yield folder_source(copy.path, copy)


def _has(copy: Copy, suffix: str) -> bool:
    return any(name.endswith(suffix) for name in copy.sizes)
