"""Generates text with Kangaroo.

decode.py                                   the demo on a built-in prompt
decode.py --compare                         and plain decoding beside it
decode.py --plain                           plain decoding alone, without an adapter
decode.py --temperature=0.8 --top_p=0.95    sampled, not greedy
decode.py --model=FOLDER_OR_HUB_ID --adapter=FOLDER --prompt="..."
decode.py --prompt_file=prompt.txt          or: some-command | decode.py
decode.py --input=prompts.jsonl --output=answers.jsonl --batch_size=8    many prompts; run again, it goes on
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from typing import TYPE_CHECKING

from absl import flags

from kangaroo_jax import demo
from kangaroo_jax.cli import command_line, preflight_flag, process_flags
from kangaroo_jax.cli.compare import compare, print_table, summary
from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.cli.prompt import read_prompt
from kangaroo_jax.config import DraftConfig, SamplingConfig, TreeConfig
from kangaroo_jax.errors import InputError

if TYPE_CHECKING:
    from kangaroo_jax.checkpoint.adapter import TrainedAdapter
    from kangaroo_jax.checkpoint.target import Target

_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id. Default: the demo.")
_ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "Adapter: a folder that train.py wrote, or the authors' PyTorch folder. Default: the one that comes with the "
    "package for --model.",
)
_PLAIN = flags.DEFINE_bool("plain", False, "Decode plainly, without an adapter.")
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File that holds the prompt (UTF-8); - is standard input.")
_INPUT = flags.DEFINE_string(
    "input", None, 'File of prompts: {"id": ..., "prompt": "..."} per line, "max_new_tokens" and "seed" where wanted.'
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the answers to --input; prompts it answers are not redone.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Prompts of --input decoded at a time.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Maximum number of tokens to generate.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Shallow layers. Default: what the adapter was trained for.")
_MAX_DRAFT_LEN = flags.DEFINE_integer(
    "max_draft_len", None, "Maximum number of tokens drafted in a round. Default: the adapter's decode.json, else 6."
)
_THRESHOLD = flags.DEFINE_float(
    "threshold", None, "Confidence below which drafting stops. Default: the adapter's decode.json, else 0.6."
)
_TREE = flags.DEFINE_bool(
    "tree",
    None,
    "Draft a tree of tokens, or (--notree) one sequence. Default: the adapter's decode.json, else a sequence.",
)
_TREE_TOPK = flags.DEFINE_integer(
    "tree_topk",
    None,
    f"Tokens of a tree's level that are drafted on from. Default: the adapter's decode.json, else {TreeConfig().topk}.",
)
_TREE_BUDGET = flags.DEFINE_integer(
    "tree_budget",
    None,
    "Maximum number of a tree's tokens that are verified. Default: the adapter's decode.json, else "
    f"{TreeConfig().budget}.",
)
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "Sample at this temperature; 0 is greedy.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Sample from the most probable tokens that have this probability together.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from this many most probable tokens; 0 is all.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of sampling: the same seed and prompt give the same text.")
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends the text; may be given several times.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Type of the weights. Default: float32 for the demo and on CPU, else bfloat16.",
)
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that hold the target together, each layer split.")
_DATA_PARALLEL = flags.DEFINE_integer(
    "data_parallel", 1, "Groups of such devices that the prompts of --input are spread over."
)
_COMPARE = flags.DEFINE_bool("compare", False, "Decode plainly too: three interleaved runs each, medians.")
_JSON = flags.DEFINE_bool("json", False, "End the output with one line: a JSON object of the results.")

_PREFLIGHT_PROMPT = 1024  # tokens
_PREFLIGHT_EXIT_LAYER = 2  # the paper's for 7B; memory hardly depends on it


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command = command_line.name(argv)
    command_line.run(command, functools.partial(_decode, command), argv, usage=__doc__)


def _decode(command: str) -> None:
    _check_flags()
    given, sampling = _settings()
    if preflight_flag.PREFLIGHT.value is not None:
        sys.exit(0 if _fits(given) else 1)
    process_flags.join(command)
    if _INPUT.value is not None:
        _answer_file(command, given, sampling)
    else:
        _answer_prompt(command, given, sampling)


def _check_flags() -> None:
    """Raises `InputError` for flags that do not go together."""
    if _INPUT.value is not None:
        for flag in (_PROMPT, _PROMPT_FILE, _COMPARE, command_line.PROFILE):
            if flag.value not in (None, False):
                raise InputError(f"--{flag.name} and --input do not go together; give one")
        if _OUTPUT.value is None:
            raise InputError("--output is missing; name a file for the answers to --input")
        if _BATCH_SIZE.value < 1:
            raise InputError(f"--batch_size must be at least 1, found {_BATCH_SIZE.value}")
    elif _OUTPUT.present or _BATCH_SIZE.present or _DATA_PARALLEL.present:
        raise InputError(
            "--output, --batch_size and --data_parallel belong to --input, which is missing; give a file of prompts"
        )
    if _PLAIN.value:
        drafting = (_ADAPTER, _EXIT_LAYER, _MAX_DRAFT_LEN, _THRESHOLD, _TREE, _TREE_TOPK, _TREE_BUDGET)
        for flag in (*drafting, _COMPARE, preflight_flag.PREFLIGHT):
            if flag.present:
                raise InputError(f"--{flag.name} and --plain do not go together; give one")


def _settings() -> tuple[DraftOverrides, SamplingConfig]:
    """What the flags say about drafting and sampling; flags out of range are named before anything is loaded."""
    draft = DraftOverrides(
        _EXIT_LAYER.value, _MAX_DRAFT_LEN.value, _THRESHOLD.value, _TREE.value, _TREE_TOPK.value, _TREE_BUDGET.value
    )
    sampling = SamplingConfig(_TEMPERATURE.value, _TOP_P.value, _TOP_K.value, _SEED.value)
    if sampling.temperature == 0 and (sampling.top_p, sampling.top_k) != (1.0, 0):
        raise InputError("--top_p and --top_k change nothing without a --temperature above 0; give one")
    return draft, sampling


def _fits(given: DraftOverrides) -> bool:
    """--preflight: whether what the other flags ask for fits the machine it names."""
    from kangaroo_jax import preflight

    report = preflight.decoding(
        _MODEL.value or str(demo.MODEL),
        _DTYPE.value or ("float32" if _MODEL.value is None else "bfloat16"),
        given.over(DraftConfig(_PREFLIGHT_EXIT_LAYER)),
        _PREFLIGHT_PROMPT,
        _MAX_NEW_TOKENS.value,
        _MODEL_PARALLEL.value,
        preflight_flag.find_machine(),
    )
    return preflight_flag.show(report)


def _load(given: DraftOverrides) -> tuple[Target, TrainedAdapter | None, DraftConfig]:
    """Target, adapter, and how to draft: the flags, then the adapter's decode.json, then the paper. With --plain there
    is no adapter."""
    import jax

    from kangaroo_jax import compilation_cache
    from kangaroo_jax.cli.models import load_adapter_of, load_target_of
    from kangaroo_jax.model import sharding

    compilation_cache.enable()
    split = (_MODEL_PARALLEL.value, _DATA_PARALLEL.value)
    mesh = None if split == (1, 1) else sharding.decoding_mesh(split[0], jax.local_devices(), split[1])
    target = load_target_of(_MODEL.value, _DTYPE.value, mesh)
    if _PLAIN.value:
        return target, None, DraftConfig()
    adapter = load_adapter_of(target, _ADAPTER.value)
    return target, adapter, given.over(adapter.draft)


def _answer_file(command: str, given: DraftOverrides, sampling: SamplingConfig) -> None:
    """Answers --input into --output; exit code 1 if there was something that could not be answered."""
    import jax
    from jax.experimental import multihost_utils

    from kangaroo_jax.cli.progress import Progress
    from kangaroo_jax.engine import answer_file
    from kangaroo_jax.engine.answer_prompts import answer_prompts
    from kangaroo_jax.engine.prompt_file import read_prompts

    prompts, bad = read_prompts(_INPUT.value)
    output = answer_file.check_place(_OUTPUT.value, _INPUT.value)
    first = jax.process_index() == 0
    for message in bad if first else ():
        print(f"{command}: {message}", file=sys.stderr)
    if prompts:
        target, adapter, draft = _load(given)
        with Progress(str(output)) as progress:
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
                on_progress=progress.show,
                on_error=progress.say,
            )
        mine = "" if jax.process_count() == 1 else f"process {jax.process_index()}: "
        print(
            f"{mine}{done.prompts} prompts answered, {done.before} were before, {done.errors + len(bad)} could not be; "
            f"{done.new_tokens} tokens in {done.seconds:.1f} s, {done.new_tokens / done.seconds:.1f} tokens/s, "
            f"mean accept length {done.mean_accept_length:.2f}; compilation, not counted: {done.compile_seconds:.1f} s"
        )
        if _JSON.value:
            print(json.dumps(done.as_json() | {"bad_lines": len(bad)}))
    if bad or (prompts and done.errors):
        sys.exit(1)


def _answer_prompt(command: str, given: DraftOverrides, sampling: SamplingConfig) -> None:
    """Prints the text as it is generated, then how fast it was."""
    import jax

    from kangaroo_jax import generate, generate_plain, profiling

    if jax.process_count() > 1:
        raise InputError("several processes need --input, whose prompts they share; give it, or run one process")
    profiling.check(command_line.PROFILE.value)
    built_in = demo.PROMPT if _MODEL.value is None else None
    prompt = read_prompt(command, _PROMPT.value, _PROMPT_FILE.value, built_in)
    target, adapter, draft = _load(given)
    greedy = sampling.temperature == 0
    common = {"max_new_tokens": _MAX_NEW_TOKENS.value, "sampling": sampling, "stop": _STOP.value}
    plain = functools.partial(generate_plain, target, [prompt], **common)
    kangaroo = functools.partial(generate, target, adapter, [prompt], draft=draft, **common)
    chosen = plain if adapter is None else kangaroo

    # The prompt is printed with the first piece of text: by then all input has been found good.
    pieces = itertools.chain([prompt], itertools.repeat(""))
    shown = chosen(on_text=lambda _, text: print(next(pieces) + text, end="", flush=True))
    print(next(pieces) + "\n")
    if command_line.PROFILE.value is not None:  # a run of its own: the one above may have compiled
        with profiling.trace(command_line.PROFILE.value, print):
            chosen()
    compiling = shown.seconds.compile
    if _COMPARE.value:
        result, compiling_plain = compare(kangaroo, plain, greedy, str(target.model.dtype))
        compiling += compiling_plain
    else:
        result = summary(shown, shown.seconds.prefill + shown.seconds.decode)
        print_table({"plain" if adapter is None else "Kangaroo": result})
    print(f"compilation, not counted above: {compiling:.1f} s (kept on disk for the next run)")
    if _JSON.value:
        text = shown.texts[0] if shown.texts else None
        how = {} if greedy else {"sampling": dataclasses.asdict(sampling)}
        print(json.dumps(result | how | {"text": text}))


if __name__ == "__main__":
    main()
