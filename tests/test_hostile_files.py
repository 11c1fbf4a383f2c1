"""Files that were damaged, or made to do harm: each is read, or refused in one line.

Truth: the rule alone. Whatever a file holds, reading it gives a result, `InputError` or `MachineError`; never another
exception, more memory than a bound, a hang, or a change to any file. Files that are right are changed at random by
hypothesis, with fixed seeds.
"""

import contextlib
import copy
import json
import pathlib
import random
import resource
import shutil
import signal
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kangaroo_jax.checkpoint.adapter import load_adapter, write_draft_settings, write_draft_vocabulary
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import DecideConfig, DraftConfig, LookupConfig, RoundCosts
from kangaroo_jax.data.records import BadRecord, find_sources, read_records
from kangaroo_jax.engine.prompt_file import read_prompts
from kangaroo_jax.errors import InputError, MachineError
from tests.checkpoint import gguf_files
from tests.targets import GOLDEN

_SECONDS = 20
_MEMORY = 2**30  # bytes of address space that reading may take; the files are of at most 3 MB

# Of another type, out of range, or a path that leads elsewhere.
_ODD = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "x",
    "../../../etc/passwd", "\u0000", "é" * 100, [], [None], {}, {"": {}}, [[[[]]]], "a" * 10_000,
)  # fmt: skip


def changed_json(text, rng):
    """JSON with one to three values replaced, removed or added."""
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        place, key = {"": value}, ""
        while isinstance(place[key], dict | list) and len(place[key]) and (place is value or rng.random() < 0.8):
            place = place[key]
            key = rng.choice(sorted(place)) if isinstance(place, dict) else rng.randrange(len(place))
        change = rng.random()
        if change < 0.7 or key == "":
            place[key] = copy.deepcopy(rng.choice(_ODD))
        elif change < 0.9:
            del place[key]
        elif isinstance(place, dict):
            place[rng.choice(["x", "type", "auto_map", "rope_scaling", "0"])] = copy.deepcopy(rng.choice(_ODD))
        value = place[""] if key == "" else value
        if not isinstance(value, dict | list):
            break
    return json.dumps(value)


def changed_bytes(data, rng):
    """Bytes with one to three of them, or a stretch, changed, mostly near the beginning, where headers are."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place = min(int(len(data) * rng.random() ** 6), len(data) - 1)
        change = rng.random()
        if change < 0.4:
            data[place] ^= 1 << rng.randrange(8)
        elif change < 0.6:
            data[place : place + 8] = rng.choice([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"])
        elif change < 0.75:
            del data[place:]
        elif change < 0.9:
            data[place:place] = rng.randbytes(rng.randint(1, 16))
        else:
            del data[place : place + rng.randint(1, 16)]
        if not data:
            break
    return bytes(data)


def changed(file, rng):
    data = file.read_bytes()
    if file.suffix == ".json" or file.name == "metadata":
        with contextlib.suppress(ValueError):
            if rng.random() < 0.8:
                file.write_text(changed_json(data, rng))
                return
    file.write_bytes(changed_bytes(data, rng))


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, target):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    shutil.copytree(GOLDEN / "tiny-gqa-adapter-orbax", folder)
    costs = RoundCosts(1, 0.1, ((1, 1.0), (4, 1.1)), 0.1)
    decide = DecideConfig((costs,), acceptance=0.7, machine="test")
    write_draft_settings(folder, DraftConfig(max_draft_len=4, lookup=LookupConfig(8), decide=decide))
    write_draft_vocabulary(folder, np.arange(100))
    return folder


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    weights = gguf_files.tensors(np.random.default_rng(0), gguf_files.TYPE.Q8_0)
    return gguf_files.write(tmp_path_factory.mktemp("gguf") / "model.gguf", gguf_files.metadata(), weights)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory, target_folder):
    from safetensors.numpy import load_file, save_file

    folder = tmp_path_factory.mktemp("sharded") / "target"
    shutil.copytree(target_folder, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(weights))}
    for part in set(parts.values()):
        save_file({name: x for name, x in weights.items() if parts[name] == part}, folder / part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    return folder


_RECORDS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"text": "a"},
    {"prompt_ids": [1, 2], "completion_ids": [3]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]},
]


def refused(read, *folders):
    """Calls `read` under the rule above, and says whether it refused."""
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def hangs(*_):
        raise TimeoutError(f"not read within {_SECONDS} s")

    handler = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, limits[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
        return False
    except (InputError, MachineError) as error:
        assert str(error)
        return True
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")} == before


def examples(quick, long):
    """A parameter: how many files are tried in the quick suite and in the long one."""
    return pytest.mark.parametrize("count", [quick, pytest.param(long, marks=pytest.mark.long)])


def tried(count, check):
    """Calls `check` with `count` generators of random numbers. It says whether a file was refused; some must be."""
    outcomes = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 2**32))
    def each(seed):
        outcomes.append(check(random.Random(seed)))

    each()
    assert any(outcomes)


def changed_copies(original, names, read, tmp_path):
    """A check: one of the files of a folder is changed in a copy, which is read."""

    def check(rng):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(original, folder)
        changed(rng.choice(sorted(path for name in names for path in folder.glob(name) if path.is_file())), rng)
        return refused(lambda: read(folder), folder)

    return check


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("config.json", 20),
        ("model.safetensors", 20),
        ("tokenizer.json", 5),
        ("tokenizer_config.json", 5),
        *(
            pytest.param(name, count, marks=pytest.mark.long)
            for name, count in (("config.json", 150), ("model.safetensors", 60))
        ),
        *(pytest.param(name, 30, marks=pytest.mark.long) for name in ("tokenizer.json", "tokenizer_config.json")),
    ],
)
def test_a_target_folder(target_folder, tmp_path, name, count):
    tried(count, changed_copies(target_folder, [name], lambda folder: load_target(folder, "float32"), tmp_path))


@examples(20, 100)
def test_the_index_of_a_target_in_parts(sharded_folder, tmp_path, count):
    name = "model.safetensors.index.json"
    tried(count, changed_copies(sharded_folder, [name], lambda folder: load_target(folder, "float32"), tmp_path))


@examples(30, 300)
def test_a_gguf_file(gguf_file, tmp_path, count):
    def check(rng):
        file = tmp_path / "model.gguf"
        file.write_bytes(changed_bytes(gguf_file.read_bytes(), rng))
        return refused(lambda: load_target(file, "float32"), tmp_path)

    tried(count, check)


@examples(8, 60)
@pytest.mark.parametrize("names", [["decode.json"], ["metadata/*", "adapter/**/*", "*"]], ids=["settings", "arrays"])
def test_an_adapter_folder(adapter_folder, target, tmp_path, names, count):
    tried(count, changed_copies(adapter_folder, names, lambda folder: load_adapter(folder, target), tmp_path))


def records(path):
    found = list(read_records(find_sources(path)))
    if any(isinstance(entry.content, BadRecord) for entry in found):
        raise InputError("named as bad, which training counts and leaves out")


@examples(50, 2000)
@pytest.mark.parametrize("read", [records, read_prompts])
def test_lines_of_json(tmp_path, read, count):
    def check(rng):
        file = tmp_path / "records.jsonl"
        lines = [changed_json(json.dumps(record), rng) for record in rng.sample(_RECORDS, 3)]
        text = "\n".join(lines).encode()
        file.write_bytes(text if rng.random() < 0.7 else changed_bytes(text, rng))
        return refused(lambda: read(str(file)), tmp_path)

    tried(count, check)
