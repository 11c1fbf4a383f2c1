"""Runs whose target writes their data first: `data.files=self`."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from kangaroo_jax.checkpoint.adapter import load_adapter
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.data.input import load_rows
from kangaroo_jax.errors import InputError
from kangaroo_jax.train import own_data
from kangaroo_jax.train.loop import train

from .runs import ROOT, checkpoint, configured

COUNT = 24


@pytest.fixture
def own(settings):
    """Settings of a run of three steps, without any data but texts to continue."""
    texts = settings["data.files"].replace("a*.py", "textwrap.py")
    return settings | {
        "steps": 3,
        "optimizer.warmup_steps": 1,
        "optimizer.schedule": "constant",
        "batch_size": 2,
        "data.files": "self",
        "data.evaluation_files": "",
        "data.held_out": 0.25,
        "data.synthesis.texts": texts,
        "data.synthesis.conversations": COUNT,
        "data.synthesis.question_tokens": 20,
        "data.synthesis.answer_tokens": 12,
        "data.synthesis.batch_size": 8,
    }


class Kill(BaseException):
    pass


@pytest.mark.long
def test_the_target_writes_the_data_and_goes_on_where_it_was_interrupted(own, tmp_path):
    output, tallies = tmp_path / "runs" / "own", []

    def kill(tally):
        tallies.append(tally.records)
        if tally.records == 10:
            raise Kill

    with pytest.raises(Kill):
        train(configured(own, output=str(output)), on_data=kill)
    assert not output.exists()
    train(configured(own, output=str(output)), on_data=lambda tally: tallies.append(tally.records))
    assert tallies == [*range(11), *range(10, COUNT + 1)]
    data = output.with_name("own.data.jsonl")
    assert len(data.read_text().splitlines()) == COUNT
    # Nothing is written again.
    before = data.stat().st_mtime_ns
    train(configured(own, output=str(output), steps=4), on_data=lambda tally: tallies.append(tally.records))
    assert tallies[26:] == [COUNT]
    assert data.stat().st_mtime_ns == before
    assert load_adapter(output, load_target(own["target"], "float32")).exit_layer == 3

    with pytest.raises(InputError, match=rf"has {COUNT} records, more than the 5 that are wanted; give another output"):
        train(configured(own, output=str(output), steps=5, **{"data.synthesis.conversations": 5}))
    other = {"data.synthesis.answer_tokens": 13}
    with pytest.raises(InputError, match=r"its answers were made with answer_tokens 12, not 13; give another output"):
        train(configured(own, output=str(output), steps=5, **other))
    assert checkpoint(output / "4")["position"]["step"] == 4


@pytest.mark.long
def test_a_record_is_trained_on_or_held_out(own, tmp_path):
    config, output = configured(own, output=str(tmp_path / "own")), tmp_path / "own"
    target = load_target(
        config.target, config.dtype, jax.sharding.Mesh([[[jax.devices()[0]]]], ("data", "fsdp", "model"))
    )
    data = own_data.write(config, target, output, lambda _: None)
    parts = [set(rows.record_ids(range(len(rows)))) for rows in load_rows(data, target, 64, config.seed)]
    assert len(parts[0]) == COUNT * 3 // 4
    assert parts[0].isdisjoint(parts[1])
    assert len(parts[0] | parts[1]) == COUNT
    prompts = [json.loads(line)["prompt"] for line in pathlib.Path(data.files).read_text().splitlines()]
    assert len(set(prompts)) == COUNT


SCRIPT = """
import json, pathlib, sys
import jax
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.train import own_data
from kangaroo_jax.train.settings import make_mesh
from tests.train.runs import configured

settings, output, devices = json.loads(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
config = configured(settings, output=str(output))
assert jax.device_count() == devices
own_data.write(config, load_target(config.target, config.dtype, make_mesh(config)), output, lambda _: None)
"""


@pytest.mark.long
def test_several_devices_write_the_same(own, small_target_folder, tmp_path):
    """Two groups of two devices, which hold half of each layer; a batch of 3 is made a multiple of the groups."""
    own = own | {"target": str(small_target_folder), "exit_layer": 1, "data.synthesis.greedy": 1.0}
    own |= {"data.synthesis.batch_size": 3, "dtype": "float32"}
    written = []
    for devices, mesh in ((1, {}), (4, {"mesh.model": 2})):
        output = tmp_path / str(devices)
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(own | mesh | {"batch_size": 4}), str(output), str(devices)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        written.append(output.with_name(f"{devices}.data.jsonl").read_text())
    assert written[0] == written[1]
    assert written[0].count("\n") == COUNT


def test_what_cannot_be_is_one_line(own, tmp_path, monkeypatch):
    without = own | {"data.synthesis.texts": ""}
    with pytest.raises(InputError, match=r"has no chat template, so .* or give texts for it to continue"):
        train(configured(without, output=str(tmp_path / "own")))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"output: .*file cannot be made a folder"):
        train(configured(own, output=str(tmp_path / "file" / "own")))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match=r"self needs a run of one process; write the data first with"):
        train(configured(own, output=str(tmp_path / "own")))
