"""The token cache: used again when it can be, never when it cannot, whole or not there, whatever happens meanwhile."""

import errno
import fcntl
import json
import os
import pathlib
import resource
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

from kangaroo_jax.data import cache as cache_module
from kangaroo_jax.data.cache import CacheFolder, cache_folder, open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.records import find_sources
from kangaroo_jax.errors import InputError
from tests.reports import Said
from tests.tokens import byte_tokenizer

ROOT = pathlib.Path(__file__).parents[2]
CHAT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}, {"from": "gpt", "value": "again"}]


@pytest.fixture
def data(tmp_path):
    """600 records, each telling its number; more than the tokenizer gets at once."""
    lines = [json.dumps({"text": f"record {i} " + "x" * (i % 7)}) for i in range(600)]
    lines[3] = json.dumps({"conversations": CHAT})
    lines[5] = json.dumps({"text": ""})
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def encoder(target_with):
    return Encoder(target_with(byte_tokenizer()), "vicuna_v1.1")


@pytest.fixture
def no_encoding(monkeypatch):
    """Call it to make tokenising an error from here on."""

    def encode(self, *_):
        raise AssertionError("tokenised again")

    return lambda: monkeypatch.setattr(Encoder, "encode", encode)


def open_(folder, data, encoder, max_bad_share=0.0):
    return open_cache(CacheFolder(folder), find_sources(str(data)), encoder, max_bad_share)


def contents(cache):
    return [cache.tokens(record).tolist() for record in range(len(cache))]


def only(folder):
    """The one cache in the folder; nothing else but locks is there."""
    (cache,) = (path for path in folder.iterdir() if path.suffix != ".lock")
    return cache


def test_what_is_read_is_what_was_encoded(tmp_path, data, encoder):
    cache = open_(tmp_path / "cache", data, encoder)
    texts = [json.loads(line).get("text") for line in data.read_text().splitlines()]
    expected = [[*text.encode(), 257] for text in texts if text]
    found = contents(cache)
    answer = bytes(token for token in found.pop(3) if token < 256).decode()
    assert answer.endswith("USER: hi ASSISTANT: hello\n\nagain")
    assert found == expected
    assert cache.lengths.tolist() == [len(tokens) for tokens in contents(cache)]
    assert [cache.describe(record) for record in (0, 3, 5)] == [f"{data}:{line}" for line in (1, 4, 7)]
    counted = np.zeros(cache.lengths.sum(), int)
    for start, end in cache.counted:
        counted[start:end] = 1
    of_record = np.split(counted, np.cumsum(cache.lengths)[:-1])
    assert of_record[0].tolist() == [1] * (len(expected[0]) - 1) + [0]
    assert of_record[3].sum() == len("hello\n\nagain") + 1


def test_a_cache_is_used_again_and_by_copies_of_the_files(tmp_path, data, encoder, no_encoding):
    first = open_(tmp_path / "cache", data, encoder)
    no_encoding()
    copy = tmp_path / "copy.jsonl"
    shutil.copyfile(data, copy)
    os.utime(copy, (0, 0))
    again = open_(tmp_path / "cache", copy, encoder)
    assert contents(again) == contents(first)
    assert again.fingerprint == first.fingerprint
    assert again.describe(0) == f"{copy}:1"


def test_other_data_template_or_tokenizer_is_another_cache(tmp_path, data, encoder, target_with, no_encoding):
    first = open_(tmp_path / "cache", data, encoder)
    before = data.stat()
    data.write_bytes(data.read_bytes().replace(b"record 0", b"record O"))
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.stat().st_size == before.st_size
    second = open_(tmp_path / "cache", data, encoder)
    assert bytes(second.tokens(0)[:8].tolist()) == b"record O"
    third = open_(tmp_path / "cache", data, Encoder(target_with(byte_tokenizer()), "llama-2"))
    fourth = open_(tmp_path / "cache", data, Encoder(target_with(byte_tokenizer("<|x|>")), "llama-2"))
    assert len({cache.fingerprint for cache in (first, second, third)}) == 3
    assert fourth.fingerprint == third.fingerprint  # the same tokens, made anew
    no_encoding()
    assert open_(tmp_path / "cache", data, encoder).fingerprint == second.fingerprint
    with pytest.raises(AssertionError, match="tokenised again"):
        open_(tmp_path / "cache", data, Encoder(target_with(byte_tokenizer()), "llama-3"))


@pytest.mark.parametrize("name", ["tokens.array_record", "index.npz", "manifest"])
def test_a_damaged_cache_is_made_again(tmp_path, data, encoder, name):
    first = open_(tmp_path / "cache", data, encoder)
    expected = contents(first)
    path = only(tmp_path / "cache") / name
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 1
    for damage in (bytes(flipped), whole[: len(whole) // 2], None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        report = Said()
        again = open_cache(CacheFolder(tmp_path / "cache"), find_sources(str(data)), encoder, 0.0, report)
        assert contents(again) == expected
        assert "damaged; making it again" in report.text
    assert only(tmp_path / "cache") == path.parent


SCRIPT = """
import sys, time
from types import SimpleNamespace
from kangaroo_jax.data import cache, encode, records
from tests.tokens import byte_tokenizer

def slow(sources, read=cache.read_records):
    for number, entry in enumerate(read(sources)):
        if number == 400:
            print("in the middle", flush=True)
            time.sleep(600)
        yield entry

cache.read_records = slow
config = SimpleNamespace(vocab_size=2000)
target = SimpleNamespace(config=config, tokenizer=byte_tokenizer(), name="", eos_token_ids=(257,))
encoder = encode.Encoder(target, "vicuna_v1.1")
cache.open_cache(cache.cache_folder(sys.argv[1]), records.find_sources(sys.argv[2]), encoder, 0.0)
"""


def test_killed_in_the_middle_leaves_no_cache(tmp_path, data, encoder):
    arguments = [sys.executable, "-c", SCRIPT, tmp_path / "cache", data]
    with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        process.kill()
        assert said == "in the middle\n", process.stderr.read()
    unfinished = only(tmp_path / "cache")
    assert unfinished.name.endswith(".tmp")
    assert not (unfinished / "manifest").exists()
    cache = open_(tmp_path / "cache", data, encoder)
    assert contents(cache) == contents(open_(tmp_path / "other", data, encoder))
    assert not only(tmp_path / "cache").name.endswith(".tmp")
    assert only(tmp_path / "cache").name == unfinished.name.split(".")[0]  # what was killed was this cache


def test_processes_that_start_together_make_it_once(tmp_path, data, encoder, monkeypatch):
    encoded, results, encode = [], [], Encoder.encode

    def counting(self, places, *rest):
        encoded.extend(places)
        return encode(self, places, *rest)

    monkeypatch.setattr(Encoder, "encode", counting)
    threads = [
        threading.Thread(target=lambda: results.append(open_(tmp_path / "cache", data, encoder))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({cache.fingerprint for cache in results}) == 1
    assert len(results) == 3
    assert len(encoded) == 599


def test_without_locks_the_first_that_is_done_wins(tmp_path, data, encoder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    read, folder = cache_module.read_records, tmp_path / "cache"

    def overtaken(sources):
        yield from read(sources)
        monkeypatch.setattr(cache_module, "read_records", read)
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        faster.append(open_(folder, data, encoder))
        inode.append(only_made(folder).stat().st_ino)

    def only_made(folder):
        return next(path for path in folder.iterdir() if not path.suffix)

    faster, inode = [], []
    monkeypatch.setattr(cache_module, "read_records", overtaken)
    slower = open_(folder, data, encoder)
    assert contents(slower) == contents(faster[0])
    assert only(folder).stat().st_ino == inode[0]


def test_bad_records_are_listed_and_skipped_up_to_a_share(tmp_path, data, encoder):
    lines = data.read_text().splitlines()
    for i in range(20, 32):
        lines[i] = '{"text": oops}'
    data.write_text("\n".join(lines))
    expected = r"data.jsonl:21: not valid JSON .*; 11 more \(12 of 600 records are bad, more than .*max_bad_share 0.01"
    with pytest.raises(InputError, match=expected):
        open_(tmp_path / "cache", data, encoder, max_bad_share=0.01)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())  # nothing was kept
    for _ in range(2):  # when it is made, and when it is there
        report = Said()
        cache = open_cache(CacheFolder(tmp_path / "cache"), find_sources(str(data)), encoder, 0.02, report)
        said = report.text
        assert len(cache) == 587
        assert "587 records" in said
        assert "1 with nothing to learn, 12 bad" in said
        assert said.count(": not valid JSON") == 10
        assert "and 2 more, see " in said
    listed = (only(tmp_path / "cache") / "bad_records.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{data}:{i}" for i in range(21, 33)]
    with pytest.raises(InputError, match="12 of 600 records are bad"):
        open_(tmp_path / "cache", data, encoder, max_bad_share=0.01)


def test_records_with_tokens_that_the_model_lacks_are_bad_records(tmp_path, data, target_with):
    encoder = Encoder(target_with(byte_tokenizer("<pad>"), vocab_size=258), "vicuna_v1.1")
    lines = data.read_text().splitlines()
    for i in (7, 9):
        lines[i] = json.dumps({"text": "a<pad>b"})
    data.write_text("\n".join(lines))
    report = Said()
    cache = open_cache(CacheFolder(tmp_path / "cache"), find_sources(str(data)), encoder, 0.02, report)
    assert len(cache) == 597
    assert "2 bad" in report.text
    assert "data.jsonl:8: the token '<pad>' (id 258) is outside the vocabulary of 258" in report.text
    with pytest.raises(InputError, match=r"data.jsonl:8: the token '<pad>' .*; 1 more \(2 of 600 records are bad"):
        open_(tmp_path / "cache", data, encoder, max_bad_share=0.001)


def test_nothing_to_train_on_is_an_error(tmp_path, encoder):
    (tmp_path / "data.jsonl").write_text('{"conversations": []}\n{"text": " "}\n')
    with pytest.raises(InputError, match=r"data\.jsonl: nothing to train on in 1 files"):
        open_(tmp_path / "cache", tmp_path / "data.jsonl", encoder)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, encoder):
    data = tmp_path / "data.txt"
    data.write_bytes(np.random.default_rng(0).integers(33, 127, 200_000, np.uint8).tobytes())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # stands in for the disk: no larger file
    try:
        with pytest.raises(InputError, match=r"data\.cache: .* cannot be written"):
            open_(tmp_path / "cache", data, encoder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())
    assert open_(tmp_path / "cache", data, encoder).lengths.sum() == 200_001


def test_folders_that_cannot_hold_a_cache_are_named(tmp_path, data, encoder):
    with pytest.raises(InputError, match=r"gs://: the bucket's name is missing"):
        cache_folder("gs://")
    with pytest.raises(InputError, match=r"data\.cache: .*data\.jsonl/cache cannot be written"):
        open_(data / "cache", data, encoder)
