"""A run of 2 processes with 4 devices each, against the same run on one device: losses, checkpoints, who reports."""

import json
import os
import pathlib
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from kangaroo_jax.checkpoint.adapter import newest_step, read_arrays, read_metadata
from kangaroo_jax.train.loop import train
from tests.train.runs import configured

ROOT = pathlib.Path(__file__).parents[2]
# Twice, so that the second restores what the first saved, after once with the teacher computed beforehand, by both. The
# last is meant to be long, but when it has saved step 6 process 1 gets a signal that its machine will be taken away.
_RUN = """
import json, os, pathlib, signal, sys, threading, time
import jax
from kangaroo_jax.cli import command_line, process_flags
from kangaroo_jax.cli.report import TerminalReport
from kangaroo_jax.train import teacher
from kangaroo_jax.train.loop import train
from tests.train.runs import configured

teacher._PART_BYTES = 20 * 32 * 32 * 2  # 20 rows
sys.stdout = open({out!r}, "w")  # Gloo prints as it connects, in pieces, from threads of its own

def signalled(folder):
    while not folder.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)

def main():
    process_flags.join("run")
    settings = json.loads({settings!r})
    report = TerminalReport()
    train(configured(settings, steps=3, teacher="cached", output=settings["output"] + "-cached"), report=report)
    train(configured(settings, steps=3), report=report)
    if jax.process_index() == 1:
        threading.Thread(target=signalled, args=[pathlib.Path(settings["output"]) / "6"], daemon=True).start()
    train(configured(settings, steps=100_000), report=report)

command_line.run("run", main)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory, small_target_folder):
    text = tmp_path_factory.mktemp("data") / "text.jsonl"
    rng = np.random.default_rng(0)
    words = ["kangaroo", "drafts", "tokens", "exits", "early", "and", "verifies", "them"]
    lines = (" ".join(rng.choice(words, 30)) for _ in range(30))
    text.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return {
        "target": str(small_target_folder),
        "exit_layer": 1,
        "batch_size": 8,
        "sequence_length": 32,
        "loss_chunk": 16,
        "data.files": str(text),
        "data.cache": str(tmp_path_factory.mktemp("cache")),
        "data.held_out": 0.1,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 2,
        "log_every": 1,
        "evaluate_every": 3,
        "evaluation_windows": 8,
        "save_every": 3,
        "keep_checkpoints": 1000,
    }


def _losses(folder: pathlib.Path) -> dict[int, float]:
    """Step -> training loss, from TensorBoard's files (records of length, checksum, event, checksum)."""
    losses = {}
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            for value in event.summary.value:
                if value.tag == "train/loss":
                    losses[event.step] = value.simple_value
            data = data[16 + length :]
    return losses


@pytest.mark.long
def test_two_processes_give_the_losses_of_one_device_stop_together_and_the_first_alone_reports(settings, tmp_path):
    train(configured(settings, steps=6, output=str(tmp_path / "one")))

    both = settings | {"output": str(tmp_path / "two"), "mesh.data": 2, "mesh.fsdp": -1, "mesh.model": 2}
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": str(ROOT),
    }
    outs = [tmp_path / f"out{i}" for i in range(2)]
    processes = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                _RUN.format(settings=json.dumps(both), out=str(outs[i])),
                *flags,
                f"--process_id={i}",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    err, other_err = (process.communicate(timeout=300)[1] for process in processes)
    out, other_out = (path.read_text() for path in outs)
    assert [process.returncode for process in processes] == [0, 0], err + other_err
    assert "8 devices: data 2, fsdp 2, model 2" in out
    assert "going on from step 3" in out
    assert "held-out loss" in out + err
    assert "held-out" not in other_out + other_err
    assert other_out == ""
    assert "step/s" not in other_err

    stopped = newest_step(tmp_path / "two")
    assert f"SIGTERM; saved step {stopped.name}, and the same command goes on from there" in out

    expected, found = _losses(tmp_path / "one"), _losses(tmp_path / "two")
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert sorted(found) == list(range(1, int(stopped.name) + 1))
    np.testing.assert_allclose([found[i] for i in range(1, 7)], [expected[i] for i in range(1, 7)], rtol=1e-5)
    assert len(set(expected.values())) == 6
    assert len(list(pathlib.Path(settings["data.cache"]).glob("teacher-*/*.array_record"))) > 2
    cached = _losses(tmp_path / "two-cached")
    np.testing.assert_allclose([cached[i] for i in (1, 2, 3)], [expected[i] for i in (1, 2, 3)], rtol=2e-3)

    one, two = tmp_path / "one" / "6", tmp_path / "two" / "6"
    shapes = {path: np.zeros(shape) for path, shape in read_metadata(one)["parameters"].items()}
    first, second = read_arrays(one, "adapter", shapes), read_arrays(two, "adapter", shapes)
    for path in shapes:
        np.testing.assert_allclose(second[path], first[path], rtol=1e-4, atol=1e-6)
