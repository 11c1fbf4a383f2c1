"""Generates text with Kangaroo.

decode.py                                   the demo on a built-in prompt
decode.py --compare                         and plain decoding beside it
decode.py --plain                           plain decoding alone, without an adapter
decode.py --temperature=0.8 --top_p=0.95    sampled, not greedy
decode.py --model=FOLDER_OR_HUB_ID --adapter=FOLDER --prompt="..."
decode.py --prompt_file=prompt.txt          or: some-command | decode.py
decode.py --messages=FILE                   a conversation, as JSON: [{"role": "user", "content": "..."}, ...]
decode.py --chat                            a conversation in the terminal
decode.py --show_drafts --html=FILE         which tokens were drafted, accepted and rejected
decode.py --input=prompts.jsonl --output=answers.jsonl --batch_size=8    many prompts; run again, it goes on
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from kangaroo_jax import demo
from kangaroo_jax.cli import command_line, drafts_page, preflight_flag, process_flags
from kangaroo_jax.cli.compare import compare, print_table, summary
from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.cli.prompt import read_messages, read_prompt
from kangaroo_jax.config import DraftConfig, LookupConfig, SamplingConfig, TreeConfig
from kangaroo_jax.errors import InputError

if TYPE_CHECKING:
    from kangaroo_jax.checkpoint.adapter import TrainedAdapter
    from kangaroo_jax.checkpoint.target import Target
    from kangaroo_jax.cli.answer import TextPrinter
    from kangaroo_jax.engine.requests import TextDelta

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Target: a folder in Hugging Face format, here or in a bucket (gs://, s3://), or a hub id. Default: the demo.",
)
_ADAPTER = flags.DEFINE_string(
    "adapter",
    None,
    "Adapter: a folder that train.py wrote, here or in a bucket, or the authors' PyTorch folder. Default: the one that "
    "comes with the package for --model.",
)
_PLAIN = flags.DEFINE_bool("plain", False, "Decode plainly, without an adapter.")
_PROMPT = flags.DEFINE_string("prompt", None, "The prompt.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "File that holds the prompt (UTF-8); - is standard input.")
_MESSAGES = flags.DEFINE_string(
    "messages",
    None,
    'File of the messages to answer, as JSON: [{"role": "user", "content": "..."}, ...]; - is standard input. '
    "With --chat: what the conversation begins with.",
)
_CHAT = flags.DEFINE_bool("chat", False, "A conversation in the terminal.")
_RAW = flags.DEFINE_bool(
    "raw", False, "Give the prompt as it is. Default: as a user's turn, where the model has a chat template."
)
_INPUT = flags.DEFINE_string(
    "input",
    None,
    'File of prompts: {"id": ..., "prompt": "..."} or {"id": ..., "messages": [...]} per line, "max_new_tokens" and '
    '"seed" where wanted.',
)
_OUTPUT = flags.DEFINE_string("output", None, "File for the answers to --input; prompts it answers are not redone.")
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", 8, "Prompts of --input decoded at a time; with --preflight, sequences (default: 1)."
)
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    128,
    "Maximum number of tokens to generate; an answer ends at the model's context in any case. Default with --chat: "
    "as many as the context holds.",
)
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
_LOOKUP_TOKENS = flags.DEFINE_integer(
    "lookup_tokens",
    None,
    "Tokens drafted from the text itself where its last tokens stand in it before; 0 looks nothing up. Default: the "
    "adapter's decode.json, else 0.",
)
_LOOKUP_MIN_NGRAM = flags.DEFINE_integer(
    "lookup_min_ngram",
    None,
    "With fewer last tokens found, nothing is looked up. Default: the adapter's decode.json, else "
    f"{LookupConfig().min_ngram}.",
)
_LOOKUP_MAX_NGRAM = flags.DEFINE_integer(
    "lookup_max_ngram",
    None,
    f"Most last tokens that are searched for. Default: the adapter's decode.json, else {LookupConfig().max_ngram}.",
)
_LOOKUP = (_LOOKUP_TOKENS, _LOOKUP_MIN_NGRAM, _LOOKUP_MAX_NGRAM)
_DECIDE = flags.DEFINE_bool(
    "decide",
    None,
    "Each sequence decides how far to draft, down to nothing where it does not pay; or (--nodecide) --max_draft_len "
    "and --threshold say it for all. Default: as the adapter's decode.json says, else not.",
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
_WEIGHTS = flags.DEFINE_enum(
    "weights",
    "float",
    ["float", "int8"],
    "int8: matrices are rounded when they are loaded; --dtype is that of the rest, and of what is computed.",
)
_LONG_CONTEXT = flags.DEFINE_bool(
    "long_context",
    False,
    "For a model with longrope (Phi): texts beyond the context that it was first trained on. Its long factors then "
    "turn all texts.",
)
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that hold the target together, each layer split.")
_DATA_PARALLEL = flags.DEFINE_integer(
    "data_parallel",
    None,
    "Groups of such devices that the prompts of --input are spread over. Default: as many as there are and divide "
    "--batch_size.",
)
_COMPARE = flags.DEFINE_bool("compare", False, "Decode plainly too: three interleaved runs each, medians.")
_SHOW_DRAFTS = flags.DEFINE_bool(
    "show_drafts", False, "Show in the text which tokens were drafted and accepted, and which were rejected."
)
_HTML = flags.DEFINE_string("html", None, "File to write the same into, as a page for a browser.")
_JSON = flags.DEFINE_bool("json", False, "End the output with one line: a JSON object of the results.")

_CONTEXT = flags.DEFINE_integer("context", 1024, "With --preflight: tokens of each prompt.")

_NO_LIMIT = 2**31 - 1  # new tokens; the context ends an answer
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
    elif _CHAT.value:
        _chat(given, sampling)
    else:
        _answer_prompt(command, given, sampling)


def _check_flags() -> None:
    """Raises `InputError` for flags that do not go together."""
    preflight = preflight_flag.PREFLIGHT.value
    _exclude(_INPUT, _PROMPT, _PROMPT_FILE, _MESSAGES, _CHAT, _COMPARE, _SHOW_DRAFTS, _HTML, command_line.PROFILE)
    _exclude(_CHAT, _PROMPT, _PROMPT_FILE, _RAW, _COMPARE, _HTML, _JSON, command_line.PROFILE)
    _exclude(_MESSAGES, _PROMPT, _PROMPT_FILE, _RAW)
    if _CHAT.value and _MESSAGES.value == "-":
        raise InputError("--chat and --messages=- both read standard input; give the messages in a file")
    if _INPUT.value is not None:
        if _OUTPUT.value is None:
            raise InputError("--output is missing; name a file for the answers to --input")
    elif _OUTPUT.present or (preflight is None and (_BATCH_SIZE.present or _DATA_PARALLEL.present)):
        raise InputError(
            "--output, --batch_size and --data_parallel belong to --input, which is missing; give a file of prompts"
        )
    if _PLAIN.value:
        drafting = (
            _ADAPTER,
            _EXIT_LAYER,
            _MAX_DRAFT_LEN,
            _THRESHOLD,
            _TREE,
            _TREE_TOPK,
            _TREE_BUDGET,
            *_LOOKUP,
            _DECIDE,
        )
        for flag in (*drafting, _COMPARE, _SHOW_DRAFTS, _HTML, preflight_flag.PREFLIGHT):
            if flag.present:
                raise InputError(f"--{flag.name} and --plain do not go together; give one")
    if preflight is not None:
        asked = (_PROMPT, _PROMPT_FILE, _MESSAGES, _INPUT, _CHAT, _RAW, _STOP, _TEMPERATURE, _TOP_P, _TOP_K, _SEED)
        shown = (_OUTPUT, _COMPARE, _SHOW_DRAFTS, _HTML, _JSON, command_line.PROFILE)
        for flag in (_ADAPTER, _THRESHOLD, _DECIDE, *asked, *shown):
            if flag.present:
                raise InputError(
                    f"--{flag.name} changes nothing with --preflight, which compiles for the model's shape and the "
                    "paper's adapter, and runs nothing; leave it out"
                )
    if _CONTEXT.present and preflight is None:
        raise InputError("--context belongs to --preflight, which is missing; give a machine")
    if "" in _STOP.value:
        raise InputError("--stop must not be empty; leave it out where nothing ends the text but the model")
    for flag in (_MAX_NEW_TOKENS, _BATCH_SIZE, _CONTEXT, _DATA_PARALLEL):
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name} must be at least 1, found {flag.value}")


def _exclude(flag: flags.FlagHolder, *others: flags.FlagHolder) -> None:
    """Raises `InputError` where `flag` and one of the others were given."""
    for other in others if flag.value not in (None, False) else ():
        if other.value not in (None, False):
            raise InputError(f"--{other.name} and --{flag.name} do not go together; give one")


def _settings() -> tuple[DraftOverrides, SamplingConfig]:
    """What the flags say about drafting and sampling; flags out of range are named before anything is loaded."""
    draft = DraftOverrides(
        _EXIT_LAYER.value,
        _MAX_DRAFT_LEN.value,
        _THRESHOLD.value,
        _TREE.value,
        _TREE_TOPK.value,
        _TREE_BUDGET.value,
        *(flag.value for flag in _LOOKUP),
        _DECIDE.value,
    )
    sampling = SamplingConfig(_TEMPERATURE.value, _TOP_P.value, _TOP_K.value, _SEED.value)
    if sampling.temperature == 0 and (sampling.top_p, sampling.top_k) != (1.0, 0):
        raise InputError("--top_p and --top_k change nothing without a --temperature above 0; give one")
    return draft, sampling


def _fits(given: DraftOverrides) -> bool:
    """--preflight: whether what the other flags ask for fits the machine it names."""
    from kangaroo_jax.preflight.decoding import decoding

    machine = preflight_flag.find_machine()
    batch = _BATCH_SIZE.value if _BATCH_SIZE.present else 1
    report = decoding(
        _MODEL.value or str(demo.MODEL),
        _DTYPE.value or ("float32" if _MODEL.value is None else "bfloat16"),
        given.over(DraftConfig(_PREFLIGHT_EXIT_LAYER)),
        _CONTEXT.value,
        _MAX_NEW_TOKENS.value,
        _MODEL_PARALLEL.value,
        machine,
        weights=_WEIGHTS.value,
        long_context=_LONG_CONTEXT.value,
        batch_size=batch,
        data_parallel=_DATA_PARALLEL.value or _groups(len(machine.devices), batch),
    )
    return preflight_flag.show(report)


def _load(given: DraftOverrides) -> tuple[Target, TrainedAdapter | None, DraftConfig]:
    """Target, adapter, and how to draft: the flags, then the adapter's decode.json, then the paper. With --plain there
    is no adapter."""
    import jax

    from kangaroo_jax import compilation_cache
    from kangaroo_jax.cli.models import draft_of, load_adapter_of, load_target_of
    from kangaroo_jax.model import sharding

    compilation_cache.enable()
    devices = jax.local_devices()
    groups = _DATA_PARALLEL.value or _data_parallel(len(devices))
    split = (_MODEL_PARALLEL.value, groups)
    mesh = None if split == (1, 1) else sharding.decoding_mesh(split[0], devices, split[1])
    target = load_target_of(_MODEL.value, _DTYPE.value, mesh, _WEIGHTS.value, _LONG_CONTEXT.value)
    if _PLAIN.value:
        return target, None, DraftConfig()
    adapter = load_adapter_of(target, _ADAPTER.value)
    slots = 1 if _INPUT.value is None else _BATCH_SIZE.value
    draft = draft_of(given.over(adapter.draft), slots, _WEIGHTS.value, _MODEL.value, _ADAPTER.value)
    return target, adapter, draft


def _data_parallel(devices: int) -> int:
    """How many groups of devices the prompts are spread over where the command line does not say."""
    if _INPUT.value is None:
        return 1
    groups = _groups(devices, _BATCH_SIZE.value)
    if groups > 1:
        print(f"note: the prompts are spread over {groups} of {devices} devices (--data_parallel)", file=sys.stderr)
    return groups


def _groups(devices: int, batch_size: int) -> int:
    """As many groups of --model_parallel devices as there are, and as divide a batch."""
    most = max(1, devices // max(1, _MODEL_PARALLEL.value))
    return max(count for count in range(1, most + 1) if batch_size % count == 0)


def _answer_file(command: str, given: DraftOverrides, sampling: SamplingConfig) -> None:
    """Answers --input into --output; exit code 1 if there was something that could not be answered."""
    import jax
    from jax.experimental import multihost_utils

    from kangaroo_jax.cli.progress import Progress
    from kangaroo_jax.engine import answer_place
    from kangaroo_jax.engine.answer_prompts import Tally, answer_prompts
    from kangaroo_jax.engine.prompt_file import read_prompts

    prompts, bad = read_prompts(_INPUT.value)
    first = jax.process_index() == 0
    opened = answer_place.opened(_OUTPUT.value, _INPUT.value, first)
    for message in bad if first else ():
        print(f"{command}: {message}", file=sys.stderr)
    if prompts:
        meet = multihost_utils.sync_global_devices if jax.process_count() > 1 else lambda _: None
        with opened as place:
            target, adapter, draft = _load(given)
            with Progress(_OUTPUT.value) as progress:

                def on_progress(tally: Tally) -> None:
                    progress.show(tally)
                    place.sent()

                done = answer_prompts(
                    target,
                    adapter,
                    prompts,
                    place.path,
                    source=_INPUT.value,
                    batch_size=_BATCH_SIZE.value,
                    max_new_tokens=_MAX_NEW_TOKENS.value,
                    draft=draft,
                    sampling=sampling,
                    stop=_STOP.value,
                    as_user_turns=_as_user_turn(target),
                    process_index=jax.process_index(),
                    process_count=jax.process_count(),
                    barrier=functools.partial(place.met, meet),
                    on_progress=on_progress,
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
    from kangaroo_jax import Engine, EngineConfig, Request, generate, generate_plain, profiling
    from kangaroo_jax.checkpoint.chat_template import check_messages
    from kangaroo_jax.cli.answer import DraftPrinter, TextPrinter, legend, stream
    from kangaroo_jax.engine.prompts import answer_room, encode_prompt, user_turn

    _check_one_process()
    profiling.check(command_line.PROFILE.value)
    if _HTML.value is not None:
        drafts_page.check_place(_HTML.value)
    if _MESSAGES.value is None:
        built_in = demo.PROMPT if _MODEL.value is None else None
        prompt = read_prompt(command, _PROMPT.value, _PROMPT_FILE.value, built_in)
    else:
        prompt = read_messages(_MESSAGES.value)
        check_messages(prompt)
    target, adapter, draft = _load(given)
    templated = isinstance(prompt, list) or _as_user_turn(target)
    ids = encode_prompt(target, user_turn(prompt) if templated else prompt, 1, None, "the prompt")
    most = min(_MAX_NEW_TOKENS.value, answer_room(target, ids, None))

    drafts = _SHOW_DRAFTS.value or _HTML.value is not None
    printer = DraftPrinter(target.tokenizer, ids) if _SHOW_DRAFTS.value else TextPrinter()
    beginning = _beginning(target, prompt, templated)
    if _SHOW_DRAFTS.value:
        beginning += f"{legend(looks_up=draft.lookup is not None)}\n\n"
    shown_prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    before = iter([beginning + shown_prompt + ("\n\n" if templated else "")])

    def show(delta: TextDelta) -> None:
        # The prompt is printed with the first piece of text: by then all input has been found good.
        print(next(before, ""), end="")
        printer.feed(delta)

    engine = Engine(target, adapter, EngineConfig(1), draft)
    answer = stream(engine, Request(ids, most, sampling, _STOP.value, drafts=drafts), show)
    printer.finish(answer)
    if answer.tokens:  # else nothing was printed
        print("\n")
    answer.checked()
    common = {"max_new_tokens": most, "sampling": sampling, "stop": _STOP.value}
    plain = functools.partial(generate_plain, target, [ids], **common)
    kangaroo = functools.partial(generate, target, adapter, [ids], draft=draft, **common)
    if command_line.PROFILE.value is not None:  # a run of its own: the one above may have compiled
        with profiling.trace(command_line.PROFILE.value, print):
            (plain if adapter is None else kangaroo)()
    compiling = engine.compile_seconds
    greedy = sampling.temperature == 0
    if _COMPARE.value:
        result, compiling_plain = compare(kangaroo, plain, greedy, str(target.model.dtype))
        compiling += compiling_plain
    else:
        lengths = (answer.accept_lengths, answer.draft_lengths, answer.lookup_lengths)
        result = summary(len(answer.tokens), *lengths, answer.seconds)
        print_table({"plain" if adapter is None else "Kangaroo": result})
    print(f"compilation, not counted above: {compiling:.1f} s (kept on disk for the next run)")
    if _HTML.value is not None:
        how = f"{draft}, " + ("greedy" if greedy else f"temperature {sampling.temperature}")
        names = {"model": target.title, "adapter": adapter.name, "settings": how}
        page = drafts_page.render(target.tokenizer, ids, shown_prompt, answer, names)
        drafts_page.write(_HTML.value, page)
        print(f"the drafts are in {_HTML.value}")
    if _JSON.value:
        how = {} if greedy else {"sampling": dataclasses.asdict(sampling)}
        print(json.dumps(result | how | {"text": answer.text}))


def _chat(given: DraftOverrides, sampling: SamplingConfig) -> None:
    """A conversation in the terminal."""
    from kangaroo_jax import Engine, EngineConfig, Request
    from kangaroo_jax.cli.answer import DraftPrinter, TextPrinter, legend
    from kangaroo_jax.cli.chat import COMMANDS, chat
    from kangaroo_jax.engine.conversation import Conversation

    _check_one_process()
    messages = [] if _MESSAGES.value is None else read_messages(_MESSAGES.value)
    target, adapter, draft = _load(given)
    conversation = Conversation(target, messages)
    engine = Engine(target, adapter, EngineConfig(1), draft)
    most = _MAX_NEW_TOKENS.value if _MAX_NEW_TOKENS.present else _NO_LIMIT

    def request(ids: list[int]) -> Request:
        return Request(ids, most, sampling, _STOP.value, to_context=True, drafts=_SHOW_DRAFTS.value)

    def printer(ids: Sequence[int]) -> TextPrinter:
        return DraftPrinter(target.tokenizer, ids, strip=True) if _SHOW_DRAFTS.value else TextPrinter(strip=True)

    print(f"each turn is given by the model's chat template; {COMMANDS}")
    if _SHOW_DRAFTS.value:
        print(legend(looks_up=draft.lookup is not None))
    print()
    engine.abort(engine.add(request([0])))  # settings that cannot be are named before anything is typed
    chat(engine, conversation, request, printer)


def _check_one_process() -> None:
    import jax

    if jax.process_count() > 1:
        raise InputError("several processes need --input, whose prompts they share; give it, or run one process")


def _as_user_turn(target: Target) -> bool:
    """Whether a prompt that is text is given as a user's turn."""
    return not _RAW.value and target.tokenizer is not None and bool(target.tokenizer.chat_template)


def _beginning(target: Target, prompt: str | list, templated: bool) -> str:
    """The first line: how the prompt was given, where there was a choice."""
    if isinstance(prompt, list):
        return f"the messages of {_MESSAGES.value}, by the model's chat template:\n\n"
    if templated:
        return "the prompt as a user's turn of the model's chat template (--raw: as it is):\n\n"
    if target.tokenizer is not None and target.tokenizer.chat_template:
        return "the prompt as it is, without the model's chat template (--raw):\n\n"
    return ""


if __name__ == "__main__":
    main()
