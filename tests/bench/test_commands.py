"""The bench commands as a user runs them: what they print, and one line for what is wrong."""

import json
import re

import pytest

from tests.bench.commands import bench
from tests.bench.models import save_model

COMMANDS = ("roofline", "tune", "peers")
MISTAKES = [
    ([], "bench: error: expected a command, found ''"),
    (["rooflin"], "bench: error: expected a command, found 'rooflin'"),
    (["roofline", "--shape=llama9b"], "llama7b"),
    (["roofline", "--contexts=many"], "--contexts: expected whole numbers above 0, found 'many'"),
    (["roofline", "--max_draft_len=0"], "--max_draft_len: expected at least 1, found 0"),
    (["roofline", "--model=x"], "--model and --adapter belong together"),
    (["roofline", "--shape=llama13b", "--dtype=float32"], "but the device holds"),
    (["roofline", "--shape=llama7b", "--exit_layer=32"], "exit_layer: expected 1 to 31"),
    (["roofline", "--tree_budgets=16,0"], "--tree_budgets: expected whole numbers above 0, found '16,0'"),
    (["roofline", "--tree_topk=0"], "--tree_topk: expected at least 1, found 0"),
    (["roofline", "--tree_budgets=5"], "tree_budget must be at least max_draft_len (6)"),
    (["tune", "--tree_topk=2,x"], "--tree_topk: expected whole numbers above 0, found '2,x'"),
    (["tune", "--tree_topk=100000"], "tree_topk must be at most the"),
    (["tune", "--prompts=/no/such/file"], "/no/such/file: cannot be read"),
    (["tune", "--prompts={bad}"], "bad.jsonl:2: expected an object with a text"),
    (["tune", "--adapter=/no/such/folder"], "/no/such/folder: no such adapter checkpoint"),
    (["peers", "--model=/no/such/folder"], "no such folder"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    bad = folder / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"text": "x"}) + "\n")
    lines = [[word.format(bad=bad) for word in words] for words, _ in MISTAKES]
    found = {}
    for command in COMMANDS:
        own = [i for i, line in enumerate(lines) if (line[0] if line and line[0] in COMMANDS else "tune") == command]
        found |= zip(own, bench([lines[i] for i in own], folder / "cache", command), strict=True)
    return found


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=[" ".join(words) or "none" for words, _ in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(results, i):
    code, _, err = results[i]
    if "peers" in MISTAKES[i][0] and "torch is not installed" in err:
        pytest.skip("torch is not installed")
    assert code == 2, err
    assert MISTAKES[i][1] in err
    assert err.count("\n") == 1


def test_roofline_prints_every_part_and_sums_that_add_up(tmp_path):
    model, adapter = save_model(tmp_path)
    shape = ["--contexts=16", "--max_draft_len=2", "--widths=3", "--tree_topk=2", "--tree_budgets=4"]
    ((code, out, err),) = bench(
        [["roofline", f"--model={model}", f"--adapter={adapter}", *shape]], tmp_path / "cache", "roofline"
    )
    assert code == 0, err
    lines = out.splitlines()
    rows = {name: line[24:].split() for name in PARTS for line in lines if line[:24].strip() == name}
    assert set(rows) == set(PARTS)
    milliseconds = {name: float(row[0]) for name, row in rows.items()}
    differences = ("shallow pass", "tree level of 2")  # of two timings, so noise may win
    assert not {name: value for name, value in milliseconds.items() if value <= 0 and name not in differences}
    plain = milliseconds["plain step"]
    half = 0.0005  # of the last digit printed, in milliseconds: the model is small
    ratio = milliseconds["verification of 3"] / plain
    off = 0.001 + half * (1 + ratio) / (plain - half)
    assert float(rows["verification of 3"][1]) == pytest.approx(ratio, abs=off)
    cost = 2 * milliseconds["draft step"] + milliseconds["shallow pass"] + milliseconds["verification of 3"]
    printed = float(re.search(r"a round of 2 drafts costs (\S+) plain steps", out)[1])
    assert printed == pytest.approx(cost / plain, abs=0.01 + half * (4 + cost / plain) / (plain - half))
    for ours, theirs in (("tree level of 2", "draft step"), ("verification of tree 4", "verification of 3")):
        assert rows[ours][2:4] == rows[theirs][2:4]  # the same bytes
    assert next(float(line[24:].split()[0]) for line in lines if line.startswith("of 2 levels, 4")) > 0
    parts = next(float(line.split()[4]) for line in lines if line.startswith("of 2 drafts"))
    assert parts == pytest.approx(cost, abs=6 * half)


PARTS = (
    *("plain step", "shallow pass", "draft step", "verification of 3", "prefill of 16"),
    *("tree level of 2", "verification of tree 4"),
)
