"""The cached teacher against the online one, and its files against kills, damage, full disks and other data.

Tolerances follow from what is stored: bfloat16 has 8 significant bits, so a hidden state is off by at most 2**-9 of
itself.
"""

import collections
import dataclasses
import functools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from kangaroo_jax.data.cache import CacheFolder
from kangaroo_jax.data.input import Rows, device_part, load_rows
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kinds import KINDS
from kangaroo_jax.model.target import deep_apply, shallow_apply
from kangaroo_jax.report import SILENT
from kangaroo_jax.train import teacher as teacher_module
from kangaroo_jax.train.loop import train
from kangaroo_jax.train.objective import adapter_loss, segment_mask
from kangaroo_jax.train.settings import make_mesh
from kangaroo_jax.train.teacher import TeacherCache
from tests.reports import Said

from .runs import assert_same, configured

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = TrainConfig(
    target="small",
    output="run",
    data=DataConfig("chats.json"),
    exit_layer=1,
    batch_size=4,
    steps=100,
    optimizer=OptimizerConfig(warmup_steps=1),
    mesh=MeshConfig(data=1, fsdp=1, model=1),
)
LENGTH = 32
TURNS = [("human", "why do kangaroos jump?"), ("gpt", "they save strength"), ("human", "and?"), ("gpt", "it is fun")]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations, of which only the answers count."""
    path = tmp_path_factory.mktemp("data") / "chats.json"
    turns = [{"from": role, "value": text} for role, text in TURNS]
    records = [{"conversations": [*turns, {"from": "gpt", "value": " again" * (i % 5)}]} for i in range(30)]
    path.write_text(json.dumps(records))
    return DataConfig(str(path), "", 0.1, "vicuna_v1.1", str(path.parent / "tokens"), 0.0)


@pytest.fixture(scope="module")
def small(small_target_folder):
    return load_target(str(small_target_folder), "float32", make_mesh(SETTINGS))


@pytest.fixture(scope="module")
def rows(data, small):
    return load_rows(data, small, LENGTH, seed=0)[0]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """7 rows in a part of the small target's: not a multiple of the batch."""
    monkeypatch.setattr(teacher_module, "_PART_BYTES", 7 * LENGTH * 32 * 2)


@pytest.fixture
def calls(monkeypatch):
    """The rows that the target is run over, in order."""
    seen, read = [], Rows.batch

    def counting(self, ids):
        seen.extend(int(row) for row in ids if row >= 0)
        return read(self, ids)

    monkeypatch.setattr(Rows, "batch", counting)
    return seen


def made(rows, target, folder, report=SILENT, *, everywhere=False):
    cache = TeacherCache(rows, target, CacheFolder(folder), everywhere=everywhere)
    cache.make(target, SETTINGS, report)
    return cache


def parts(cache):
    return sorted(cache.folder.glob("*.array_record"))


def contents(cache):
    return {path.name: path.read_bytes() for path in parts(cache)}


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        ("float32", "kangaroo"),
        pytest.param("bfloat16", "kangaroo", marks=pytest.mark.long),
        pytest.param("float32", "memory", marks=pytest.mark.long),
    ],
)
def test_losses_and_gradients_are_the_online_ones_to_bfloat16(small_target_folder, data, tmp_path, dtype, kind):
    target = load_target(str(small_target_folder), dtype, make_mesh(SETTINGS))
    rows = load_rows(data, target, LENGTH, seed=0)[0]
    everywhere = kind == "memory"
    cache = made(rows, target, tmp_path, everywhere=everywhere)
    batch = cache.extend(rows.batch([5, 2, 8, -1]))  # in other company than when they were computed
    counts, held = batch["loss_mask"] > 0, batch["segment_ids"] > 0
    assert 0.1 < counts.mean() < 0.6
    assert rows.counts[[5, 2, 8]].tolist() == counts.sum(1).tolist()[:3]
    assert rows.lengths[[5, 2, 8]].tolist() == held.sum(1).tolist()[:3]
    assert held.sum() > counts.sum()
    stored = held if everywhere else counts

    mask, positions = segment_mask(batch["segment_ids"]), batch["positions"]

    @jax.jit
    def online(model):
        hidden, _ = shallow_apply(model, batch["tokens"], positions, exit_layer=1, mask=mask)
        return deep_apply(model, hidden, positions, exit_layer=1, mask=mask)[0]

    expected = np.asarray(online(target.model).astype(jnp.bfloat16))
    assert batch["teacher"].dtype == ml_dtypes.bfloat16
    assert np.array_equal(batch["teacher"][stored], expected[stored])
    assert not batch["teacher"][~stored].any()

    adapter = KINDS[kind](target.config, rngs=nnx.Rngs(1))
    depths = np.random.default_rng(0).integers(1, 7, batch["tokens"].shape)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(adapter, model, batch):
        arrays = (batch[name] for name in ("tokens", "loss_mask", "segment_ids", "positions"))
        return adapter_loss(adapter, model, *arrays, batch.get("teacher"), depths=depths, exit_layer=1, chunk=16)

    without = {name: x for name, x in device_part(batch).items() if name != "teacher"}
    (_, cached), gradient = loss(adapter, target.model, device_part(batch))
    (_, live), live_gradient = loss(adapter, target.model, without)
    for name in ("loss", "expected_acceptance", "positions"):
        np.testing.assert_allclose(cached[name], live[name], rtol=5e-4, err_msg=name)
    for found, wanted in zip(jax.tree.leaves(gradient), jax.tree.leaves(live_gradient), strict=True):
        assert np.linalg.norm(found - wanted) < 5e-3 * np.linalg.norm(wanted)
    # The states are used: others give another loss.
    (_, other), _ = loss(adapter, target.model, device_part(batch | {"teacher": batch["teacher"][:, ::-1]}))
    assert abs(other["loss"] - live["loss"]) > 5e-3 * live["loss"]


def given(data):
    """The settings of data that the target does not write, by name."""
    return {name: value for name, value in vars(data).items() if name != "synthesis"}


SCRIPT = """
import json, pathlib, sys, time
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import DataConfig
from kangaroo_jax.data import input
from kangaroo_jax.data.cache import CacheFolder
from kangaroo_jax.train import teacher
from kangaroo_jax.train.settings import make_mesh
from tests.train.test_teacher import LENGTH, SETTINGS

target = load_target(sys.argv[2], "float32", make_mesh(SETTINGS))
rows = input.load_rows(DataConfig(**json.loads(sys.argv[3])), target, LENGTH, seed=0)[0]
teacher._PART_BYTES = int(sys.argv[1])
made, read = [], input.Rows.batch

def slow(self, ids):
    made.append(ids)
    if len(made) == 5:
        print("in the middle", flush=True)
        time.sleep(600)
    return read(self, ids)

input.Rows.batch = slow
teacher.TeacherCache(rows, target, CacheFolder(pathlib.Path(sys.argv[4]))).make(target, SETTINGS)
"""


@pytest.mark.long
def test_killed_in_the_middle_goes_on_from_the_parts_that_are_whole(
    rows, small, small_target_folder, data, tmp_path, calls
):
    part_bytes = str(teacher_module._PART_BYTES)
    arguments = [part_bytes, small_target_folder, json.dumps(given(data)), tmp_path / "killed"]
    command = [sys.executable, "-c", SCRIPT, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        process.kill()
        assert said == "in the middle\n", process.stderr.read()
    cache = TeacherCache(rows, small, CacheFolder(tmp_path / "killed"))
    before = {path: path.stat().st_mtime_ns for path in parts(cache)}
    assert len(before) == 1  # 12 rows were computed and written, of which 7 are a part
    assert len(list(cache.folder.glob("*.tmp"))) == 1

    cache.make(small, SETTINGS)
    assert calls == list(range(7, len(rows)))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(cache.folder.glob("*.tmp"))
    assert len(parts(cache)) == -(-len(rows) // 7) > 3
    whole = made(rows, small, tmp_path / "whole")
    assert contents(cache) == contents(whole)
    calls.clear()
    made(rows, small, tmp_path / "whole")
    assert calls == []


@pytest.fixture(scope="module")
def whole(rows, small, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_module, "_PART_BYTES", 7 * LENGTH * 32 * 2)
        return made(rows, small, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copy(whole, tmp_path):
    """A folder with a copy of the whole cache."""
    shutil.copytree(whole.folder.parent, tmp_path / "copy")
    return tmp_path / "copy"


def test_what_a_kill_left_is_removed_and_the_parts_that_are_there_stay(whole, copy, rows, small, calls):
    """The test of a kill above in one process: what it leaves is laid out."""
    folder = copy / whole.folder.name
    for path in parts(whole)[1:]:
        (folder / path.name).unlink()
    (folder / f"{parts(whole)[1].stem}.host.1.tmp").write_bytes(b"half")
    (first,) = (path.stat().st_mtime_ns for path in folder.glob("*.array_record"))
    again = made(rows, small, copy)
    assert calls == list(range(7, len(rows)))
    assert parts(again)[0].stat().st_mtime_ns == first
    assert not list(folder.glob("*.tmp"))
    assert contents(again) == contents(whole)
    calls.clear()
    made(rows, small, copy)
    assert calls == []


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_part_that_is_not_whole_is_named_and_computed_again(whole, copy, rows, small, calls, damage):
    path = parts(whole)[2]
    name, data = path.name, path.read_bytes()
    found = copy / whole.folder.name / name
    if damage == "gone":
        found.unlink()
    else:
        found.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    report = Said()
    again = made(rows, small, copy, report)
    assert (f"{found}: damaged; computing it again" in report.lines) is (damage != "gone")
    assert f"1 of {len(parts(whole))} parts" in report.text
    assert calls == list(range(14, 21))
    assert contents(again) == contents(whole)


def test_bytes_that_changed_are_named_when_they_are_read(whole, copy, rows, small):
    path = copy / whole.folder.name / parts(whole)[1].name
    data = bytearray(path.read_bytes())
    start = whole.folder.joinpath(path.name).read_bytes().find(whole._read(9).tobytes())
    assert start > 0
    data[start + 5] ^= 1
    path.write_bytes(data)
    cache = made(rows, small, copy)
    assert cache.extend(rows.batch([0, 20]))["teacher"].any()
    with pytest.raises(InputError, match=f"{path}: damaged .*; remove it: the same command computes that part again"):
        cache.extend(rows.batch([7, 8, 9]))
    path.unlink()
    assert contents(made(rows, small, copy)) == contents(whole)


@pytest.mark.parametrize("owners", [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1], [2, 0, 0, 2]])
def test_each_process_gets_whole_parts_and_each_row_is_computed_once(rows, small, tmp_path, owners):
    cache = TeacherCache(rows, small, CacheFolder(tmp_path))
    todo = np.asarray([0, 1, 3, 4, 5])
    written = collections.defaultdict(list)
    for batch in cache._schedule(todo, np.asarray(owners)):
        for owner, row in zip(owners, batch.tolist(), strict=True):
            written[owner].append(row)
    for i, owner in enumerate(sorted(set(owners))):
        expected = [row for part in todo[i :: len(set(owners))] for row in range(7 * part, 7 * part + 7)]
        assert [row for row in written[owner] if row >= 0] == expected


Usage = collections.namedtuple("Usage", "total used free")


def test_a_disk_with_too_little_room_is_refused_in_one_line(whole, rows, small, tmp_path, monkeypatch, calls):
    needed = int(rows.counts.sum()) * 32 * 2
    least = needed + teacher_module._MARGIN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * least, least + 1, least - 1))
    with pytest.raises(InputError, match=r"teacher=cached: .* needs 0\.\d MB, and 1\.1 GB to spare, of which 1\.1 GB"):
        made(rows, small, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]
    assert calls == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2 * least, least, least))
    report = Said()
    cache = made(rows, small, tmp_path, report)
    assert f"({needed} bytes; 1.1 GB are free)" in report.text
    assert report.bars["teacher"] == (len(rows), len(rows))
    size = sum(len(data) for data in contents(cache).values())
    assert needed < size < needed + len(parts(cache)) * 200_000  # what the format adds is within the margin
    # What is there needs no room.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 0))
    made(rows, small, tmp_path)


def test_a_full_disk_or_a_folder_that_is_none_is_one_line(rows, small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data\.cache: .*file/teacher-\w+ cannot be written \(File exists\)"):
        made(rows, small, tmp_path / "file")

    class Full(teacher_module.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(teacher_module, "ArrayRecordWriter", Full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left on device\); make room or name"):
            made(rows, small, tmp_path)
    cache = TeacherCache(rows, small, CacheFolder(tmp_path))
    assert not parts(cache)
    assert not list(cache.folder.glob("*.tmp"))


def test_another_target_dtype_or_data_is_another_cache(data, rows, small, target, tmp_path):
    lower = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.model)
    caches = [
        TeacherCache(rows, small, CacheFolder(tmp_path)),
        TeacherCache(rows, small, CacheFolder(tmp_path), everywhere=True),
        TeacherCache(rows, target, CacheFolder(tmp_path)),
        TeacherCache(rows, dataclasses.replace(small, model=lower), CacheFolder(tmp_path)),
        TeacherCache(load_rows(data, small, LENGTH, seed=1)[0], small, CacheFolder(tmp_path)),
        TeacherCache(load_rows(data, small, LENGTH // 2, seed=0)[0], small, CacheFolder(tmp_path)),
    ]
    assert len({cache.folder for cache in caches}) == len(caches)
    again = TeacherCache(load_rows(data, small, LENGTH, seed=0)[0], small, CacheFolder(tmp_path))
    assert again.folder == caches[0].folder


def test_a_cache_made_under_an_earlier_fingerprint_of_the_target_is_used(rows, small, tmp_path):
    before = dataclasses.replace(small, fingerprint="0123456789abcdef", other_fingerprints=())
    now = dataclasses.replace(small, other_fingerprints=("0123456789abcdef",))
    assert (
        TeacherCache(rows, now, CacheFolder(tmp_path)).folder == TeacherCache(rows, small, CacheFolder(tmp_path)).folder
    )
    TeacherCache(rows, before, CacheFolder(tmp_path)).folder.mkdir()
    assert (
        TeacherCache(rows, now, CacheFolder(tmp_path)).folder
        == TeacherCache(rows, before, CacheFolder(tmp_path)).folder
    )


@pytest.mark.long
def test_a_run_that_stopped_goes_on_bit_for_bit_without_computing_again(
    data, small_target_folder, tmp_path, monkeypatch
):
    overrides = {
        "target": str(small_target_folder),
        "teacher": "cached",
        "exit_layer": 1,
        "batch_size": 4,
        "sequence_length": LENGTH,
        "loss_chunk": 16,
        "save_every": 3,
        "evaluate_every": 3,
        "log_every": 3,
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 1,
        "optimizer.learning_rate": 1e-2,
    } | {f"data.{name}": value for name, value in given(data).items()}

    def run(name, steps, **more):
        report = Said()
        result = train(configured(overrides | more, steps=steps, output=str(tmp_path / name)), report=report)
        return result, report.text

    whole, said = run("whole", 6)
    assert "to compute" in said
    run("stopped", 3)
    monkeypatch.setattr(teacher_module, "program", None)
    resumed, said = run("stopped", 6)
    assert "to compute" not in said
    assert resumed == whole
    assert_same(tmp_path / "whole" / "6", tmp_path / "stopped" / "6")

    with pytest.raises(InputError, match="expected teacher online, found cached"):
        run("whole", 9, teacher="online")
