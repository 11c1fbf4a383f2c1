"""Generates text with Kangaroo.

python decode.py                                   the demo on a built-in prompt
python decode.py --compare                         and plain decoding beside it
python decode.py --temperature=0.8 --top_p=0.95    sampled, not greedy
python decode.py --model=FOLDER_OR_HUB_ID --adapter=FOLDER --prompt="..."
python decode.py --prompt_file=prompt.txt          or: some-command | python decode.py
python decode.py --input=prompts.jsonl --output=answers.jsonl --batch_size=8    many prompts; run again, it goes on
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import select
import stat
import statistics
import sys
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from jax.experimental import multihost_utils

from kangaroo_jax import (
    DraftConfig,
    Generation,
    InputError,
    SamplingConfig,
    TreeConfig,
    compilation_cache,
    demo,
    distributed,
    generate,
    generate_plain,
    load_adapter,
    load_target,
    preflight,
    profiling,
)
from kangaroo_jax.batch import answers
from kangaroo_jax.batch.answer import answer_prompts
from kangaroo_jax.batch.prompts import read_prompts
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.huggingface import Target
from kangaroo_jax.cli import command_line
from kangaroo_jax.config import DraftOverrides
from kangaroo_jax.model import sharding

_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id. The demo if absent.")
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "Adapter: a folder that train.py wrote, or the authors' PyTorch folder."
)
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File that holds the prompt (UTF-8); - is standard input.")
_INPUT = flags.DEFINE_string(
    "input", None, 'File of prompts: {"id": ..., "prompt": "..."} per line, "max_new_tokens" and "seed" where wanted.'
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the answers to --input; what is there already is not redone.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts of --input decoded at a time.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to generate.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Shallow layers. What the adapter was trained for if absent.")
_MAX_DRAFT_LEN = flags.DEFINE_integer(
    "max_draft_len", None, "Most tokens drafted in a round. What the adapter's decode.json says if absent, else 6."
)
_THRESHOLD = flags.DEFINE_float("threshold", None, "Confidence below which drafting stops. As above, else 0.6.")
_TREE = flags.DEFINE_bool(
    "tree",
    None,
    "Draft a tree of tokens, or (--notree) one sequence. What decode.json says if absent, else a sequence.",
)
_TREE_TOPK = flags.DEFINE_integer(
    "tree_topk", None, f"Tokens of a level that a tree goes on from. As above, else {TreeConfig().topk}."
)
_TREE_BUDGET = flags.DEFINE_integer(
    "tree_budget", None, f"Most tokens of a tree that are verified. As above, else {TreeConfig().budget}."
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sample at this temperature; 0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the most probable tokens that have this probability together.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many most probable tokens; 0 is all.")
_SEED = flags.DEFINE_integer("seed", 0, "Of sampling: the same seed and prompt give the same text.")
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends the text; may be given several times.")
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "Of the weights. float32 for the demo and on CPU, else bfloat16."
)
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that hold the target together, each layer split.")
_COMPARE = flags.DEFINE_bool("compare", False, "Decode plainly too: three interleaved runs each, medians.")
_JSON = flags.DEFINE_bool("json", False, "End the output with one line: a JSON object of the results.")

_PIPE_PATIENCE = 5.0  # seconds
_PREFLIGHT_PROMPT = 1024  # tokens
_PREFLIGHT_EXIT_LAYER = 2  # the paper's for 7B; memory hardly depends on it


def read_prompt() -> str:
    """The prompt from --prompt, --prompt_file or standard input; the built-in one where none is given."""
    if _PROMPT.value is not None and _PROMPT_FILE.value is not None:
        raise InputError("--prompt and --prompt_file were both given; give one")
    if _PROMPT.value is not None:
        return _PROMPT.value
    if _PROMPT_FILE.value is not None:
        return _read_text(_PROMPT_FILE.value)
    if (piped := _piped_text()) is not None:
        return piped
    if _MODEL.value is None:
        return demo.PROMPT
    raise InputError("no prompt; give --prompt, --prompt_file or text on standard input")


def _piped_text() -> str | None:
    """What a file or a pipe brings on standard input; an empty pipe, which many launchers leave open, brings None."""
    if sys.stdin is None or sys.stdin.closed:
        return None
    mode = os.fstat(sys.stdin.fileno()).st_mode
    # A pipe that nobody writes to must not make `python decode.py` wait for ever.
    if stat.S_ISFIFO(mode) and not select.select([sys.stdin], [], [], _PIPE_PATIENCE)[0]:
        print(f"decode.py: nothing on standard input for {_PIPE_PATIENCE:.0f} s, not waiting for it", file=sys.stderr)
        return None
    if stat.S_ISREG(mode):
        return _read_text("-")
    return (_read_text("-") or None) if stat.S_ISFIFO(mode) else None


def _read_text(path: str) -> str:
    name = "standard input" if path == "-" else path
    try:
        if path == "-":
            return sys.stdin.buffer.read().decode()
        with open(path, "rb") as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 (byte {error.start}); save the prompt as UTF-8") from None
    except OSError as error:
        raise InputError(f"{name}: {error.strerror}") from None


def measure(runs: list[Callable[[], Generation]], repeats: int) -> list[tuple[Generation, float]]:
    """Runs each once, then all interleaved until each has run `repeats` times; the first result of each, and the
    median of its seconds (prefill and decoding, without compilation)."""
    results = [[run()] for run in runs]
    for _ in range(repeats - 1):
        for run, done in zip(runs, results, strict=True):
            done.append(run())
    return [(done[0], statistics.median(r.seconds.prefill + r.seconds.decode for r in done)) for done in results]


def summary(result: Generation, seconds: float) -> dict[str, Any]:
    """What the table and --json show of one way of decoding."""
    new_tokens = len(result.tokens[0])
    return {
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(new_tokens / seconds, 2),
        "mean_accept_length": round(result.mean_accept_length, 3),
        "rounds": len(result.accept_lengths[0]),
        "draft_steps": sum(result.draft_lengths[0]),
    }


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    rows = list(next(iter(columns.values())))
    print(f"{'':20}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        print(f"{row.replace('_', ' '):20}" + "".join(f"{column[row]:>12}" for column in columns.values()))


def check_flags_of_input() -> None:
    """Raises `InputError` for flags that do not go together with --input, or not without it."""
    if _INPUT.value is None:
        raise InputError("--output and --batch_size belong to --input, which is missing; give a file of prompts")
    for flag in (_PROMPT, _PROMPT_FILE, _COMPARE, command_line.PROFILE):
        if flag.value not in (None, False):
            raise InputError(f"--{flag.name} and --input do not go together; give one")
    if _OUTPUT.value is None:
        raise InputError("--output is missing; name a file for the answers to --input")
    if _BATCH_SIZE.value < 1:
        raise InputError(f"--batch_size must be at least 1, found {_BATCH_SIZE.value}")


def fits() -> bool:
    """--preflight: whether what the other flags ask for fits the machine it names."""
    given, _ = settings()
    machine = preflight.find_machine(preflight.PREFLIGHT.value)
    return preflight.decoding(
        _MODEL.value or str(demo.MODEL),
        _DTYPE.value or ("float32" if _MODEL.value is None else "bfloat16"),
        given.over(DraftConfig(_PREFLIGHT_EXIT_LAYER)),
        _PREFLIGHT_PROMPT,
        _MAX_NEW_TOKENS.value,
        _MODEL_PARALLEL.value,
        machine,
    )


def settings() -> tuple[DraftOverrides, SamplingConfig]:
    """What the flags say of drafting, and of sampling; flags out of range are named before anything is loaded."""
    draft = DraftOverrides(
        _EXIT_LAYER.value, _MAX_DRAFT_LEN.value, _THRESHOLD.value, _TREE.value, _TREE_TOPK.value, _TREE_BUDGET.value
    )
    sampling = SamplingConfig(_TEMPERATURE.value, _TOP_P.value, _TOP_K.value, _SEED.value)
    if sampling.temperature == 0 and (sampling.top_p, sampling.top_k) != (1.0, 0):
        raise InputError("--top_p and --top_k change nothing without a --temperature above 0; give one")
    return draft, sampling


def load(given: DraftOverrides) -> tuple[Target, TrainedAdapter, DraftConfig]:
    """Target, adapter, and how to draft: the flags, then the adapter's decode.json, then the paper."""
    model, adapter_path = _MODEL.value, _ADAPTER.value
    if model is not None and adapter_path is None:
        raise InputError(
            f"--adapter is missing; train one for this model with "
            f"`python train.py --config=configs/llama7b.py --config.target={model}`, then give its output folder"
        )
    dtype = _DTYPE.value or ("float32" if model is None or jax.default_backend() == "cpu" else "bfloat16")
    compilation_cache.enable()
    mesh = sharding.decoding_mesh(_MODEL_PARALLEL.value, jax.local_devices()) if _MODEL_PARALLEL.value != 1 else None
    target = load_target(model or str(demo.MODEL), dtype, mesh)
    adapter = load_adapter(adapter_path or str(demo.ADAPTER), target)
    return target, adapter, given.over(adapter.draft)


def answer_file() -> None:
    """Answers --input into --output; exit code 1 if there was something that could not be answered."""
    check_flags_of_input()
    given, sampling = settings()
    prompts, bad = read_prompts(_INPUT.value)
    output = answers.check_place(_OUTPUT.value, _INPUT.value)
    first = jax.process_index() == 0
    for message in bad if first else ():
        print(f"decode.py: {message}", file=sys.stderr)
    if prompts:
        target, adapter, draft = load(given)
        done = answer_prompts(
            target,
            adapter,
            prompts,
            output,
            source=_INPUT.value,
            batch_size=_BATCH_SIZE.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            draft=draft,
            sampling=sampling,
            stop=_STOP.value,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            barrier=multihost_utils.sync_global_devices if jax.process_count() > 1 else lambda _: None,
        )
        mine = "" if jax.process_count() == 1 else f"process {jax.process_index()}: "
        print(
            f"{mine}{done.prompts} prompts answered, {done.before} were before, {done.errors + len(bad)} could not be; "
            f"{done.new_tokens} tokens in {done.seconds:.1f} s, {done.new_tokens / done.seconds:.1f} tokens/s, "
            f"mean accept length {done.mean_accept_length:.2f}; compilation, not counted: {done.compile_seconds:.1f} s"
        )
        if _JSON.value:
            print(json.dumps(dataclasses.asdict(done) | {"bad_lines": len(bad)}))
    if bad or (prompts and done.errors):
        sys.exit(1)


def main() -> None:
    if preflight.PREFLIGHT.value is not None:
        sys.exit(0 if fits() else 1)
    distributed.initialize("decode.py")
    if _INPUT.value is not None or _OUTPUT.present or _BATCH_SIZE.present:
        answer_file()
        return
    if jax.process_count() > 1:
        raise InputError("several processes need --input, whose prompts they share; give it, or run one process")
    given, sampling = settings()
    greedy = sampling.temperature == 0
    profiling.check(command_line.PROFILE.value)
    prompt = read_prompt()
    target, adapter, draft = load(given)

    # The prompt goes before the first piece of text, when all input has been found good.
    pieces = itertools.chain([prompt], itertools.repeat(""))
    common = {"max_new_tokens": _MAX_NEW_TOKENS.value, "sampling": sampling, "stop": _STOP.value}
    shown = generate(
        target,
        adapter,
        [prompt],
        draft=draft,
        on_text=lambda _, text: print(next(pieces) + text, end="", flush=True),
        **common,
    )
    print(next(pieces) + "\n")
    ours = functools.partial(generate, target, adapter, [prompt], draft=draft, **common)
    if command_line.PROFILE.value is not None:  # a run of its own: the one above may have compiled
        with profiling.trace(command_line.PROFILE.value):
            ours()
    if _COMPARE.value:
        reference = functools.partial(generate_plain, target, [prompt], **common)
        (kangaroo, kangaroo_seconds), (plain, plain_seconds) = measure([ours, reference], repeats=3)
        result = summary(kangaroo, kangaroo_seconds)
        baseline = summary(plain, plain_seconds)
        # Samples of the two ways are different texts, each from the target's distribution: there is nothing to find
        # identical, and their lengths may differ, so speeds are compared, not times.
        identical = kangaroo.tokens == plain.tokens if greedy else None
        rates = [len(way.tokens[0]) / time for way, time in ((kangaroo, kangaroo_seconds), (plain, plain_seconds))]
        speedup = round(rates[0] / rates[1], 3)
        print_table({"Kangaroo": result, "plain": baseline})
        print(f"{'speed-up':20}{speedup:>12}")
        if greedy:
            print(f"{'identical':20}{'yes' if identical else 'no':>12}")
        else:
            print(
                "one sample each, drawn with different random numbers: the texts are not expected to be the same and "
                "were not\ncompared; that both come from one distribution is what tests/decode/test_sampling.py checks"
            )
        if identical is False:
            print(_first_difference(kangaroo.tokens[0], plain.tokens[0], str(target.model.dtype)))
        result |= {
            "plain_tokens_per_second": baseline["tokens_per_second"],
            "speedup": speedup,
            "identical": identical,
        }
        compiling = shown.seconds.compile + plain.seconds.compile
    else:
        result = summary(shown, shown.seconds.prefill + shown.seconds.decode)
        print_table({"Kangaroo": result})
        compiling = shown.seconds.compile
    print(f"compilation, not counted above: {compiling:.1f} s (kept on disk for the next run)")
    if _JSON.value:
        text = shown.texts[0] if shown.texts else None
        how = {} if greedy else {"sampling": dataclasses.asdict(sampling)}
        print(json.dumps(result | how | {"text": text}))


def _first_difference(ours: list[int], plain: list[int], dtype: str) -> str:
    pairs = enumerate(zip(ours, plain, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(plain)))
    cause = "this is a bug; please report it" if dtype == "float32" else f"{dtype} rounds differently by matmul width"
    return f"first difference at token {place + 1} of {len(plain)}: {cause}"


if __name__ == "__main__":
    command_line.run("decode.py", main)
