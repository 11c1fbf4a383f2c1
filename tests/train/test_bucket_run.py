"""Runs whose folder is in a bucket, in emulators: killed, continued, damaged, contended for. A run that went on must
equal, bit for bit, one to which nothing happened, and its folder was on a disk."""

import concurrent.futures
import glob
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoint.adapter import COMMITTED, adapter_metadata, load_adapter, metadata_of, named_leaves
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.train import checkpoints, run_folder
from kangaroo_jax.train.loop import train
from tests.emulators import Fault
from tests.reports import Said

from .runs import ROOT, assert_same, checkpoint, configured
from .test_faults import flags, started

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
def test_killed_in_the_middle_of_a_save_and_continued_equals_uninterrupted(service, run, settings, target, tmp_path):
    name = "killed"
    output = service.location(name)
    command = flags(settings | {"output": output})
    killed = started([sys.executable, "-c", _DIES, *command])
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, err
    before = service.listing(f"{name}/")
    assert tops(service, name) == {"10", "20", "run.lock"}
    assert f"{name}/10/{COMMITTED}" in before
    assert f"{name}/20/{COMMITTED}" not in before
    assert metadata_of(output)["training"]["step"] == 10  # what decoding takes
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
def test_outages_and_sigterm_on_the_way_change_nothing(aws, run, settings, tmp_path):
    output = aws.location("outages")
    command = flags(settings | {"output": output, "evaluate_every": 1, "evaluation_windows": 64})
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
        rf"{output}: a checkpoint could not be written \({output}/20/\S+: the storage service fails or cannot be "
        rf"reached .*\); when that is fixed, then the same command goes on from step {step}",
        str(error.value),
    )
    aws.faults.clear()
    assert tops(aws, "outages") == {"10", str(step)}
    assert train(configured(settings, output=output)) == run[1]
    assert_same(run[0] / "20", fetched(aws, "outages", 20, tmp_path))


@pytest.mark.long
def test_five_kills_three_preemptions_and_two_outages_change_nothing(gcs, run, settings, tmp_path):
    output = gcs.location("bad-days")
    command = flags(settings | {"output": output, "save_every": 2, "evaluate_every": 1, "evaluation_windows": 64})
    ends = {"kill": -signal.SIGKILL, "preempt": 0, "outage": 1}
    days = ["kill", "outage", "kill", "preempt", "kill", "preempt", "outage", "kill", "preempt", "kill"]
    for step, day in zip(range(1, 20, 2), days, strict=True):
        process = started([sys.executable, "train.py", *command])
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith((f"step {step}:", f"step {step + 1}:")) for line in lines), day
        if day == "outage":
            gcs.faults[:] = [Fault("(POST|PUT) .*", status=503)]
        else:
            process.send_signal(signal.SIGKILL if day == "kill" else signal.SIGTERM)
        _, err = process.communicate(timeout=200)
        assert process.returncode == ends[day], (day, err)
        assert "Traceback" not in err, (day, err)
        gcs.faults.clear()
    assert train(configured(settings, output=output)) == run[1]
    assert_same(run[0] / "20", fetched(gcs, "bad-days", 20, tmp_path))


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.mark.long
def test_data_cache_and_teacher_in_a_bucket_serve_another_machine(gcs, settings, tmp_path, monkeypatch):
    """The second machine finds all of it made, and the third a part damaged; the results are those of a folder."""
    monkeypatch.setattr("kangaroo_jax.train.teacher._PART_BYTES", 20 * 64 * 64 * 2)  # 20 rows
    stdlib = settings["data.files"]
    files = [path for path in glob.glob(stdlib) if not path.endswith("ast.py")]
    for path in files:
        gcs.put(f"data/{os.path.basename(path)}", pathlib.Path(path).read_bytes())
    small = settings | {"steps": 4, "save_every": 4, "teacher": "cached"}
    there = small | {"data.files": gcs.location("data/*.py"), "data.cache": gcs.location("cache")}
    results, reports = [], []
    for machine in ("first", "second", "third"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        reports.append(Said())
        gcs.received = 0
        config = configured(there, output=str(tmp_path / f"run-{machine}"))
        results.append(train(config, report=reports[-1]))
        stored = gcs.listing("cache/")
        if machine == "second":
            damaged = max((name for name in stored if "rows-" in name), key=stored.get)
            before = gcs.content(damaged)
            gcs.put(damaged, before[: len(before) // 2])
    first, second, third = (report.text for report in reports)
    assert "parts, into gs://kangaroo/cache/teacher-" in first
    assert "data: " in first
    assert "to compute" not in second
    assert re.search(r"damaged; computing it again\n", third)
    assert re.search(r"to compute .* 1 of \d+ parts", third)
    assert gcs.content(damaged) == before
    assert len([name for name in stored if "rows-" in name]) > 2
    assert not [name for name in stored if name.endswith((".tmp", ".lock"))]

    folder = small | {"data.files": ",".join(files), "data.cache": str(tmp_path / "folder")}
    assert results == [train(configured(folder, output=str(tmp_path / "run-folder")))] * 3
    assert_same(tmp_path / "run-folder" / "4", tmp_path / "run-second" / "4")


# As train.py, where a process is killed after its step 12: the middle between two checkpoints.
_TWO = """
import os, runpy, signal, sys
from kangaroo_jax import distributed
from kangaroo_jax.train import loop
distributed._LIMITS["heartbeat_timeout_seconds"] = 10  # after which JAX ends a process that misses another
put = loop._Run._put
def killed(self, batch):
    if self.step == 12 and os.environ.get("KILLED") == "yes":
        os.kill(os.getpid(), signal.SIGKILL)
    return put(self, batch)
loop._Run._put = killed
runpy.run_path("train.py", run_name="__main__")
"""


def both(command, environment, killed=None):
    """Two processes of a run, of which one may be killed: exit codes, and what they print."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for i in range(2):
        join = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={i}"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _TWO, *command, *join],
                cwd=ROOT,
                env=environment | {"KILLED": "yes" if i == killed else "no"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        printed = list(executor.map(lambda process: process.communicate(timeout=300), processes))
    return [process.returncode for process in processes], printed


@pytest.mark.long
def test_one_of_two_processes_killed_and_then_both_again_equals_undisturbed(
    gcs, settings, small_target_folder, tmp_path
):
    gcs.put_folder(small_target_folder, "two/target")
    small = settings | {
        "target": gcs.location("two/target"),
        "exit_layer": 1,
        "batch_size": 8,
        "sequence_length": 32,
        "data.cache": gcs.location("two/cache"),
        "mesh.data": 2,
        "evaluate_every": 1000,
    }
    environment = os.environ | gcs.environment | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)}
    environment["XLA_FLAGS"] = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    undisturbed, disturbed = (flags(small | {"output": gcs.location(f"two/{x}")}) for x in ("one", "other"))
    codes, printed = both(undisturbed, environment)
    assert codes == [0, 0], printed
    assert tops(gcs, "two/one") == {"10", "20"}

    codes, printed = both(disturbed, environment, killed=1)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] != 0
    assert tops(gcs, "two/other") == {"10", "run.lock"}
    assert "another task died" in printed[0][1]
    codes, printed = both(disturbed, environment)
    assert codes == [0, 0], printed
    assert f"{gcs.location('two/other')}: going on from step 10" in printed[0][0]
    assert tops(gcs, "two/other") == {"10", "20"}
    folders = [fetched(gcs, f"two/{x}", 20, tmp_path / x) for x in ("one", "other")]
    assert_same(*folders)
