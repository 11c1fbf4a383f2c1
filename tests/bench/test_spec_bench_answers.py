"""Answer files after a kill at any byte, and the summary's arithmetic against files and figures made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, SamplingConfig
from kangaroo_jax.bench import spec_bench_answers as answers
from kangaroo_jax.bench import spec_bench_summary as summary
from kangaroo_jax.bench.spec_bench_answers import QuestionDetails, QuestionResult, SpecBenchAnswer
from kangaroo_jax.bench.spec_bench_questions import Question, load_questions, spread_over_tasks
from kangaroo_jax.bench.spec_bench_run import SpecBenchRun
from kangaroo_jax.config import DecideConfig, RoundCosts
from kangaroo_jax.errors import InputError

SETTINGS = {"model": "m", "runs": 3}
MODEL_IDS = {"kangaroo": "m-kangaroo", "plain": "m-plain"}
FILES = ("kangaroo.jsonl", "plain.jsonl", "details.jsonl")


def result(question_id: int, category: str = "qa") -> QuestionResult:
    ours = SpecBenchAnswer([f"text {question_id}"], [2], [6], [0.5], [2, 3])
    plain = SpecBenchAnswer([f"text {question_id}"], [5], [6], [1.0], [1] * 5)
    seconds = {"kangaroo": [[0.5] * 3], "plain": [[1.0] * 3]}
    details = QuestionDetails(None, {"kangaroo": [4], "plain": [4]}, [9], [False], [2, 3], seconds, 0.0)
    return QuestionResult(question_id, category, {"kangaroo": ours, "plain": plain}, details)


def test_after_a_kill_at_any_byte_each_question_is_there_once(tmp_path):
    complete = tmp_path / "complete"
    assert answers.prepare(complete, SETTINGS) == set()
    for question_id in (1, 2):
        answers.append(complete, result(question_id), MODEL_IDS)
    first_line = {name: (complete / name).read_bytes().splitlines(keepends=True)[0] for name in FILES}
    second_line = {name: (complete / name).read_bytes()[len(first_line[name]) :] for name in FILES}
    total = sum(map(len, second_line.values()))
    for written in (*range(0, total, 13), total - 1, total):
        folder = tmp_path / f"killed after {written} bytes"
        folder.mkdir()
        (folder / "settings.json").write_bytes((complete / "settings.json").read_bytes())
        left = written
        for name in FILES:  # the order in which they are written
            (folder / name).write_bytes(first_line[name] + second_line[name][:left])
            left = max(0, left - len(second_line[name]))
        done = answers.prepare(folder, SETTINGS)
        assert done == ({1, 2} if written == total else {1})
        for question_id in {1, 2} - done:
            answers.append(folder, result(question_id), MODEL_IDS)
        assert answers.read(folder) == [result(1), result(2)]
        for name in FILES:
            lines = (folder / name).read_bytes().splitlines(keepends=True)
            assert lines[0] == first_line[name]
            assert [json.loads(line)["question_id"] for line in lines] == [1, 2]
        assert not list(folder.glob("*.new"))


def test_answers_of_other_settings_are_refused(tmp_path):
    answers.prepare(tmp_path / "out", SETTINGS)
    with pytest.raises(InputError, match="made with runs 3, not 5"):
        answers.prepare(tmp_path / "out", SETTINGS | {"runs": 5})
    with pytest.raises(InputError, match="made with runs 3, not None"):
        answers.prepare(tmp_path / "out", {"model": "m"})


@pytest.mark.parametrize("change", [{}, {"sampling": SamplingConfig(0.7)}], ids=["greedy", "sampled"])
def test_a_run_whose_sequences_decide_is_continued(target, change, tmp_path):
    costs = RoundCosts(batch_size=1, draft_step=0.1, verification=((1, 1.0), (5, 1.3)), shallow=0.1)
    draft = DraftConfig(exit_layer=2, decide=DecideConfig((costs,)))
    adapter = SimpleNamespace(model=np.zeros(3))
    run = SpecBenchRun(target, adapter, draft, "float32", "m", [Question(1, "qa", ("Who?",))], 9, 3, **change)
    assert answers.prepare(tmp_path / "out", run.settings()) == set()
    answers.append(tmp_path / "out", result(1), run.model_ids())
    assert answers.prepare(tmp_path / "out", run.settings()) == {1}
    with pytest.raises(InputError, match=r"made with (decide|temperature) "):
        other = dataclasses.replace(run, draft=draft.at(0), sampling=SamplingConfig(0.8))
        answers.prepare(tmp_path / "out", other.settings())


# question_id, category, and for both methods turns, new_tokens, wall_time; then accept and draft lengths, rounds, cut.
BY_HAND = [
    (
        1,
        "writing",
        ["a b", "c"],
        [6, 4],
        [1.0, 1.0],
        ["a b", "c"],
        [6, 4],
        [2.0, 2.0],
        [3, 2, 1, 2],
        [4, 2, 1, 6],
        [2, 2],
    ),
    (2, "math", ["d e f"], [9], [3.0], ["d e g"], [12], [2.0], [4, 1, 3], [3, 2, 2], [3]),
    (3, "rag", ["h"], [1], [0.5], ["h"], [1], [0.25], [], [], [0]),
]


@pytest.fixture
def by_hand(tmp_path) -> list[QuestionResult]:
    """The results of files written here, field by field, in Spec-Bench's format."""
    files = {name: [] for name in FILES}
    for key, category, turns, tokens, times, *plain, accepted, drafted, rounds in BY_HAND:
        head = {"question_id": key, "category": category}
        for name, answer in {
            "kangaroo.jsonl": (turns, rounds, tokens, times, accepted),
            "plain.jsonl": (
                plain[0],
                [n - 1 for n in plain[1]],
                plain[1],
                plain[2],
                [1] * (sum(plain[1]) - len(turns)),
            ),
        }.items():
            fields = ("turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
            choice = {"index": 0, **dict(zip(fields, answer, strict=True))}
            files[name].append(head | {"answer_id": "x", "model_id": "m", "choices": [choice], "tstamp": 1.0})
        empty = {"prompt_tokens": {}, "max_new_tokens": [], "seconds": {}, "compile_seconds": 0.0}
        cut = [False] * (len(turns) - 1) + [key == 2]
        files["details.jsonl"].append(head | empty | {"skipped": None, "cut": cut, "draft_lengths": drafted})
    files["details.jsonl"].append(
        {"question_id": 4, "category": "rag", **empty, "skipped": "too long", "cut": [], "draft_lengths": []}
    )
    for name, lines in files.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return answers.read(tmp_path)


def test_summary_arithmetic(by_hand):
    rows = {row.task: row for row in summary.summarize(by_hand, lambda text: 1 + len(text.split()))}
    assert list(rows) == ["multi-turn conversation", "rag", "overall"]
    chat = rows["multi-turn conversation"]
    assert (chat.questions, chat.identical, chat.cut, chat.skipped) == (2, 1, 1, 0)
    assert chat.tokens_per_second == pytest.approx((10 / 2 + 9 / 3) / 2)
    assert chat.plain_tokens_per_second == pytest.approx((10 / 4 + 12 / 2) / 2)
    assert chat.speedup == pytest.approx(4 / 4.25)
    assert chat.speed_py_plain_tokens_per_second == pytest.approx((3 / 4 + 3 / 2) / 2)
    assert chat.speed_py_speedup == pytest.approx(4 / 1.125)
    assert chat.mean_accept_length == pytest.approx((3 + 2 + 1 + 2 + 4 + 1 + 3) / 7)
    rag = rows["rag"]
    assert (rag.questions, rag.identical, rag.cut, rag.skipped) == (1, 1, 0, 1)
    assert rag.speedup == pytest.approx(0.5)
    assert math.isnan(rag.mean_accept_length)  # one token, no round
    overall = rows["overall"]
    assert (overall.questions, overall.identical, overall.cut, overall.skipped) == (3, 2, 1, 1)
    assert overall.tokens_per_second == pytest.approx((5 + 3 + 2) / 3)
    assert overall.speedup == pytest.approx((5 + 3 + 2) / (2.5 + 6 + 4))


def test_accept_lengths_and_draft_positions(by_hand):
    assert summary.accept_length_counts(by_hand) == {1: 2, 2: 2, 3: 2, 4: 1}
    # Rounds that are not a turn's last, as (accept length, draft length): (3, 4), (1, 1), (4, 3), (1, 2).
    positions = [(row.position, row.verified, row.accepted) for row in summary.acceptance_by_position(by_hand)]
    assert positions == [(1, 4, 2), (2, 3, 2), (3, 2, 1), (4, 1, 0)]
    # Rounds that looked up say nothing about the draft model.
    looked_up = [
        dataclasses.replace(
            result, details=dataclasses.replace(result.details, draft_lengths=[0] * len(result.details.draft_lengths))
        )
        for result in by_hand
    ]
    assert summary.acceptance_by_position(looked_up) == []


def test_table_has_no_figure_where_there_is_none(by_hand):
    only_skipped = [result for result in by_hand if result.details.skipped]
    table = summary.markdown_table(summary.summarize(only_skipped, len))
    assert "nan" not in table
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")]
    assert cells[1:8] == ["rag", "0", "-", "-", "-", "-", "0/0"]


CATEGORIES = [
    *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    *("translation", "summarization", "qa", "math_reasoning", "rag"),
]


def spec_bench() -> list[Question]:
    """As many questions per category as Spec-Bench has, in its order."""
    counts = [10] * 8 + [80] * 5
    categories = [category for category, count in zip(CATEGORIES, counts, strict=True) for _ in range(count)]
    return [Question(81 + i, category, ("?",)) for i, category in enumerate(categories)]


def test_a_limit_is_spread_over_the_tasks():
    questions = spec_bench()
    chosen = spread_over_tasks(questions, 24)
    tasks = [question.task for question in chosen]
    assert {task: tasks.count(task) for task in tasks} == dict.fromkeys(summary.TASKS, 4)
    assert [question.category for question in chosen[:4]] == ["writing", "reasoning", "coding", "stem"]
    assert [question.question_id for question in chosen] == sorted({question.question_id for question in chosen})
    assert len(spread_over_tasks(questions, 8)) == 8
    assert spread_over_tasks(questions, 10_000) == questions
    few = questions[:2] + questions[-300:]  # a task that has fewer than its share
    assert len(spread_over_tasks(few, 30)) == 30


def test_questions_are_read_as_spec_bench_writes_them(tmp_path):
    path = pathlib.Path(tmp_path / "question.jsonl")
    path.write_text(
        '{"question_id": 81, "category": "stem", "turns": ["A\\u2028?", "B?"], "reference": ["x"]}\n\n'
        '{"question_id": "b", "category": "rag", "turns": ["C?"]}'
    )
    assert load_questions(path) == [Question(81, "stem", ("A\u2028?", "B?")), Question("b", "rag", ("C?",))]
    path.write_text("\n")
    with pytest.raises(InputError, match="holds no question"):
        load_questions(path)
    path.write_text('{"question_id": 81, "category": "stem", "turns": ["\\ud800"]}')
    with pytest.raises(InputError, match="line 1: turns are not valid Unicode"):
        load_questions(path)
