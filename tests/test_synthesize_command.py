"""`python -m kangaroo_jax.data.synthesize` as a user runs it: what it writes and says; one line for each mistake."""

import json
import os

import pytest

from tests.bench.models import save_model
from tests.decode_commands import run_in_one_process

NAME = ["kangaroo_jax.cli.synthesize", "synthesize"]
MISTAKES = [
    (["--output={folder}/a.jsonl"], "--model is missing"),
    (["--model={model}"], "--output is missing"),
    (["--model={model}", "--output={folder}/a.txt"], "training would read it as one text; give it a name that ends in"),
    (["--model={model}", "--output={folder}/no/a.jsonl"], "there is no folder"),
    (["--model={model}", "--output={folder}/a.jsonl", "--conversations=0"], "--conversations: expected a number that"),
    (
        ["--model={model}", "--output={folder}/a.jsonl", "--greedy=2"],
        "--greedy: expected a share of at most 1, found",
    ),
    (["--model={model}", "--output={folder}/a.jsonl", "--template=x"], "--template: expected vicuna_v1.1, llama-2"),
    (["--model={model}", "--output={folder}/a.jsonl", "--prompts=x", "--texts=y"], "--prompts and --texts were both"),
    (
        ["--model={model}", "--output={folder}/a.jsonl", "--prompts=x", "--openings=y"],
        "--prompts and --openings were both",
    ),
    (["--model={model}", "--output={folder}/a.jsonl", "--prompts=x.jsonl"], "x.jsonl: no such file"),
    (["--model={folder}/none", "--output={folder}/a.jsonl"], "none"),
    (["--model={model}", "--output={folder}/b.jsonl", "--seed=2"], "its answers were made with seed 0, not 2; give"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder, and what came of each line of flags: three that are right, then the mistakes."""
    folder = tmp_path_factory.mktemp("work")
    model, _ = save_model(folder)
    good = [f"--model={model}", f"--output={folder}/b.jsonl", "--question_tokens=30", "--answer_tokens=8", "--json"]
    good += ["--batch_size=4", "--turns=1"]
    lines = [[*good, "--conversations=3"], [*good, "--conversations=5"], [*good, "--conversations=5"]]
    lines += [[flag.format(folder=folder, model=model) for flag in flags] for flags, _ in MISTAKES]
    return folder, run_in_one_process(NAME, lines, dict(os.environ))


def test_it_writes_adds_and_says_what_it_did(results):
    folder, found = results
    figures = [json.loads(out.splitlines()[-1]) for _, out, _ in found[:3]]
    assert [code for code, *_ in found[:3]] == [0, 0, 0]
    assert [(one["records"], one["before"]) for one in figures] == [(3, 0), (5, 3), (5, 5)]
    assert figures[0]["tokens"] > 0
    assert figures[2]["tokens"] == 0
    assert "b.jsonl: 3 records, 0 of them before; left out: " in found[0][1]
    records = [json.loads(line) for line in (folder / "b.jsonl").read_text().splitlines()]
    assert len(records) == 5
    # The template has no special token after a user's text: its own words end the turn, and are in no question.
    assert all("<assistant>" not in record["messages"][0]["content"] for record in records)
    assert sorted(path.name for path in folder.glob("*.jsonl*")) == ["b.jsonl", "b.jsonl.settings.json"]


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=lambda number: MISTAKES[number][1])
def test_a_mistake_is_one_line(results, number):
    code, out, err = results[1][3 + number]
    assert (code, out) == (2, "")
    assert err.startswith("synthesize: error: ")
    assert err.count("\n") == 1
    assert MISTAKES[number][1] in err
