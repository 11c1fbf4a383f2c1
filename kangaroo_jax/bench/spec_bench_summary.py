"""Figures of a folder of Spec-Bench answers, by Spec-Bench's own definitions (its evaluation/speed.py and equal.py)
where it has them. Arithmetic only."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence

from kangaroo_jax.bench.spec_bench_answers import QuestionResult, SpecBenchAnswer
from kangaroo_jax.bench.spec_bench_questions import TASKS, task_of

OVERALL = "overall"


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """One task's figures; NaN for the mean of nothing.

    Attributes:
      task: a task's name, or "overall".
      questions: answered questions.
      skipped: questions left out because a prompt left no room in the context for an answer.
      cut: answered questions with an answer that was ended by the end of the context.
      identical: answered questions whose texts are the same in both files.
      tokens_per_second: Kangaroo's new tokens per second, the mean over questions.
      plain_tokens_per_second: the same for plain decoding.
      speed_py_plain_tokens_per_second: the same as speed.py computes it: it encodes the baseline's text again and
        counts those tokens, less one for BOS.
      mean_accept_length: over all rounds; speed.py's "mean accepted tokens".
    """

    task: str
    questions: int
    skipped: int
    cut: int
    identical: int
    tokens_per_second: float
    plain_tokens_per_second: float
    speed_py_plain_tokens_per_second: float
    mean_accept_length: float

    @property
    def speedup(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def speed_py_speedup(self) -> float:
        plain = self.speed_py_plain_tokens_per_second
        return self.tokens_per_second / plain if plain else math.nan


@dataclasses.dataclass(frozen=True)
class DraftPosition:
    """How often the k-th token of a draft was accepted.

    Attributes:
      position: k, from 1.
      verified: rounds that drafted at least k tokens; every drafted token is verified.
      accepted: those of them that accepted at least k.
    """

    position: int
    verified: int
    accepted: int

    @property
    def acceptance(self) -> float:
        return self.accepted / self.verified


def summarize(results: Sequence[QuestionResult], count_tokens: Callable[[str], int]) -> list[TaskSummary]:
    """A row per task that has questions, in Spec-Bench's order, then one over all.

    Args:
      results: from `spec_bench_answers.read`.
      count_tokens: text -> how many ids the tokenizer makes of it, special ones included.
    """
    rows = [
        _row(task, of_task, count_tokens)
        for task in TASKS
        if (of_task := [result for result in results if task_of(result.category) == task])
    ]
    return [*rows, _row(OVERALL, results, count_tokens)]


def _row(task: str, results: Sequence[QuestionResult], count_tokens: Callable[[str], int]) -> TaskSummary:
    answered = [result for result in results if result.details.skipped is None]
    ours = [result.answers["kangaroo"] for result in answered]
    plain = [result.answers["plain"] for result in answered]

    def recount(answer: SpecBenchAnswer) -> int:
        return sum(count_tokens(text) - 1 for text in answer.turns)

    return TaskSummary(
        task=task,
        questions=len(answered),
        skipped=len(results) - len(answered),
        cut=sum(any(result.details.cut) for result in answered),
        identical=sum(a.turns == b.turns for a, b in zip(ours, plain, strict=True)),
        tokens_per_second=_mean([sum(answer.new_tokens) / sum(answer.wall_time) for answer in ours]),
        plain_tokens_per_second=_mean([sum(answer.new_tokens) / sum(answer.wall_time) for answer in plain]),
        speed_py_plain_tokens_per_second=_mean([recount(answer) / sum(answer.wall_time) for answer in plain]),
        mean_accept_length=_mean([length for answer in ours for length in answer.accept_lengths]),
    )


def _mean(values: list[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def accept_length_counts(results: Sequence[QuestionResult]) -> dict[int, int]:
    """Accept length -> how many of Kangaroo's rounds had it, ascending."""
    answers = [result.answers["kangaroo"] for result in results if result.answers]
    return dict(sorted(Counter(length for answer in answers for length in answer.accept_lengths).items()))


def acceptance_by_position(results: Sequence[QuestionResult]) -> list[DraftPosition]:
    """For each position in a draft, how often it was accepted, given that it was verified.

    The last round of every turn is left out: the end of the answer may have cut it, and then its accept length does not
    say how many drafts the target agreed with. So are rounds that looked up.
    """
    verified: Counter[int] = Counter()
    accepted: Counter[int] = Counter()
    for result in results:
        if not result.answers:
            continue
        answer, start = result.answers["kangaroo"], 0
        for rounds in answer.decoding_steps:
            all_but_last = slice(start, max(start, start + rounds - 1))
            for length, drafted in zip(
                answer.accept_lengths[all_but_last], result.details.draft_lengths[all_but_last], strict=True
            ):
                verified.update(range(1, drafted + 1))
                if drafted:
                    accepted.update(range(1, length))  # the round's last token is no draft
            start += rounds
    return [DraftPosition(k, verified[k], accepted[k]) for k in sorted(verified)]


_COLUMNS: dict[str, Callable[[TaskSummary], str]] = {
    "task": lambda row: row.task,
    "questions": lambda row: str(row.questions),
    "speed-up": lambda row: _number(row.speedup),
    "mean accepted tokens": lambda row: _number(row.mean_accept_length),
    "Kangaroo tokens/s": lambda row: _number(row.tokens_per_second),
    "plain tokens/s": lambda row: _number(row.plain_tokens_per_second),
    "identical": lambda row: f"{row.identical}/{row.questions}",
    "cut": lambda row: str(row.cut),
    "skipped": lambda row: str(row.skipped),
    "speed-up by speed.py": lambda row: _number(row.speed_py_speedup),
}


def markdown_table(rows: Sequence[TaskSummary]) -> str:
    """The rows as a Markdown table with aligned columns."""
    cells = [list(_COLUMNS), *([column(row) for column in _COLUMNS.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [
        "| " + " | ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join([aligned[0], rule, *aligned[1:]])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
