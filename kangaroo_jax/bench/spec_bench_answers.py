"""A folder of Spec-Bench answers: `kangaroo.jsonl` and `plain.jsonl` in exactly Spec-Bench's format, and beside them
`details.jsonl` (what that format has no field for) and `settings.json` (the settings they were made with).

A question is done when its line in `details.jsonl`, the last of the three to be written, is complete.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import time
import uuid
from typing import Any

from kangaroo_jax import json_text, resumable
from kangaroo_jax.bench.spec_bench_questions import task_of
from kangaroo_jax.errors import InputError

METHODS = ("kangaroo", "plain")
_DETAILS = "details.jsonl"
_SETTINGS = "settings.json"
_FILES = (*(f"{method}.jsonl" for method in METHODS), _DETAILS)
_FIX = "remove the line, or give another --output_dir"


@dataclasses.dataclass(frozen=True)
class SpecBenchAnswer:
    """One method's answer to one question, with Spec-Bench's field names.

    Attributes:
      turns: texts of the answer to each turn.
      decoding_steps: rounds of each turn. The first token of a turn, which prefill gives, is not a round.
      new_tokens: tokens of each turn's answer, EOS included.
      wall_time: seconds of each turn, prefill and decoding.
      accept_lengths: tokens committed by each round, for all turns in one list.
    """

    turns: list[str]
    decoding_steps: list[int]
    new_tokens: list[int]
    wall_time: list[float]
    accept_lengths: list[int]


@dataclasses.dataclass(frozen=True)
class QuestionDetails:
    """What Spec-Bench's format has no field for, for one question.

    Attributes:
      skipped: why the question was not answered, and then the lists below are empty; None if it was answered.
      prompt_tokens: tokens of each turn's prompt, by method.
      max_new_tokens: the limit of each turn's answer: the one asked for, or less where the context ends.
      cut: for each turn, whether an answer was ended by the end of the context, not by EOS or the limit asked for.
      draft_lengths: draft steps of each of Kangaroo's rounds, for all turns in one list; 0 where one looked up.
      seconds: of each timed run of each turn, by method.
      compile_seconds: of all runs together; in no other time.
    """

    skipped: str | None
    prompt_tokens: dict[str, list[int]]
    max_new_tokens: list[int]
    cut: list[bool]
    draft_lengths: list[int]
    seconds: dict[str, list[list[float]]]
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class QuestionResult:
    """One question's answers by method, empty if it was skipped, and the details."""

    question_id: int | str
    category: str
    answers: dict[str, SpecBenchAnswer]
    details: QuestionDetails


def prepare(folder: str | pathlib.Path, settings: dict[str, Any]) -> set[int | str]:
    """Makes the folder ready for more answers: creates it, or removes what a killed run left incomplete.

    Args:
      folder: created if it is missing.
      settings: what the answers are made with, JSON values.

    Returns:
      The ids of the questions that are done.

    Raises:
      InputError: for answers made with other settings, files that are not such answers, or a folder that cannot be
        written to. Then nothing is changed.
    """
    folder = pathlib.Path(folder)
    try:
        found = [name for name in _FILES if (folder / name).exists()]
        if (folder / _SETTINGS).exists():
            found_settings = (folder / _SETTINGS).read_bytes()
            resumable.check_settings(found_settings, settings, folder / _SETTINGS, folder, "--output_dir")
        elif found:
            raise InputError(f"{folder / found[0]}: exists already, without a {_SETTINGS}; give another --output_dir")
        lines = {name: _answer_lines(folder / name) for name in _FILES}
        answered = set.intersection(*(set(lines[f"{method}.jsonl"]) for method in METHODS))
        done = {key for key, line in lines[_DETAILS].items() if json_text.parse(line)["skipped"] or key in answered}
        folder.mkdir(parents=True, exist_ok=True)
        resumable.replace(folder / _SETTINGS, (json.dumps(settings, indent=1) + "\n").encode())
        for name in found:
            resumable.replace(folder / name, b"".join(line for key, line in lines[name].items() if key in done))
    except OSError as error:
        raise InputError(f"{error.filename or folder}: {error.strerror}; give another --output_dir") from None
    return done


def append(folder: str | pathlib.Path, result: QuestionResult, model_ids: dict[str, str]) -> None:
    """Adds the lines of one question; `model_ids` gives Spec-Bench's model_id by method."""
    folder = pathlib.Path(folder)
    key = {"question_id": result.question_id, "category": result.category}
    for method, answer in result.answers.items():
        line = key | {
            "answer_id": uuid.uuid4().hex,
            "model_id": model_ids[method],
            "choices": [{"index": 0, **dataclasses.asdict(answer)}],
            "tstamp": time.time(),
        }
        _append(folder / f"{method}.jsonl", line)
    _append(folder / _DETAILS, key | dataclasses.asdict(result.details))


def read(folder: str | pathlib.Path) -> list[QuestionResult]:
    """All results in a folder that was prepared, in the order they were written.

    Raises:
      InputError: naming file and question, for a line without the fields above.
    """
    folder = pathlib.Path(folder)
    lines = {name: _answer_lines(folder / name) for name in _FILES}
    return [_result(folder, {name: lines[name].get(key) for name in _FILES}) for key in lines[_DETAILS]]


def _result(folder: pathlib.Path, lines: dict[str, bytes | None]) -> QuestionResult:
    details = json_text.parse(lines[_DETAILS])
    question_id, category = details.pop("question_id"), details.pop("category")
    name = _DETAILS
    try:
        task_of(category)
        details = QuestionDetails(**details)
        answers = {}
        for method in METHODS if details.skipped is None else ():
            name = f"{method}.jsonl"
            choice = json_text.parse(lines[name])["choices"][0]
            answers[method] = SpecBenchAnswer(
                **{field.name: choice[field.name] for field in dataclasses.fields(SpecBenchAnswer)}
            )
            sum(answers[method].wall_time) + sum(answers[method].accept_lengths)
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{folder / name}: question {question_id!r} is not as this command writes it ({error}); {_FIX}"
        ) from None
    return QuestionResult(question_id, category, answers, details)


def _answer_lines(path: pathlib.Path) -> dict[int | str, bytes]:
    """question_id -> line."""
    found: dict[int | str, bytes] = {}
    for number, line in enumerate(resumable.whole_lines(path), start=1):
        try:
            raw = json_text.parse(line)
            key = raw["question_id"]
            if path.name == _DETAILS:
                _ = raw["skipped"], raw["category"]
            new = key not in found
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} line {number}: not an answer as this command writes it; {_FIX}") from None
        if not new:
            raise InputError(f"{path} line {number}: question {key!r} is answered twice; {_FIX}")
        found[key] = line
    return found


def _append(path: pathlib.Path, line: dict[str, Any]) -> None:
    with resumable.LineWriter(path) as writer:
        writer.write(line)
