"""Spec-Bench (github.com/hemingkx/Spec-Bench): answers its questions with Kangaroo and with plain decoding, timed.

    python -m kangaroo_jax.bench spec_bench --questions=question.jsonl --output_dir=out
    python -m kangaroo_jax.bench spec_bench --questions=question.jsonl --output_dir=out --model=... --adapter=...

Without --model, the demo. Greedy, or sampled with --temperature; EOS ends an answer. Writes into the output folder
`kangaroo.jsonl` and `plain.jsonl`, which Spec-Bench's own evaluation/speed.py and equal.py read, `summary.md` and
charts. The same command, run again, continues with the questions that are not done.

The chat template of the tokenizer makes the prompts. Some models come without one, Vicuna v1.3 among them: put it as
chat_template.jinja into the model's folder.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import sys

from absl import flags
from tqdm import tqdm

from kangaroo_jax import SamplingConfig, compilation_cache
from kangaroo_jax.bench import parts, spec_bench_answers
from kangaroo_jax.bench.spec_bench_ask import conversation_ids
from kangaroo_jax.bench.spec_bench_questions import Question, load_questions, spread_over_tasks
from kangaroo_jax.bench.spec_bench_run import SpecBenchRun, write_report
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.errors import InputError

_QUESTIONS = flags.DEFINE_string("questions", None, "Spec-Bench's question.jsonl. Required.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for answers, summary and charts. Required.")
_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", 1024, "Maximum tokens of an answer; less where the context ends."
)
_RUNS = shared_flags.define_runs()
_LIMIT = flags.DEFINE_integer("limit", None, "Ask only this many questions, evenly spread over the six tasks.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Shallow layers. Default: what the adapter was trained for.")
_DRAFT = shared_flags.define_draft()
_LOOKUP_TOKENS = flags.DEFINE_integer(
    "lookup_tokens",
    None,
    "Tokens that a look-up drafts; 0 looks nothing up. Default: as the adapter's decode.json has it.",
)
_DECIDE = flags.DEFINE_bool(
    "decide",
    None,
    "Each sequence decides how far to draft; or (--nodecide) gamma and eta say it. Default: as the adapter's "
    "decode.json has it.",
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature", 0.0, "Sample both methods' answers at this temperature, with seed 0; 0 is greedy."
)
_DTYPE = shared_flags.define_dtype(("float32", "bfloat16", "float16"))


def main() -> None:
    given, sampling = _draft_settings(), SamplingConfig(temperature=_TEMPERATURE.value)
    questions, chosen = _questions()
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed, and the charts need it; pip install -e '.[bench]'")
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value)
    dtype = str(target.model.dtype)
    adapter = load_adapter_of(target, _ADAPTER.value)
    draft = given.over(adapter.draft).at(1)
    draft = dataclasses.replace(draft, exit_layer=parts.exit_layer_of(target, adapter, draft))
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside the weights")
    conversation_ids(target, questions[0].turns[:1])  # a chat template that does not work is named before the work

    name = "kangaroo_jax-demo" if _MODEL.value is None else pathlib.Path(_MODEL.value).resolve().name
    run = SpecBenchRun(target, adapter, draft, dtype, name, questions, _MAX_NEW_TOKENS.value, _RUNS.value, sampling)
    settings, folder = run.settings(), pathlib.Path(_OUTPUT_DIR.value)
    done = spec_bench_answers.prepare(folder, settings)
    if not target.tokenizer.chat_template:
        print(f"{name} has no chat template; turns are joined by blank lines", file=sys.stderr)
    missing = [question for question in chosen if question.question_id not in done]
    interval = 0.5 if sys.stderr.isatty() else 30.0  # a file or a pipe gets a line now and then, not a moving bar
    with tqdm(total=len(chosen), unit="question", mininterval=interval, dynamic_ncols=True) as bar:
        bar.update(len(chosen) - len(missing))
        for result in run.answer(missing, folder):
            if result.details.skipped:
                bar.write(f"question {result.question_id} skipped: {result.details.skipped}", file=sys.stderr)
            bar.update()
    print(write_report(folder, run), end="")


def _draft_settings() -> DraftOverrides:
    """The given settings of drafting; all flags that need no file are checked here."""
    shared_flags.check_positive(_MAX_NEW_TOKENS, _RUNS, _LIMIT)
    return DraftOverrides(
        exit_layer=_EXIT_LAYER.value, lookup_tokens=_LOOKUP_TOKENS.value, decide=_DECIDE.value, **_DRAFT.given()
    )


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
    return questions, questions if _LIMIT.value is None else spread_over_tasks(questions, _LIMIT.value)
