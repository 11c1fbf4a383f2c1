"""The spec_bench command, run on a tiny model: the files are compared with Spec-Bench's format as its evaluation
scripts read it, the texts with `generate_plain`, the summary with what those scripts would compute."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import statistics

import numpy as np
import pytest

from kangaroo_jax import SamplingConfig, generate_plain, load_target
from kangaroo_jax.bench.spec_bench_ask import conversation_ids
from tests.bench.commands import Commands
from tests.bench.models import CONTEXT

pytestmark = pytest.mark.long  # its fixture is a complete run of the command

MAX_NEW_TOKENS = 40
# Of the context, question 205 leaves 35 tokens for its answer, and the second turn of question 206 too few.
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write about the sea.", "Now about a heron."]},
    {"question_id": 91, "category": "coding", "turns": ["def f(x):"]},
    {"question_id": 202, "category": "translation", "turns": ["Guten Morgen."], "reference": ["Good morning."]},
    {"question_id": 205, "category": "summarization", "turns": ["x" * (CONTEXT - 35 - len("s<user> \n<assistant> "))]},
    {"question_id": 206, "category": "qa", "turns": ["Who?", "y" * (CONTEXT - 60)]},
    {"question_id": 207, "category": "qa", "turns": ["What is a kangaroo?"]},
    {"question_id": 208, "category": "math_reasoning", "turns": ["1 + 1 ="]},
    {"question_id": 209, "category": "rag", "turns": ["By the text, why?"]},
]
ANSWERED = [81, 91, 202, 205, 207, 208, 209]
MT_BENCH = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]


def write_lines(path: pathlib.Path, lines: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Run:
    """One finished run of the command, and how to run it again."""

    def __init__(self, folder: pathlib.Path, commands: Commands, saved: tuple[pathlib.Path, pathlib.Path]):
        self.model, self.adapter = saved
        self.questions = write_lines(folder / "question.jsonl", QUESTIONS)
        self.output = folder / "out"
        code, self.stdout, self.stderr = commands.run(*self.line(self.output))
        assert code == 0, self.stderr

    def line(self, output: pathlib.Path, *flags: str) -> list[str]:
        return [
            "spec_bench",
            f"--questions={self.questions}",
            f"--output_dir={output}",
            f"--model={self.model}",
            f"--adapter={self.adapter}",
            f"--max_new_tokens={MAX_NEW_TOKENS}",
            "--max_draft_len=2",  # fewer programs to compile than 6
            "--threshold=0.1",
            "--dtype=float32",
            *flags,
        ]

    def answers(self, method: str) -> list[dict]:
        return read_lines(self.output / f"{method}.jsonl")

    def table(self) -> dict[str, dict[str, str]]:
        """The summary's table: task -> column -> cell."""
        lines = [line for line in (self.output / "summary.md").read_text().splitlines() if line.startswith("|")]
        header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory, commands, saved) -> Run:
    return Run(tmp_path_factory.mktemp("spec_bench"), commands, saved)


@pytest.mark.parametrize("method", ["kangaroo", "plain"])
def test_answer_files_are_in_spec_bench_format(run, method):
    answers = run.answers(method)
    assert [answer["question_id"] for answer in answers] == ANSWERED
    asked = {question["question_id"]: question for question in QUESTIONS}
    for answer in answers:
        assert list(answer) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
        question = asked[answer["question_id"]]
        assert answer["category"] == question["category"]
        assert isinstance(answer["answer_id"], str)
        assert method in answer["model_id"]
        assert "float32" in answer["model_id"]
        assert isinstance(answer["tstamp"], float)
        [choice] = answer["choices"]
        assert list(choice) == ["index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"]
        assert choice["index"] == 0
        turns = len(question["turns"])
        for field, kind in {"turns": str, "decoding_steps": int, "new_tokens": int, "wall_time": float}.items():
            assert [type(value) for value in choice[field]] == [kind] * turns, field
        assert all(0 < tokens <= MAX_NEW_TOKENS for tokens in choice["new_tokens"])
        assert all(seconds > 0 for seconds in choice["wall_time"])
        assert all(type(length) is int for length in choice["accept_lengths"])
        # Every token but the one that prefill gives each turn comes from a round.
        assert sum(choice["accept_lengths"]) + turns == sum(choice["new_tokens"])
        assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
        if method == "plain":
            assert set(choice["accept_lengths"]) <= {1}
    assert len({answer["answer_id"] for answer in answers}) == len(answers)
    assert len({answer["model_id"] for answer in answers}) == 1


def test_turns_are_the_chat_templates_conversation(run):
    target = load_target(str(run.model), "float32")
    choice = run.answers("kangaroo")[0]["choices"][0]
    prompt = "<s>"
    for i, turn in enumerate(QUESTIONS[0]["turns"]):
        prompt += f"<user> {turn}\n"
        ids = target.tokenizer.encode(prompt + "<assistant> ", add_special_tokens=False)
        expected = generate_plain(target, [ids], MAX_NEW_TOKENS)
        assert choice["turns"][i] == expected.texts[0].strip()
        assert choice["new_tokens"][i] == len(expected.tokens[0])
        prompt += f"<assistant> {choice['turns'][i]}\n"


def test_without_a_chat_template_turns_are_concatenated(run):
    target = load_target(str(run.model), "float32")
    target.tokenizer.chat_template = None
    text = target.tokenizer.decode(conversation_ids(target, ["One?", "Two.", "Three?"]))
    assert text == "<s>One?\n\nTwo.\n\nThree?\n\n"


def test_wall_time_is_the_median_of_three_runs(run):
    details = {line["question_id"]: line for line in read_lines(run.output / "details.jsonl")}
    for method in ("kangaroo", "plain"):
        for answer in run.answers(method):
            seconds = details[answer["question_id"]]["seconds"][method]
            assert [len(runs) for runs in seconds] == [3] * len(seconds)
            assert answer["choices"][0]["wall_time"] == [statistics.median(runs) for runs in seconds]


def speed_py(ours: list[dict], plain: list[dict], tokenizer, categories: list[str]) -> tuple[float, float, float]:
    """What Spec-Bench's speed.py prints for the questions of some categories: mean accepted tokens, tokens per second,
    speed-up."""
    accepted, speeds, plain_speeds = [], [], []
    for line in ours:
        if line["category"] in categories:
            choice = line["choices"][0]
            accepted += choice["accept_lengths"]
            speeds.append(np.sum(choice["new_tokens"]) / np.sum(choice["wall_time"]))
    for line in plain:
        if line["category"] in categories:
            choice = line["choices"][0]
            tokens = [len(tokenizer(text).input_ids) - 1 for text in choice["turns"]]
            plain_speeds.append(np.sum(tokens) / np.sum(choice["wall_time"]))
    return np.mean(accepted), np.mean(speeds), np.mean(speeds) / np.mean(plain_speeds)


def test_summary_is_what_spec_bench_computes_from_the_files(run):
    tokenizer = load_target(str(run.model), "float32").tokenizer
    ours, plain, table = run.answers("kangaroo"), run.answers("plain"), run.table()
    tasks = {
        "multi-turn conversation": MT_BENCH,
        **{name: [name] for name in ("translation", "summarization", "qa", "math_reasoning", "rag")},
        "overall": sorted({question["category"] for question in QUESTIONS}),
    }
    assert list(table) == list(tasks)
    for task, categories in tasks.items():
        row = table[task]
        accepted, speed, speedup = speed_py(ours, plain, tokenizer, categories)
        assert abs(float(row["mean accepted tokens"]) - accepted) < 0.006
        assert abs(float(row["Kangaroo tokens/s"]) - speed) < 0.006
        assert abs(float(row["speed-up by speed.py"]) - speedup) < 0.006
        speeds, plain_speeds = (
            [
                sum(choice["new_tokens"]) / sum(choice["wall_time"])
                for line in lines
                for choice in line["choices"]
                if line["category"] in categories
            ]
            for lines in (ours, plain)
        )
        assert abs(float(row["plain tokens/s"]) - np.mean(plain_speeds)) < 0.006
        assert abs(float(row["speed-up"]) - np.mean(speeds) / np.mean(plain_speeds)) < 0.006
        chosen = [line for line in ours if line["category"] in categories]
        assert int(row["questions"]) == len(chosen)
    # equal.py: the texts of all turns, line by line.
    assert [line["choices"][0]["turns"] for line in ours] == [line["choices"][0]["turns"] for line in plain]
    assert table["overall"]["identical"] == "7/7"
    assert (run.output / "summary.md").read_text() == run.stdout


def test_what_the_context_cuts_or_keeps_out_is_counted_and_named(run):
    table = run.table()
    [cut] = [line for line in run.answers("kangaroo") if line["question_id"] == 205]
    assert cut["choices"][0]["new_tokens"] == [35]
    assert {task: row["cut"] for task, row in table.items() if row["cut"] != "0"} == {
        "summarization": "1",
        "overall": "1",
    }
    assert {task: row["skipped"] for task, row in table.items() if row["skipped"] != "0"} == {"qa": "1", "overall": "1"}
    for text in (run.stderr, run.stdout):
        assert re.search(r"question 206.*: turn 2 has a prompt of \d+ tokens, too long for the context of 768", text)


def test_charts_are_drawn(run):
    for name in ("tasks.png", "accept_lengths.png", "acceptance.png"):
        assert (run.output / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_sampled_answers_are_those_of_the_temperature_and_seed_0(run, commands, tmp_path):
    code, stdout, stderr = commands.run(*run.line(tmp_path / "out", "--temperature=0.9", "--limit=1", "--runs=2"))
    assert code == 0, stderr
    assert "temperature 0.9, seed 0" in stdout
    target, question = load_target(str(run.model), "float32"), QUESTIONS[0]
    ids = conversation_ids(target, question["turns"][:1])
    expected = generate_plain(target, [ids], MAX_NEW_TOKENS, sampling=SamplingConfig(0.9, seed=0))
    [plain], [ours] = (read_lines(tmp_path / "out" / f"{method}.jsonl") for method in ("plain", "kangaroo"))
    assert plain["choices"][0]["turns"][0] == expected.texts[0].strip()
    assert ours["choices"][0]["turns"] != run.answers("kangaroo")[0]["choices"][0]["turns"]
    assert "temperature0.9" in ours["model_id"]


# Each mistake is made by a function that prepares files and returns the flags to give after the good ones.
def edit(name: str, line: str):
    def change(run: Run, output: pathlib.Path) -> list[str]:
        path = output.parent / name
        path.write_text(run.questions.read_text() + line + "\n")
        return [f"--questions={path}"]

    return change


def flags(*given: str):
    return lambda run, output: list(given)


def foreign_answers(run: Run, output: pathlib.Path) -> list[str]:
    output.mkdir()
    (output / "plain.jsonl").write_text("{}\n")
    return []


def damaged_answers(run: Run, output: pathlib.Path) -> list[str]:
    shutil.copytree(run.output, output)
    lines = (output / "plain.jsonl").read_text().splitlines()
    (output / "plain.jsonl").write_text("\n".join([lines[0], "not JSON", *lines[2:]]) + "\n")
    return []


def answers_with_other(*given: str):
    def change(run: Run, output: pathlib.Path) -> list[str]:
        shutil.copytree(run.output, output)
        return list(given)

    return change


def other_template(run: Run, output: pathlib.Path) -> list[str]:
    shutil.copytree(run.output, output)
    shutil.copytree(run.model, output.parent / "templates" / "model")
    (output.parent / "templates" / "model" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return [f"--model={output.parent / 'templates' / 'model'}"]


def broken_template(run: Run, output: pathlib.Path) -> list[str]:
    shutil.copytree(run.model, output.parent / "model")
    (output.parent / "model" / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    return [f"--model={output.parent / 'model'}"]


def no_tokenizer(run: Run, output: pathlib.Path) -> list[str]:
    shutil.copytree(
        run.model, output.parent / "model", ignore=shutil.ignore_patterns("tokenizer*", "special*", "chat*")
    )
    return [f"--model={output.parent / 'model'}"]


def output_is_a_file(run: Run, output: pathlib.Path) -> list[str]:
    output.write_text("")
    return []


MISTAKES = {
    "missing file": (flags("--questions=/no/such/file"), "/no/such/file: No such file or directory"),
    "no questions flag": (flags("--questions="), "Is a directory"),
    "not JSON": (edit("q.jsonl", "{'question_id': 1}"), "q.jsonl line 9: not JSON"),
    "not an object": (edit("q.jsonl", "[1]"), "q.jsonl line 9: expected an object"),
    "missing field": (edit("q.jsonl", '{"question_id": 1, "category": "qa"}'), "line 9: has no 'turns'"),
    "unknown category": (
        edit("q.jsonl", '{"question_id": 1, "category": "jokes", "turns": ["x"]}'),
        "line 9: unknown category 'jokes'; Spec-Bench has writing, ",
    ),
    "twice": (
        edit("q.jsonl", '{"question_id": 81, "category": "qa", "turns": ["x"]}'),
        "line 9: question_id 81 comes twice",
    ),
    "empty turn": (edit("q.jsonl", '{"question_id": 1, "category": "qa", "turns": [""]}'), "line 9: turns must be"),
    "no output folder": (output_is_a_file, "out: "),
    "no runs": (flags("--runs=0"), "--runs: expected at least 1, found 0"),
    "no limit": (flags("--limit=0"), "--limit: expected at least 1, found 0"),
    "temperature": (flags("--temperature=-1"), "temperature must be"),
    "threshold": (flags("--threshold=2"), "threshold must be between 0 and 1"),
    "exit layer": (flags("--exit_layer=2"), "but exit_layer=2 was given"),
    "no model": (flags("--model=/no/such/folder"), "/no/such/folder: no such folder"),
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
    "broken template": (broken_template, "the chat template refuses it (no such role)"),
    "no matplotlib": (flags("without:matplotlib"), "matplotlib is not installed"),
    "other tokens": (answers_with_other("--max_new_tokens=41"), "out: its answers were made with max_new_tokens 40"),
    "other threshold": (answers_with_other("--threshold=0.3"), "out: its answers were made with threshold 0.1"),
    "sampled": (answers_with_other("--temperature=0.7"), "out: its answers were made with temperature None, not 0.7"),
    "other dtype": (answers_with_other("--dtype=bfloat16"), "made with dtype 'float32', not 'bfloat16'"),
    "other template": (other_template, "its answers were made with chat_template "),
    "foreign answers": (foreign_answers, "plain.jsonl: exists already"),
    "damaged answers": (damaged_answers, "plain.jsonl line 2: not an answer"),
}


def snapshot(folder: pathlib.Path) -> dict[str, bytes] | None:
    if folder.is_file():
        return {"": folder.read_bytes()}
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else None


@pytest.mark.parametrize("name", MISTAKES)
def test_bad_input_is_one_line_and_changes_nothing(run, commands, tmp_path, name):
    prepare, message = MISTAKES[name]
    folder = tmp_path / "out"
    line = run.line(folder, *prepare(run, folder))
    before = snapshot(folder)
    code, stdout, stderr = commands.run(*line)
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("bench spec_bench: error: ")
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert snapshot(folder) == before


def test_after_a_kill_every_question_is_there_once_with_the_same_texts(run, commands, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(run.output, folder)
    # Killed in question 207's last line; the other tests of a kill are in test_spec_bench_answers.py.
    for file in ("kangaroo", "plain", "details"):
        path = folder / f"{file}.jsonl"
        complete, half = path.read_bytes().splitlines(keepends=True)[:5], b""
        if file == "details":
            half = path.read_bytes().splitlines()[5][:50]
        path.write_bytes(b"".join(complete) + half)
    code, stdout, stderr = commands.run(*run.line(folder))
    assert code == 0, stderr
    kept = 4  # answers with a complete line in all three files
    for method in ("kangaroo", "plain"):
        first, second = run.answers(method), read_lines(folder / f"{method}.jsonl")
        assert [line["question_id"] for line in second] == ANSWERED
        for a, b in zip(first, second, strict=True):
            for field in ("turns", "new_tokens", "decoding_steps", "accept_lengths"):
                assert a["choices"][0][field] == b["choices"][0][field]
        assert [a == b for a, b in zip(first, second, strict=True)] == [i < kept for i in range(len(first))]
    assert [line["question_id"] for line in read_lines(folder / "details.jsonl")] == [
        q["question_id"] for q in QUESTIONS
    ]
    assert "| 7/7 |" in " ".join(stdout.split())


def test_a_finished_run_is_only_summed_up_again(run, commands, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(run.output, folder)
    before = snapshot(folder)
    code, stdout, stderr = commands.run(*run.line(folder))
    assert code == 0, stderr
    assert stdout == run.stdout
    after = snapshot(folder)
    for name in ("kangaroo.jsonl", "plain.jsonl", "details.jsonl", "settings.json", "summary.md"):
        assert after[name] == before[name]
