"""Files of prompts and answers in buckets, in emulators."""

import json

import pytest

from kangaroo_jax.buckets import Bucket
from kangaroo_jax.engine import answer_place
from kangaroo_jax.engine.prompt_file import read_prompts
from kangaroo_jax.errors import InputError


def test_prompts_are_read_from_a_bucket(service):
    service.put("prompts.jsonl", b'{"id": "a", "prompt": "x"}\n')
    (prompt,), bad = read_prompts(service.location("prompts.jsonl"))
    assert (prompt.id, prompt.content, bad) == ("a", "x", [])
    with pytest.raises(InputError, match=f"{service.location('none.jsonl')}: no such object"):
        read_prompts(service.location("none.jsonl"))


def test_two_processes_answer_into_a_bucket_and_another_run_is_refused(service, monkeypatch):
    """As engine/answer_prompts.py does: parts are written by both, and merged by the first."""
    output, source = service.location("answers/out.jsonl"), "prompts.jsonl"
    service.put("answers/out.jsonl.settings.json", b"{}")
    service.put("answers/out.jsonl2", b"a neighbour's")
    listed = lambda: {name.removeprefix("answers/") for name in service.listing("answers/out.jsonl")}  # noqa: E731
    wait = lambda name: None  # noqa: E731
    monkeypatch.setattr(answer_place, "_EVERY", 0.0)
    with answer_place.opened(output, source, True) as first, answer_place.opened(output, source, False) as second:
        assert (first.path.with_name("out.jsonl.settings.json")).read_bytes() == b"{}"
        assert listed() == {"out.jsonl.settings.json", "out.jsonl2", "out.jsonl.lock"}
        for i, place in enumerate((first, second)):
            part = place.path.with_name(f"out.jsonl.part-{i}-of-2")
            part.write_bytes(b"begun\n")
            place.sent()
            part.write_bytes(b"begun\nended\n")
        assert service.content("answers/out.jsonl.part-1-of-2") == b"begun\n"
        second.met(wait, "answers written")
        first.met(wait, "answers written")
        parts = sorted(first.path.parent.glob("*.part-*"))
        first.path.write_bytes(b"".join(part.read_bytes() for part in parts))
        for part in parts:
            part.unlink()
        with pytest.raises(InputError, match=rf"^--output={output} is being written by process \d+ on "):
            monkeypatch.setattr("kangaroo_jax.bucket_lock._RENEWAL", 0.05)
            Bucket(service.location("answers")).write("out.jsonl.lock", b"{}")
            renewed(service, output)
        Bucket(service.location("answers")).write("out.jsonl.lock", json.dumps(first._lock._mine).encode())
    assert service.content("answers/out.jsonl") == b"begun\nended\n" * 2
    assert listed() == {"out.jsonl", "out.jsonl.settings.json", "out.jsonl2"}


def renewed(service, output):
    """Opens the place again while its lock changes."""
    from kangaroo_jax.bucket_lock import BucketLock

    read, bucket = BucketLock._read, Bucket(service.location("answers"))
    with pytest.MonkeyPatch.context() as patch:

        def changed(self):
            found = read(self)
            bucket.write("out.jsonl.lock", json.dumps({"process": 7, "host": "h", "x": len(str(found))}).encode())
            return found

        patch.setattr(BucketLock, "_read", changed)
        with answer_place.opened(output, "p", True):
            pass
