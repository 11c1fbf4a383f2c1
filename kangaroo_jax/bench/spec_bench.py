"""Spec-Bench (github.com/hemingkx/Spec-Bench): its questions, answered with Kangaroo and plainly, timed.

    python -m kangaroo_jax.bench spec_bench --questions=question.jsonl --output_dir=out
    python -m kangaroo_jax.bench spec_bench --questions=question.jsonl --output_dir=out --model=... --adapter=...

Without --model, the demo. Greedy; EOS ends an answer. Writes into the output folder `kangaroo.jsonl` and `plain.jsonl`,
which Spec-Bench's own evaluation/speed.py and equal.py read, `summary.md` and charts. The same command, run again, goes
on with the questions that are not done.

A tokenizer with a chat template gives the prompts its form. Some models come without theirs, Vicuna v1.3 among them:
put it as chat_template.jinja into the model's folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from kangaroo_jax import DraftConfig, TreeConfig, compilation_cache, demo, load_adapter, load_target
from kangaroo_jax.bench import answers, summary
from kangaroo_jax.bench.answers import Result
from kangaroo_jax.bench.ask import ask, conversation_ids
from kangaroo_jax.bench.questions import Question, load_questions, spread
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.decode.generate import resolve_exit_layer
from kangaroo_jax.errors import InputError

_QUESTIONS = flags.DEFINE_string("questions", None, "Spec-Bench's question.jsonl.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for answers, summary and charts.")
_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id. The demo if absent.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter: a folder that train.py wrote, or the authors' PyTorch one.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 1024, "Most tokens of an answer; less where the context ends.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs of each method per question, interleaved; the median counts.")
_LIMIT = flags.DEFINE_integer("limit", None, "Ask only this many questions, evenly spread over the six tasks.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Shallow layers. What the adapter was trained for if absent.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", None, "gamma; what the adapter's decode.json says if absent.")
_THRESHOLD = flags.DEFINE_float("threshold", None, "eta; as above.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of the weights. float32 for the demo and on CPU, else bfloat16."
)


def main() -> None:
    given = _draft_flags()
    questions, chosen = _questions()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed, and the charts need it; pip install -e '.[bench]'")
    compilation_cache.enable()
    model = _MODEL.value
    dtype = _DTYPE.value or ("float32" if model is None or jax.default_backend() == "cpu" else "bfloat16")
    target = load_target(model or str(demo.MODEL), dtype)
    adapter = load_adapter(_ADAPTER.value or str(demo.ADAPTER), target)
    draft = dataclasses.replace(adapter.draft, **given)
    draft = dataclasses.replace(draft, exit_layer=resolve_exit_layer(target, adapter, draft))
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside the weights")
    conversation_ids(target, questions[0].turns[:1])  # a chat template that does not work shows here

    settings = _settings(target, adapter, draft, dtype, questions)
    done = answers.prepare(_OUTPUT_DIR.value, settings)
    if not target.tokenizer.chat_template:
        print(f"{settings['model']} has no chat template; turns are joined by blank lines", file=sys.stderr)
    name = f"{settings['model']}-{dtype}"
    tree = "" if draft.tree is None else f"-tree{draft.tree.topk}x{draft.tree.budget}"
    model_ids = {
        "kangaroo": f"{name}-kangaroo-gamma{draft.max_draft_len}-eta{draft.threshold}{tree}-exit{draft.exit_layer}",
        "plain": f"{name}-plain",
    }
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a file or a pipe gets a line now and then, not a moving bar
    with tqdm(total=len(chosen), unit="question", mininterval=interval, dynamic_ncols=True) as bar:
        bar.update(sum(question.question_id in done for question in chosen))
        for question in chosen:
            if question.question_id in done:
                continue
            result = ask(target, adapter, question, draft, _MAX_NEW_TOKENS.value, _RUNS.value)
            answers.append(_OUTPUT_DIR.value, result, model_ids)
            if result.details.skipped:
                bar.write(f"question {question.question_id} skipped: {result.details.skipped}", file=sys.stderr)
            bar.update()
    _report(pathlib.Path(_OUTPUT_DIR.value), target, settings)


def _draft_flags() -> dict[str, Any]:
    """What the flags say about drafts, after a look at the others that need no file."""
    for flag in (_MAX_NEW_TOKENS, _RUNS, _LIMIT):
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name} must be at least 1, found {flag.value}")
    if _MODEL.value is not None and _ADAPTER.value is None:
        raise InputError("--adapter is missing; give the folder of one that was trained for this model (see train.py)")
    given = {"exit_layer": _EXIT_LAYER.value, "max_draft_len": _MAX_DRAFT_LEN.value, "threshold": _THRESHOLD.value}
    given = {name: value for name, value in given.items() if value is not None}
    DraftConfig(**given)  # a value out of range is named before anything is loaded
    return given


def _questions() -> tuple[list[Question], list[Question]]:
    """All questions of the file, and those to ask."""
    if _OUTPUT_DIR.value is None:
        raise InputError("--output_dir is missing; give a folder for the answers")
    if _QUESTIONS.value is None:
        raise InputError(
            "--questions is missing; give Spec-Bench's data/spec_bench/question.jsonl "
            "(from github.com/hemingkx/Spec-Bench)"
        )
    questions = load_questions(_QUESTIONS.value)
    return questions, questions if _LIMIT.value is None else spread(questions, _LIMIT.value)


def _settings(
    target: Target, adapter: TrainedAdapter, draft: DraftConfig, dtype: str, questions: list[Question]
) -> dict[str, Any]:
    """What answers must share to be in one folder, as JSON values."""
    template = target.tokenizer.chat_template
    return {
        "model": "kangaroo_jax-demo" if _MODEL.value is None else pathlib.Path(_MODEL.value).resolve().name,
        "chat_template": _digest(str(template).encode()) if template else None,
        "dtype": dtype,
        **dataclasses.asdict(draft),
        "max_new_tokens": _MAX_NEW_TOKENS.value,
        "runs": _RUNS.value,
        "questions": _digest(repr(questions).encode()),
        "device": jax.devices()[0].device_kind,
        "model_fingerprint": target.fingerprint,
        "adapter_fingerprint": _digest(*(np.asarray(x).tobytes() for x in jax.tree.leaves(adapter.model))),
    }


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


def _report(folder: pathlib.Path, target: Target, settings: dict[str, Any]) -> None:
    """Prints and writes the summary of all answers in the folder, and draws the charts."""
    from kangaroo_jax.bench import plots  # here, so that all else works without matplotlib

    results = answers.read(folder)
    rows = summary.summarize(results, lambda text: len(target.tokenizer(text, verbose=False).input_ids))
    text = _describe(settings) + "\n\n" + summary.markdown_table(rows) + "\n\n" + _notes(results, rows[-1], settings)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text, end="")
    if rows[-1].questions:
        plots.save_speedups(rows, folder / "speedup.png")
    # One-token answers have no rounds.
    if counts := summary.accept_length_counts(results):
        plots.save_accept_lengths(counts, folder / "accept_lengths.png")
    if positions := summary.acceptance_by_position(results):
        plots.save_acceptance(positions, folder / "acceptance.png")


def _describe(settings: dict[str, Any]) -> str:
    tree = settings["tree"] and TreeConfig(**settings["tree"])
    draft = DraftConfig(None, settings["max_draft_len"], settings["threshold"], tree)
    return (
        f"Spec-Bench, {settings['model']}, {settings['dtype']} on {settings['device']}, {draft}, exit layer "
        f"{settings['exit_layer']}, at most {settings['max_new_tokens']} new tokens, greedy, medians of "
        f"{settings['runs']} interleaved runs, compilation not counted."
    )


def _notes(results: list[Result], overall: summary.TaskSummary, settings: dict[str, Any]) -> str:
    """What the table's columns mean, and what was not answered as Spec-Bench asks."""
    compiling = sum(result.details.compile_seconds for result in results)
    notes = [
        "Speeds are means over questions of new tokens per second, prefill included; the speed-up is their ratio. "
        "Spec-Bench's speed.py counts the baseline's tokens by encoding its text again, less one per turn; the last "
        "column is what it prints.",
        f"Cut: {overall.cut} questions with an answer that ended where the context does, before EOS and before "
        f"{settings['max_new_tokens']} tokens. Both methods were allowed the same.",
        f"Skipped: {overall.skipped} questions with a prompt too long for the context, in no other column"
        + "".join(f"\n  - question {r.question_id}: {r.details.skipped}" for r in results if r.details.skipped),
        f"Compilation took {compiling:.1f} s.",
    ]
    if settings["chat_template"] is None:
        notes.append("The tokenizer has no chat template: turns were joined by blank lines.")
    return "".join(f"- {note}\n" for note in notes)
