"""A Spec-Bench run (github.com/hemingkx/Spec-Bench): answers its questions with Kangaroo and with plain decoding into a
folder that an interrupted run continues, then sums up what is in the folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from kangaroo_jax import DraftConfig, SamplingConfig
from kangaroo_jax.bench import spec_bench_answers, spec_bench_summary
from kangaroo_jax.bench.spec_bench_answers import QuestionResult
from kangaroo_jax.bench.spec_bench_ask import ask_question
from kangaroo_jax.bench.spec_bench_questions import Question
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target


@dataclasses.dataclass(frozen=True)
class SpecBenchRun:
    """What is asked, and how.

    Attributes:
      target: with a tokenizer.
      adapter: one for the target.
      draft: with its exit layer.
      dtype: type of the weights.
      model_name: how the answers name the target.
      questions: all questions of the file; answers to several files do not go into one folder.
      max_new_tokens: maximum tokens of an answer; less where the context ends.
      runs: timed runs of each method per turn.
      sampling: greedy, or how both methods sample.
    """

    target: Target
    adapter: TrainedAdapter
    draft: DraftConfig
    dtype: str
    model_name: str
    questions: Sequence[Question]
    max_new_tokens: int
    runs: int
    sampling: SamplingConfig = SamplingConfig()  # noqa: RUF009 - frozen

    def settings(self) -> dict[str, Any]:
        """What the answers in one folder must have in common, as JSON values."""
        template = self.target.tokenizer.chat_template
        sampled = {} if self.greedy else {"temperature": self.sampling.temperature}  # folders from before have none
        settings = {
            "model": self.model_name,
            "chat_template": _digest(str(template).encode()) if template else None,
            "dtype": self.dtype,
            **dataclasses.asdict(self.draft),
            **sampled,
            "max_new_tokens": self.max_new_tokens,
            "runs": self.runs,
            "questions": _digest(repr(list(self.questions)).encode()),
            "device": jax.devices()[0].device_kind,
            "model_fingerprint": self.target.fingerprint,
            "adapter_fingerprint": _digest(*(np.asarray(x).tobytes() for x in jax.tree.leaves(self.adapter.model))),
        }
        return json.loads(json.dumps(settings))  # as they are read back: lists, no tuples

    @property
    def greedy(self) -> bool:
        return self.sampling.temperature == 0

    def model_ids(self) -> dict[str, str]:
        """Spec-Bench's model_id by method."""
        sampled = "" if self.greedy else f"-temperature{self.sampling.temperature}-seed{self.sampling.seed}"
        name, draft = f"{self.model_name}-{self.dtype}{sampled}", self.draft
        tree = "" if draft.tree is None else f"-tree{draft.tree.topk}x{draft.tree.budget}"
        if draft.lookup is not None:
            tree = f"-lookup{draft.lookup.max_tokens}n{draft.lookup.min_ngram}-{draft.lookup.max_ngram}"
        how = f"eta{draft.threshold}" if draft.decide is None else "decides"
        return {
            "kangaroo": f"{name}-kangaroo-gamma{draft.max_draft_len}-{how}{tree}-exit{draft.exit_layer}",
            "plain": f"{name}-plain",
        }

    def answer(self, questions: Sequence[Question], folder: pathlib.Path) -> Iterator[QuestionResult]:
        """Answers questions one by one; each is in the folder when it is yielded."""
        for question in questions:
            result = ask_question(
                self.target, self.adapter, question, self.draft, self.max_new_tokens, self.runs, self.sampling
            )
            spec_bench_answers.append(folder, result, self.model_ids())
            yield result


def write_report(folder: pathlib.Path, run: SpecBenchRun) -> str:
    """Writes the summary of all answers in the folder as summary.md, draws the charts, and returns the summary.

    Args:
      folder: with answers.
      run: that made them. Its target's tokenizer counts tokens as speed.py does.
    """
    from kangaroo_jax.bench import spec_bench_charts as charts  # here: only this needs matplotlib

    results = spec_bench_answers.read(folder)
    tokenizer = run.target.tokenizer
    rows = spec_bench_summary.summarize(results, lambda text: len(tokenizer(text, verbose=False).input_ids))
    table = spec_bench_summary.markdown_table(rows)
    text = _describe(run) + "\n\n" + table + "\n\n" + _notes(results, rows[-1], run)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    if rows[-1].questions:
        charts.save_tasks(rows, folder / "tasks.png")
    # Answers of one token have no rounds.
    if counts := spec_bench_summary.accept_length_counts(results):
        charts.save_accept_lengths(counts, folder / "accept_lengths.png")
    if positions := spec_bench_summary.acceptance_by_position(results):
        charts.save_acceptance(positions, folder / "acceptance.png")
    return text


def _describe(run: SpecBenchRun) -> str:
    how = "greedy" if run.greedy else f"temperature {run.sampling.temperature}, seed {run.sampling.seed}"
    return (
        f"Spec-Bench, {run.model_name}, {run.dtype} on {jax.devices()[0].device_kind}, {run.draft}, exit layer "
        f"{run.draft.exit_layer}, at most {run.max_new_tokens} new tokens, {how}, medians of {run.runs} interleaved "
        f"runs, compilation not counted."
    )


def _notes(results: list[QuestionResult], overall: spec_bench_summary.TaskSummary, run: SpecBenchRun) -> str:
    """What the table's columns mean, and what was not answered as Spec-Bench asks."""
    compiling = sum(result.details.compile_seconds for result in results)
    notes = [
        "Speeds are means over questions of new tokens per second, prefill included; the speed-up is their ratio. "
        "Spec-Bench's speed.py counts the baseline's tokens by encoding its text again, less one per turn; the last "
        "column is what it prints.",
        f"Cut: {overall.cut} questions with an answer that ended where the context does, before EOS and before "
        f"{run.max_new_tokens} tokens. The limit was the same for both methods.",
        f"Skipped: {overall.skipped} questions with a prompt too long for the context, in no other column"
        + "".join(f"\n  - question {r.question_id}: {r.details.skipped}" for r in results if r.details.skipped),
        f"Compilation took {compiling:.1f} s.",
    ]
    if not run.greedy:
        notes.append(
            "Sampled answers of the two methods have the same distribution and are other answers: few are identical."
        )
    if not run.target.tokenizer.chat_template:
        notes.append("The tokenizer has no chat template: turns were joined by blank lines.")
    return "".join(f"- {note}\n" for note in notes)


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
