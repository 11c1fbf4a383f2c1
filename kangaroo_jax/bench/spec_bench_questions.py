"""Spec-Bench's questions: reads and checks them, and groups them into its six tasks."""

from __future__ import annotations

import dataclasses
import json
import pathlib

from kangaroo_jax import json_text
from kangaroo_jax.errors import InputError

# Task -> categories, as in Spec-Bench's paper: the eight of MT-bench are one task.
TASKS = {
    "multi-turn conversation": (
        *("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"),
    ),
    "translation": ("translation",),
    "summarization": ("summarization",),
    "qa": ("qa",),
    "math_reasoning": ("math_reasoning",),
    "rag": ("rag",),
}
_TASK_OF = {category: task for task, categories in TASKS.items() for category in categories}
_FIELDS = ("question_id", "category", "turns")


@dataclasses.dataclass(frozen=True)
class Question:
    """One conversation.

    Attributes:
      question_id: unique in its file.
      category: one of those in `TASKS`.
      turns: what the user says, one string per turn.
    """

    question_id: int | str
    category: str
    turns: tuple[str, ...]

    @property
    def task(self) -> str:
        return _TASK_OF[self.category]


def task_of(category: str) -> str:
    """The task a category belongs to; raises KeyError for an unknown category."""
    return _TASK_OF[category]


def load_questions(path: str | pathlib.Path) -> list[Question]:
    """The questions of a file in Spec-Bench's format: JSON lines with question_id, category and turns.

    Raises:
      InputError: naming the file and line, for a file that cannot be read, a line that is not such an object, an
        unknown category, or a question_id that occurs twice.
    """
    try:
        text = pathlib.Path(path).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); download the file again") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give Spec-Bench's question.jsonl") from None
    questions: dict[int | str, Question] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        question = _question(line, f"{path} line {number}")
        if question.question_id in questions:
            raise InputError(f"{path} line {number}: question_id {question.question_id!r} comes twice; remove one")
        questions[question.question_id] = question
    if not questions:
        raise InputError(f"{path}: holds no question; give Spec-Bench's question.jsonl")
    return list(questions.values())


def _question(line: str, where: str) -> Question:
    try:
        raw = json_text.parse(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); every line must be one question") from None
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {line[:40]!r}")
    missing = [field for field in _FIELDS if field not in raw]
    if missing:
        raise InputError(f"{where}: has no {missing[0]!r}; a question has {', '.join(_FIELDS)}")
    question_id, category, turns = (raw[field] for field in _FIELDS)
    if isinstance(question_id, bool) or not isinstance(question_id, int | str):
        raise InputError(f"{where}: question_id must be a number or a string, found {question_id!r}")
    if not isinstance(category, str) or category not in _TASK_OF:
        raise InputError(f"{where}: unknown category {category!r}; Spec-Bench has {', '.join(_TASK_OF)}")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise InputError(f"{where}: turns must be a list of strings that are not empty, found {str(turns)[:40]}")
    try:
        "".join(turns).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: turns are not valid Unicode text; half a surrogate pair is in them") from None
    return Question(question_id, category, tuple(turns))


def spread_over_tasks(questions: list[Question], limit: int) -> list[Question]:
    """At most `limit` questions in the order of the file: the same number from each task as far as its questions
    reach, evenly spaced within the task."""
    tasks = [group for task in TASKS if (group := [question for question in questions if question.task == task])]
    counts = [0] * len(tasks)
    for _ in range(min(limit, len(questions))):
        open_tasks = [i for i, group in enumerate(tasks) if counts[i] < len(group)]
        counts[min(open_tasks, key=counts.__getitem__)] += 1
    chosen = {
        group[i * len(group) // count].question_id
        for group, count in zip(tasks, counts, strict=True)
        for i in range(count)
    }
    return [question for question in questions if question.question_id in chosen]
