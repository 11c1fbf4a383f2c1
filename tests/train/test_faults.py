"""What goes wrong around a run: signals, a kill in the middle of a save, damaged checkpoints, a full disk, losses that
are not finite. A run that went on must equal, bit for bit, one to which nothing happened."""

import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kangaroo_jax.checkpoint.adapter import adapter_metadata, load_adapter, named_leaves
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.data.input import load_rows, training_batches
from kangaroo_jax.errors import InputError, MachineError
from kangaroo_jax.train import checkpoints, loop
from kangaroo_jax.train.loop import _Run, train
from kangaroo_jax.train.run_folder import LocalRun
from tests.reports import Said

from .runs import ROOT, assert_same, checkpoint, configured

# train.py, with a signal at one moment: in which step 20 is to be given its final name, or the target is read.
_SIGNALLED = """
import os, runpy, signal, sys
def hook(event, arguments):
    if event == "{event}" and str(arguments[{argument}]).endswith("{name}"):
        os.kill(os.getpid(), signal.{signal})
sys.addaudithook(hook)
runpy.run_path("train.py", run_name="__main__")
"""
_DIES = _SIGNALLED.format(event="os.rename", argument=1, name="/20", signal="SIGKILL")
_PREEMPTED_EARLY = _SIGNALLED.format(event="open", argument=0, name="/config.json", signal="SIGTERM")


def flags(settings):
    return ["--config=configs/demo.py", *(f"--config.{name}={value}" for name, value in settings.items())]


def started(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_killed_in_the_middle_of_a_save_and_then_preempted_equals_uninterrupted(run, settings, tmp_path):
    output = tmp_path / "run"
    # Evaluating at every step leaves time for a signal between the checkpoint and the end.
    slow = settings | {"output": str(output), "evaluate_every": 1, "evaluation_windows": 64}
    killed = started([sys.executable, "-c", _DIES, *flags(slow)])
    _, err = killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL, err
    assert (output / "10").exists()
    assert not (output / "20").exists()
    assert list(output.glob("20.*tmp*"))

    preempted = started([sys.executable, "train.py", *flags(slow)])
    lines = iter(preempted.stdout.readline, "")
    assert any(line.startswith("step 12:") for line in lines)  # evaluated after the one it goes on from
    preempted.send_signal(signal.SIGTERM)
    last = list(lines)[-1]
    assert preempted.wait(timeout=60) == 0, preempted.stderr.read()
    step = int(re.fullmatch(rf"{output}: SIGTERM; saved step (\d+), and the same command .*\n", last).group(1))
    assert 12 <= step < 20
    assert not list(output.glob("*tmp*"))
    assert json.loads((output / str(step) / "metrics" / "metrics").read_text()) == {}

    report = Said()
    result = train(configured(settings, output=str(output)), report=report)
    assert f"going on from step {step}" in report.text
    assert_same(run[0] / "20", output / "20")
    assert result == run[1]


@pytest.mark.long
def test_preempted_before_the_first_step_is_one_line(settings, tmp_path):
    output = tmp_path / "run"
    early = started([sys.executable, "-c", _PREEMPTED_EARLY, *flags(settings | {"output": str(output)})])
    out, err = early.communicate(timeout=60)
    assert early.returncode == 0, err
    assert out == "train.py: SIGTERM; there was nothing to save, and the same command goes on\n"
    assert err == ""
    assert not output.exists()


def test_a_second_run_into_a_folder_is_refused_and_names_the_first(run, settings, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run[0] / "10", output / "10")
    before = sorted(output.rglob("*"))
    (output / "run.lock").write_text("what a kill left\n")
    expected = rf"^output: {output} is being written by process {os.getpid()} on \S+; wait for its end, or name"
    with LocalRun(output).held(), pytest.raises(InputError, match=expected):
        train(configured(settings, output=str(output)))
    assert sorted(output.rglob("*")) == before


def test_a_run_that_another_has_begun_meanwhile_is_refused(run, settings, tmp_path, monkeypatch):
    output, read = tmp_path / "run", loop.load_rows
    monkeypatch.setattr(loop, "load_rows", lambda *x: (shutil.copytree(run[0] / "10", output / "10"), read(*x))[1])
    with pytest.raises(InputError, match=rf"^output: another run has written to {output} meanwhile; run the command"):
        train(configured(settings, output=str(output)))


def test_what_a_kill_left_is_removed_and_a_preempted_run_equals_uninterrupted(run, settings, tmp_path):
    """The long test in one process: what a kill leaves is laid out, and the signal comes at step 13, and again while
    that step is written."""
    output, report = tmp_path / "run", Said()
    killed = []
    shutil.copytree(run[0] / "10", output / "10")
    unfinished = output / "20.orbax-checkpoint-tmp-0"
    shutil.copytree(run[0] / "20" / "adapter", unfinished / "adapter.orbax-checkpoint-tmp-1")
    put = _Run._put
    with pytest.MonkeyPatch.context() as patch:

        def signalled(self, batch):
            if self.step == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return put(self, batch)

        def closed(self):
            os.kill(os.getpid(), signal.SIGTERM)
            close(self)

        close = ocp.CheckpointManager.close
        patch.setattr(_Run, "_put", signalled)
        patch.setattr(ocp.CheckpointManager, "close", closed)
        before = signal.signal(signal.SIGTERM, lambda *_: killed.append("by the second"))
        try:
            assert train(configured(settings, output=str(output)), report=report) is None
        finally:
            signal.signal(signal.SIGTERM, before)
    assert not killed
    assert "going on from step 10" in report.text
    assert report.lines[-1] == f"{output}: SIGTERM; saved step 13, and the same command goes on from there"
    assert not unfinished.exists()
    assert json.loads((output / "13" / "metrics" / "metrics").read_text()) == {}

    result = train(configured(settings, output=str(output)), report=report)
    assert "going on from step 13" in report.text
    assert_same(run[0] / "20", output / "20")
    assert result == run[1]


def flip(path, after):
    """Changes one bit: of the byte after a text, or at a share of the file."""
    data = bytearray(path.read_bytes())
    data[data.index(after) + len(after) if isinstance(after, bytes) else int(after * len(data))] ^= 1
    path.write_bytes(data)


def largest(folder):
    """Of the files that hold arrays."""
    return max((x for x in folder.rglob("*") if x.is_file()), key=lambda x: x.stat().st_size)


def truncate(folder):
    path = largest(folder / "optimizer")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES = {
    "optimizer truncated": truncate,
    "adapter, one bit": lambda folder: flip(largest(folder / "adapter"), 0.5),
    "optimizer, one bit": lambda folder: flip(largest(folder / "optimizer"), 0.8),
    "a digit of a position": lambda folder: flip(folder / "position" / "metadata", b'"step": '),
    "a digit of metadata": lambda folder: flip(folder / "metadata" / "metadata", b'"steps": '),
    "metadata no JSON": lambda folder: (folder / "metadata" / "metadata").write_text("{"),
    "an item missing": lambda folder: shutil.rmtree(folder / "adapter"),
    "all of it missing": lambda folder: [shutil.rmtree(x) if x.is_dir() else x.unlink() for x in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen_and_the_checkpoint_before_is_used(run, tmp_path, damage):
    output = tmp_path / "run"
    shutil.copytree(run[0], output)
    whole = checkpoint(output / "10")
    damage(output / "20")
    report = Said()
    saved = checkpoints.newest(LocalRun(output), whole["adapter"], whole["optimizer"], lambda *_: None, report)
    assert re.fullmatch(rf"{output}/20\S*: damaged .*; set aside as damaged-20\n", report.text)
    assert saved.folder == output / "10"
    assert saved.step == 10
    assert (output / "damaged-20").exists()
    assert not (output / "20").exists()


def test_a_run_goes_on_from_before_the_damage(run, settings, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(run[0], output)
    for step in ("10", "20"):
        shutil.copytree(output / step, output / "earlier" / step)
    truncate(output / "20")
    (output / "damaged-20").mkdir()  # of another time
    report = Said()
    train(configured(settings, output=str(output)), report=report)
    assert "set aside as damaged-20-2" in report.text
    assert "going on from step 10" in report.text
    assert_same(run[0] / "20", output / "20")


@pytest.mark.long
def test_a_full_disk_is_named_and_leaves_the_checkpoints_alone(run, settings, tmp_path):
    room = sum(x.stat().st_size for x in run[0].rglob("*") if x.is_file())  # two checkpoints
    mounted, copied = tmp_path / "mounted", tmp_path / "copied"
    mounted.mkdir()
    if subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", mounted], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: user namespaces are not allowed")
    script = (
        f'mount -t tmpfs -o size={room * 3 // 4} none {mounted} && "$@"; code=$?; '
        f"cp -r {mounted}/run {copied}; exit $code"
    )
    command = [sys.executable, "train.py", *flags(settings | {"output": str(mounted / "run")})]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1, result.stderr
    expected = (
        rf"train\.py: error: {mounted}/run: a checkpoint could not be written \([\d.]+ MB: No space left on device\); "
        "make room, then the same command goes on from step 10"
    )
    assert re.fullmatch(expected, result.stderr.splitlines()[-1])
    assert "Traceback" not in result.stderr
    assert {x.name for x in copied.iterdir() if x.is_dir()} == {"10"}
    expected, found = checkpoint(run[0] / "10"), checkpoint(copied / "10")
    assert found["position"]["checksums"] == expected["position"]["checksums"]


# Orbax's threads may still be at it when its event loop is closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("beforehand", [True, False], ids=["seen beforehand", "seen while writing"])
def test_a_checkpoint_that_cannot_be_written_is_one_error_and_leaves_the_others_alone(
    run, target, tmp_path, monkeypatch, beforehand
):
    """The test above in one process: a limit on files' sizes stands in for the disk's end, or for a neighbour that
    takes the room meanwhile."""
    stored, output = checkpoint(run[0] / "10"), tmp_path / "run"
    parameters = {path: jnp.asarray(x) for path, x in stored["adapter"].items()}

    def save(writer, step):
        metadata = adapter_metadata(parameters, target, 3, {"step": step, "held_out": None}, "kangaroo")
        checkpoints.save(writer, step, parameters, stored["optimizer"], metadata, {})

    with checkpoints.opened(LocalRun(output), keep=2) as writer:
        save(writer, 10)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    reason = r"[\d.]+ MB: File too large" if beforehand else ".*File too large.*"
    if not beforehand:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    (output / "room.orbax-checkpoint-tmp").touch()  # from a kill at that moment
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        expected = rf"^{output}: a checkpoint could not be written \({reason}\); make room, then .* step 10$"
        with pytest.raises(MachineError, match=expected), checkpoints.opened(LocalRun(output), keep=2) as writer:
            save(writer, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [x.name for x in output.iterdir()] == ["10"]
    assert checkpoints.newest(LocalRun(output), parameters, stored["optimizer"], lambda *_: None).step == 10


@pytest.mark.long
def test_a_loss_that_is_not_finite_names_step_and_records_and_saves_nothing(settings, tmp_path, small_target_folder):
    output = tmp_path / "run"
    small = settings | {"target": str(small_target_folder), "exit_layer": 1}
    config = configured(
        small, **{"output": str(output), "log_every": 1, "save_every": 100, "optimizer.learning_rate": 1e38}
    )
    with pytest.raises(InputError, match=r"not finite .*lower optimizer\.learning_rate") as error:
        train(config)
    step = int(re.match(r"step (\d+): ", str(error.value)).group(1))
    assert step > 1
    assert not any(x.is_dir() for x in output.iterdir())
    rows, _ = load_rows(config.data, load_target(small_target_folder, "float32"), 64, 0)
    batch = next(itertools.islice(training_batches(rows, 4, 0), step - 1, None))
    assert str(error.value).endswith(": " + ", ".join(rows.record_ids(batch["row_ids"])))
    assert "argparse.py" in str(error.value) or "ast.py" in str(error.value)


@pytest.mark.long
def test_weights_that_are_not_finite_are_not_saved(settings, tmp_path, small_target_folder):
    """The loss of a step is that of the weights before it, and may still be finite."""
    output = tmp_path / "run"
    small = settings | {"target": str(small_target_folder), "exit_layer": 1}
    config = configured(small, **{"output": str(output), "save_every": 1, "optimizer.learning_rate": 1e30})
    with pytest.raises(InputError, match=r"^step \d+: the adapter's weights or held-out figures are not finite"):
        train(config)
    for folder in output.iterdir():
        if folder.is_dir():
            saved = checkpoint(folder)
            assert all(np.isfinite(x).all() for x in saved["adapter"].values()), folder
            assert all(map(math.isfinite, saved["metadata"]["training"]["held_out"].values())), folder


def test_the_best_is_kept_beside_the_newest_and_is_what_loads(run, target, tmp_path):
    stored = checkpoint(run[0] / "10")
    acceptance = {1: 0.2, 2: 0.5, 3: 0.3, 4: None, 5: 0.4}
    with checkpoints.opened(LocalRun(tmp_path / "run"), keep=2) as writer:
        for step, value in acceptance.items():
            parameters = {path: jnp.asarray(x) + step for path, x in stored["adapter"].items()}
            held_out = None if value is None else {"expected_acceptance": value}
            metadata = adapter_metadata(parameters, target, 3, {"step": step, "held_out": held_out}, "kangaroo")
            checkpoints.save(writer, step, parameters, stored["optimizer"], metadata, {})
    assert {x.name for x in (tmp_path / "run").iterdir()} == {"2", "4", "5"}
    best = named_leaves(load_adapter(tmp_path / "run", target).model)
    for path, x in stored["adapter"].items():
        assert np.array_equal(best[path], x + 2)
