"""Writes training data with the target itself.

    python -m kangaroo_jax.data.synthesize --model=FOLDER_OR_HUB_ID --output=FILE.jsonl --conversations=10000

A chat model asks and answers: it continues its chat template's empty user turn, then answers what it wrote.

    ... --openings=openings.txt    its questions begin with the lines of a file
    ... --texts='books/*.txt'      a base model, which has no chat template, continues texts
    ... --prompts=prompts.jsonl    answers the prompts, or the users' turns, of files

Run again, it goes on; with more --conversations, it adds to those that are there.
"""

from __future__ import annotations

import json

from absl import flags

from kangaroo_jax.cli import command_line
from kangaroo_jax.config import SynthesisConfig
from kangaroo_jax.errors import InputError

try:
    from kangaroo_jax.data import chat
except ModuleNotFoundError:
    message = "training's packages are not installed; install the project with its extra: pip install '.[train]'"
    command_line.fail("synthesize", message, code=1)

_DEFAULT = SynthesisConfig()

_MODEL = flags.DEFINE_string("model", None, "Target: a folder in Hugging Face format, or a hub id.")
_OUTPUT = flags.DEFINE_string("output", None, "File of records to write, ending in .jsonl.")
_CONVERSATIONS = flags.DEFINE_integer(
    "conversations", None, f"Records to write. Default: {_DEFAULT.conversations}; with --prompts, one for each."
)
_OPENINGS = flags.DEFINE_string(
    "openings", "", "File of beginnings of questions, one on a line; an empty line leaves a question to the target."
)
_TEXTS = flags.DEFINE_string("texts", "", "Texts to continue: paths and globs, separated by commas.")
_PROMPTS = flags.DEFINE_string(
    "prompts", None, 'Files of {"prompt": ...}, {"messages": [...]} or {"conversations": [...]}: answer these.'
)
_TEMPLATE = flags.DEFINE_string("template", "", "Chat template, as data.template in a configuration.")
_TURNS = flags.DEFINE_integer("turns", _DEFAULT.turns, "Most questions of a conversation.")
_SEVERAL_TURNS = flags.DEFINE_float(
    "several_turns", _DEFAULT.several_turns, "Share of the conversations that have more than one question."
)
_GREEDY = flags.DEFINE_float("greedy", _DEFAULT.greedy, "Share of the records that are greedy; the others are sampled.")
_TEMPERATURE = flags.DEFINE_float("temperature", _DEFAULT.temperature, "Of the questions.")
_TOP_P = flags.DEFINE_float("top_p", _DEFAULT.top_p, "Of the questions.")
_ANSWER_TEMPERATURE = flags.DEFINE_float(
    "answer_temperature", _DEFAULT.answer_temperature, "Of the answers that are sampled."
)
_QUESTION_TOKENS = flags.DEFINE_integer(
    "question_tokens", _DEFAULT.question_tokens, "At most so many in a question; longer ones are left out."
)
_ANSWER_TOKENS = flags.DEFINE_integer(
    "answer_tokens", _DEFAULT.answer_tokens, "At most so many in an answer; longer ones are cut."
)
_CONVERSATION_TOKENS = flags.DEFINE_integer(
    "conversation_tokens",
    _DEFAULT.conversation_tokens,
    "At most so many in a conversation that the target asks itself; with a large batch, they take much memory.",
)
_SEED = flags.DEFINE_integer(
    "seed",
    _DEFAULT.seed,
    "A record depends on it and on its own number; with --adapter, a sampled one on --batch_size too.",
)
_BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", _DEFAULT.batch_size, "Sequences decoded together: 8 to 16 on a CPU, 64 to 512 on a GPU."
)
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter to decode with. Default: plain decoding.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Type of the weights. Default: float32 on CPU, else bfloat16.",
)
_MODEL_PARALLEL = flags.DEFINE_integer("model_parallel", 1, "Devices that hold the target together, each layer split.")
_DATA_PARALLEL = flags.DEFINE_integer("data_parallel", 1, "Groups of such devices that the batch is spread over.")
_JSON = flags.DEFINE_bool("json", False, "End the output with one line: a JSON object of the figures.")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    interrupted = "interrupted; the same command does the rest"
    command_line.run("synthesize", _synthesize, argv, interrupted=interrupted, usage=__doc__)


def _synthesize() -> None:
    command_line.require(_MODEL, _OUTPUT)
    settings = _settings()
    if _TEMPLATE.value not in ("", *chat.NAMED):
        raise InputError(f"--template: expected {', '.join(chat.NAMED)} or none, found {_TEMPLATE.value!r}")
    if _PROMPTS.value is not None and _TEXTS.value:
        raise InputError("--prompts and --texts were both given; give one")
    if _PROMPTS.value is not None and _OPENINGS.value:
        raise InputError("--prompts and --openings were both given; give one")
    import jax

    from kangaroo_jax import DraftConfig, compilation_cache, load_adapter, load_target
    from kangaroo_jax.cli.synthesis_progress import SynthesisProgress
    from kangaroo_jax.data.synthesize.record_file import check_place
    from kangaroo_jax.data.synthesize.run import write_records
    from kangaroo_jax.data.synthesize.sources import Regenerated, choose_source
    from kangaroo_jax.model import sharding

    output = check_place(_OUTPUT.value, "--output")
    compilation_cache.enable()
    split = (_MODEL_PARALLEL.value, _DATA_PARALLEL.value)
    mesh = None if split == (1, 1) else sharding.decoding_mesh(split[0], jax.local_devices(), split[1])
    target = load_target(_MODEL.value, _DTYPE.value, mesh)
    adapter = None if _ADAPTER.value is None else load_adapter(_ADAPTER.value, target)
    if _PROMPTS.value is not None:
        source = Regenerated(target, settings, _PROMPTS.value, _TEMPLATE.value)
        wanted = min(source.count, _CONVERSATIONS.value or source.count)
    else:
        source, wanted = choose_source(target, settings, _TEMPLATE.value), settings.conversations
    with SynthesisProgress() as progress:
        done = write_records(
            target,
            adapter,
            source,
            output,
            wanted,
            batch_size=settings.batch_size,
            draft=DraftConfig() if adapter is None else adapter.draft,
            on_progress=progress.show,
        )
    print(
        f"{output}: {done.records} records, {done.before} of them before; left out: {progress.dropped(done)}; "
        f"{done.tokens} tokens in {done.seconds:.1f} s, {done.tokens_per_second:.1f} tokens/s; compilation, not "
        f"counted: {done.compile_seconds:.1f} s"
    )
    if _JSON.value:
        print(json.dumps(done.as_json()))


def _settings() -> SynthesisConfig:
    """What the flags say; a flag out of range is named before anything is loaded."""
    fields = {
        "conversations": _DEFAULT.conversations if _CONVERSATIONS.value is None else _CONVERSATIONS.value,
        "seed": _SEED.value,
        "turns": _TURNS.value,
        "several_turns": _SEVERAL_TURNS.value,
        "greedy": _GREEDY.value,
        "temperature": _TEMPERATURE.value,
        "top_p": _TOP_P.value,
        "answer_temperature": _ANSWER_TEMPERATURE.value,
        "question_tokens": _QUESTION_TOKENS.value,
        "answer_tokens": _ANSWER_TOKENS.value,
        "conversation_tokens": _CONVERSATION_TOKENS.value,
        "batch_size": _BATCH_SIZE.value,
        "openings": _OPENINGS.value,
        "texts": _TEXTS.value,
    }
    try:
        return SynthesisConfig(**fields)
    except InputError as error:
        raise InputError(str(error).replace("data.synthesis.", "--")) from None


if __name__ == "__main__":
    main()
