"""What the package asks of buckets, and what it says when something is wrong, against emulators."""

import asyncio
import json
import os
import re
import sys
import time

import pytest

from kangaroo_jax import bucket_lock, buckets
from kangaroo_jax.buckets import Bucket, Copy
from kangaroo_jax.errors import InputError, MachineError

from .emulators import Fault

FOLDER = "objects"


@pytest.fixture
def bucket(service, request):
    return Bucket(service.location(f"{FOLDER}/{request.node.name}"))


def key(bucket, name):
    return f"{bucket.url.removeprefix(bucket.scheme).partition('/')[2]}/{name}"


def test_what_is_written_is_what_another_client_finds(service, bucket, tmp_path):
    assert bucket.list() == {}
    (tmp_path / "a").mkdir()
    files = {"a/small": b"x" * 1000, "empty": b"", "large": bytes(range(256)) * 30_000}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    bucket.send(tmp_path, files)
    bucket.write("note", b"old")
    bucket.write("note", b"new")
    Bucket(f"{bucket}2").write("neighbour", b"")  # of a name that begins with this one's
    assert Bucket(bucket.url[:-1]).list() == {}
    everything = files | {"note": b"new"}
    assert {name: service.content(key(bucket, name)) for name in everything} == everything
    assert bucket.list() == {name: len(everything[name]) for name in sorted(everything)}

    with Copy(bucket) as copy:
        copy.fetch_all(lambda name: name != "note")
        found = {str(x.relative_to(copy.path)): x.read_bytes() for x in copy.path.rglob("*") if x.is_file()}
    assert found == files
    assert not copy.path.exists()
    assert bucket.read_ranges("large", [(1, 4), (0, 300)]) == [files["large"][1:4], files["large"][:300]]
    assert buckets.read_bytes(f"{bucket}/note") == b"new"
    bucket.copy("note", "b/note")
    bucket.remove(["note", "empty", "not there"])
    assert set(service.listing(key(bucket, ""))) == {key(bucket, x) for x in ("a/small", "large", "b/note")}
    with pytest.raises(FileNotFoundError):
        bucket.read("note")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x", "a//x", "./x"])
def test_objects_whose_names_lead_out_of_a_folder_are_refused(service, bucket, tmp_path, name):
    folder = tmp_path / "a" / "b"
    with pytest.raises(InputError, match=rf"/{re.escape(name)}: the name of this object is no path in the folder"):
        bucket.fetch(folder, {"fine": 1, name: 1})
    assert not list(tmp_path.iterdir())


def test_one_of_two_creates_an_object(service, bucket):
    assert [bucket.create("lock", b"first"), bucket.create("lock", b"second")] == [True, False]
    assert service.content(key(bucket, "lock")) == b"first"


@pytest.fixture
def quick(monkeypatch):
    """Clients wait a twentieth of what they would before they ask again."""
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds, *rest: sleep(seconds / 20, *rest))
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(seconds / 20))


def test_what_fails_for_a_moment_or_comes_short_is_asked_for_again(service, bucket, quick, tmp_path, monkeypatch):
    content = bytes(range(256)) * 1000
    (tmp_path / "x").write_bytes(content)
    name = re.escape(bucket.url.rpartition("/")[2].partition("[")[0])
    service.faults += [Fault(f"(PUT|POST) .*{name}", times=2, status=503)]
    bucket.send(tmp_path, ["x"])
    assert service.content(key(bucket, "x")) == content
    for fault in (Fault("GET .*x", times=2, status=503), Fault("GET .*(download|/x)", times=1, cut=True)):
        service.faults[:] = [fault]
        with Copy(bucket) as copy:
            copy.fetch_all()
            assert (copy.path / "x").read_bytes() == content
        assert fault.met == fault.times
        service.faults[:] = [short := Fault("GET .*(download|/x)", times=1, short=True)]
        assert bucket.read_ranges("x", [(0, 100), (200, 400)]) == [content[:100], content[200:400]]
        assert short.met == 1
        service.faults[:] = [short := Fault("GET .*(download|/x$)", times=1, short=True)]
        with Copy(bucket) as copy:
            copy.fetch_all()
            assert (copy.path / "x").read_bytes() == content
        assert short.met == 1
    monkeypatch.setattr(buckets, "_SILENCE", 0.3)
    buckets._client.cache_clear()
    service.faults[:] = [slow := Fault("GET .*(download|/x)", times=1, seconds=1.0)]
    assert bucket.read("x") == content
    assert slow.met == 1


GOOGLE = '{{"error": {{"code": {}, "message": "{}"}}}}'
AMAZON = "<Error><Code>{}</Code><Message>no</Message></Error>"
WRONG = {
    "forbidden": (403, GOOGLE.format(403, "no access"), AMAZON.format("AccessDenied"), "this login may not do that .*"),
    "expired": (
        401,
        GOOGLE.format(401, "Invalid Credentials"),
        AMAZON.format("ExpiredToken"),
        "the login is missing, .*",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_login_that_does_not_do_is_one_line(service, bucket, quick, kind):
    status, google, amazon, expected = WRONG[kind]
    amazon_status = 400 if kind == "expired" else 403
    service.faults[:] = [
        Fault(".", status=status, body=google)
        if service.scheme == "gs://"
        else Fault(".", status=amazon_status, body=amazon)
    ]
    fix = {"forbidden": "give it", "expired": "attach"}[kind]
    with pytest.raises(InputError, match=rf"^{re.escape(bucket.url)}/x: {expected}; {fix} "):
        bucket.write("x", b"")


def test_a_service_that_is_out_is_one_line_after_a_while(service, bucket, quick):
    service.faults[:] = [out := Fault(".", status=503)]
    expected = (
        rf"^{re.escape(bucket.url)}: the storage service fails or cannot be reached .*; run the same command again"
    )
    with pytest.raises(MachineError, match=expected):
        bucket.list()
    assert 2 < out.met < 40


def test_wrong_names_and_missing_clients_are_named(service, monkeypatch):
    other = Bucket(f"{service.scheme}no-such-bucket/run")
    expected = f"^{other}: there is no such bucket, or it is not visible with this login$"
    with pytest.raises(InputError, match=expected):
        other.list()
    with pytest.raises(InputError, match=expected):
        other.write("x", b"")
    with pytest.raises(InputError, match=f"^{service.scheme}: the bucket's name is missing"):
        Bucket(service.scheme)
    monkeypatch.setitem(sys.modules, {"gs://": "gcsfs.core", "s3://": "s3fs"}[service.scheme], None)
    buckets._client.cache_clear()
    client = {"gs://": "gcsfs", "s3://": "s3fs"}[service.scheme]
    with pytest.raises(
        InputError, match=rf"needs {client}, which is not installed; pip install 'kangaroo-jax\[bucket\]'"
    ):
        Bucket(service.location("x")).list()


def lock_on(bucket):
    return bucket_lock.BucketLock(bucket, "run.lock", f"output: {bucket}", "name another folder")


@pytest.mark.parametrize(
    "kind", ["of this process", "that is renewed", "of a process that was killed", "left long ago"]
)
def test_a_lock(service, kind, monkeypatch):
    """...is refused where its holder goes on, which it names, and taken where not."""
    monkeypatch.setattr(bucket_lock, "_DEAD", 0.5)
    name = f"lock/{kind.replace(' ', '-')}"
    bucket = Bucket(service.location(name))
    mine = {"process": os.getpid(), "host": "here", "machine": bucket_lock._machine(), "id": "x", "renewals": 0}
    if kind == "of a process that was killed":
        monkeypatch.setattr(bucket_lock, "_DEAD", 1000.0)
        bucket.write("run.lock", json.dumps(mine | {"process": 2**22}).encode())
    elif kind != "of this process":
        bucket.write("run.lock", json.dumps(mine | {"machine": "another", "process": 5}).encode())
    if kind == "that is renewed":
        read = bucket_lock.BucketLock._read

        def renewed(self):
            found = read(self)
            self._bucket.write("run.lock", json.dumps(found | {"renewals": found["renewals"] + 1}).encode())
            return found

        monkeypatch.setattr(bucket_lock.BucketLock, "_read", renewed)
        with pytest.raises(
            InputError, match=f"^output: {bucket} is being written by process 5 on here; wait for its end"
        ):
            lock_on(bucket).__enter__()
        return
    with lock_on(bucket) as lock:
        lock.check()
        if kind == "of this process":
            monkeypatch.setattr(bucket_lock, "_RENEWAL", 0.05)
            monkeypatch.setattr(bucket_lock, "_DEAD", 30.0)
            with (
                lock_on(Bucket(f"{bucket}-2")),
                pytest.raises(InputError, match="is being written by process"),
            ):
                lock_on(Bucket(f"{bucket}-2")).__enter__()
        bucket.write("run.lock", json.dumps(mine).encode())
        with pytest.raises(MachineError, match=f"^output: {bucket}: another run has taken it over"):
            lock.check()
    assert service.listing(f"{name}/") == {f"{name}/run.lock": len(json.dumps(mine))}  # the other's stays
