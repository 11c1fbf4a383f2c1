"""Runs whose folder is in a bucket, in emulators: killed, continued, damaged, contended for. A run that went on must
equal, bit for bit, one to which nothing happened, and its folder was on a disk."""

import json
import os
import re
import signal
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.buckets import Bucket
from kangaroo_jax.checkpoint.adapter import COMMITTED, adapter_metadata, load_adapter, named_leaves, training_of
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.train import bucket_run, checkpoints, run_folder
from kangaroo_jax.train.loop import train
from tests.emulators import BUCKET, Fault
from tests.reports import Said

from .runs import assert_same, checkpoint, configured
from .test_faults import ENVIRONMENT, flags, started

# train.py, killed when all of a step but its last object is in the bucket.
_DIES = """
import os, runpy, signal
from kangaroo_jax.buckets import Bucket
write = Bucket.write
def dies(self, name, content):
    if name == "commit_success.txt" and self.url.endswith("/20"):
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, name, content)
Bucket.write = dies
runpy.run_path("train.py", run_name="__main__")
"""


def fetched(service, run, step, folder):
    """A step, as another client finds it."""
    prefix = f"{run}/{step}/"
    for name in service.listing(prefix):
        path = folder / str(step) / name.removeprefix(prefix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(service.content(name))
    return folder / str(step)


def tops(service, run):
    """What is directly in a run's folder, without events."""
    names = {name.removeprefix(f"{run}/").partition("/")[0] for name in service.listing(f"{run}/")}
    return {name for name in names if not name.startswith("events.")}


@pytest.mark.long
def test_killed_in_the_middle_of_a_save_and_continued_equals_uninterrupted(
    service, run, settings, target, tmp_path, monkeypatch
):
    name = "killed"
    output = service.location(name)
    command = flags(settings | {"output": output})
    monkeypatch.setattr("tests.train.test_faults.ENVIRONMENT", ENVIRONMENT | service.environment)
    killed = started([sys.executable, "-c", _DIES, *command])
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, err
    before = service.listing(f"{name}/")
    assert tops(service, name) == {"10", "20", "run.lock"}
    assert f"{name}/10/{COMMITTED}" in before
    assert f"{name}/20/{COMMITTED}" not in before
    assert training_of(output)["step"] == 10  # what decoding takes
    killed_arrays = checkpoint(fetched(service, name, 10, tmp_path / "first"))["adapter"]
    loaded = named_leaves(load_adapter(output, target).model)
    assert all(np.array_equal(loaded[path], x) for path, x in killed_arrays.items())

    continued = started([sys.executable, "train.py", *command])
    out, err = continued.communicate(timeout=120)
    assert continued.returncode == 0, err
    assert f"{output}: going on from step 10" in out
    assert tops(service, name) == {"10", "20"}
    assert_same(run[0] / "20", fetched(service, name, 20, tmp_path / "second"))
    after = service.listing(f"{name}/")
    assert len([x for x in after if x.startswith(f"{name}/events.")]) == 2
    left = {x for x in before if x.startswith(f"{name}/20/")} - set(after)
    assert left, "what the kill left has other names than what was written after it"

    report = Said()
    assert train(configured(settings, output=output), report=report) == run[1]
    assert report.text.startswith(f"{output}: complete, 20 steps")
    assert service.listing(f"{name}/") == after


@pytest.mark.long
def test_outages_and_sigterm_on_the_way_change_nothing(aws, run, settings, tmp_path, monkeypatch):
    output = aws.location("outages")
    command = flags(settings | {"output": output, "evaluate_every": 1, "evaluation_windows": 64})
    monkeypatch.setattr("tests.train.test_faults.ENVIRONMENT", ENVIRONMENT | aws.environment)
    aws.faults += [Fault("(POST|PUT) .*", times=4, status=503), Fault("GET .*", times=2, status=503)]
    preempted = started([sys.executable, "train.py", *command])
    lines = iter(preempted.stdout.readline, "")
    assert any(line.startswith("step 12:") for line in lines)
    preempted.send_signal(signal.SIGTERM)
    last = list(lines)[-1]
    assert preempted.wait(timeout=100) == 0, preempted.stderr.read()
    assert [fault.met for fault in aws.faults] == [4, 2]
    step = int(re.fullmatch(rf"{output}: SIGTERM; saved step (\d+), and the same command .*\n", last).group(1))
    assert tops(aws, "outages") == {"10", str(step)}

    aws.faults[:] = [Fault("PUT .*/20/", status=503)]  # for good
    with pytest.raises(MachineError) as error:
        train(configured(settings, output=output))
    assert re.fullmatch(
        rf"{output}: a checkpoint could not be written \({output}/20/\S+: the storage service fails or cannot be reached "
        rf".*\); when that is fixed, then the same command goes on from step {step}",
        str(error.value),
    )
    aws.faults.clear()
    assert tops(aws, "outages") == {"10", str(step)}
    assert train(configured(settings, output=output)) == run[1]
    assert_same(run[0] / "20", fetched(aws, "outages", 20, tmp_path))


def test_damage_is_seen_and_set_aside_and_the_step_before_is_used(service, run, tmp_path):
    service.put_folder(run[0], "damaged")
    stored = checkpoint(run[0] / "10")
    sizes = service.listing("damaged/20/adapter/")
    largest = max(sizes, key=sizes.get)
    content = bytearray(service.content(largest))
    content[len(content) // 2] ^= 1
    service.put(largest, bytes(content))
    report, output = Said(), service.location("damaged")
    with run_folder.opened(output) as folder, folder.held():
        saved = checkpoints.newest(folder, stored["adapter"], stored["optimizer"], lambda *_: None, report)
        assert saved.step == 10
    assert re.fullmatch(rf"{output}/20/adapter: damaged .*; set aside as damaged-20\n", report.text)
    assert tops(service, "damaged") == {"10", "damaged-20"}
    moved = service.listing("damaged/damaged-20/")
    assert moved[largest.replace("/20/", "/damaged-20/")] == len(content)
    assert not any(name.endswith(f"-20/{COMMITTED}") for name in moved)


def test_the_best_is_kept_beside_the_newest_across_runs(gcs, run, target):
    stored, output = checkpoint(run[0] / "10"), gcs.location("best")
    acceptance = {1: 0.2, 2: 0.5, 3: 0.3, 4: None, 5: 0.4}
    for steps in ((1, 2, 3), (4, 5)):  # two processes, one after the other
        with run_folder.opened(output) as folder, folder.held(), checkpoints.opened(folder, keep=2) as writer:
            for step in steps:
                parameters = {path: jnp.asarray(x) + step for path, x in stored["adapter"].items()}
                value = acceptance[step]
                held_out = None if value is None else {"expected_acceptance": value}
                metadata = adapter_metadata(parameters, target, 3, {"step": step, "held_out": held_out}, "kangaroo")
                checkpoints.save(writer, step, parameters, stored["optimizer"], metadata, {})
        assert tops(gcs, "best") == ({"2", "3"} if steps[0] == 1 else {"2", "4", "5"})
    best = named_leaves(load_adapter(output, target).model)
    for path, x in stored["adapter"].items():
        assert np.array_equal(best[path], x + 2)
    with pytest.raises(InputError, match=rf"^{output}: step 5 has no commit_success.txt, as if half-written"):
        for step in (2, 4, 5):
            gcs.remove(f"best/{step}/{COMMITTED}")
        load_adapter(output, target)


@pytest.mark.parametrize(
    "kind", ["of this process", "that is renewed", "of a process that was killed", "left long ago"]
)
def test_a_lock(service, kind, monkeypatch):
    """...is refused where its holder goes on, which it names, and taken where not."""
    monkeypatch.setattr(bucket_run, "_DEAD", 1.0)
    name = f"lock/{kind.replace(' ', '-')}"
    bucket = Bucket(service.location(name))
    mine = {"process": os.getpid(), "host": "here", "machine": bucket_run._machine(), "id": "x", "renewals": 0}
    if kind == "of a process that was killed":
        monkeypatch.setattr(bucket_run, "_DEAD", 1000.0)
        bucket.write(bucket_run.LOCK, json.dumps(mine | {"process": 2**22}).encode())
    elif kind != "of this process":
        bucket.write(bucket_run.LOCK, json.dumps(mine | {"machine": "another", "process": 5}).encode())
    if kind == "that is renewed":
        read = bucket_run._Lock._read

        def renewed(self):
            found = read(self)
            self._bucket.write(bucket_run.LOCK, json.dumps(found | {"renewals": found["renewals"] + 1}).encode())
            return found

        monkeypatch.setattr(bucket_run._Lock, "_read", renewed)
        with pytest.raises(
            InputError, match=f"^output: {bucket} is being written by process 5 on here; wait for its end"
        ):
            bucket_run._Lock(bucket).__enter__()
        return
    with bucket_run._Lock(bucket) as lock:
        lock.check()
        if kind == "of this process":
            monkeypatch.setattr(bucket_run, "_RENEWAL", 0.05)
            monkeypatch.setattr(bucket_run, "_DEAD", 30.0)
            with (
                bucket_run._Lock(Bucket(f"{bucket}-2")),
                pytest.raises(InputError, match="is being written by process"),
            ):
                bucket_run._Lock(Bucket(f"{bucket}-2")).__enter__()
        bucket.write(bucket_run.LOCK, json.dumps(mine).encode())
        with pytest.raises(MachineError, match=f"^{bucket}: another run has taken it over"):
            lock.check()
    assert service.listing(f"{name}/") == {f"{name}/run.lock": len(json.dumps(mine))}  # the other's stays
    assert BUCKET in bucket.url
