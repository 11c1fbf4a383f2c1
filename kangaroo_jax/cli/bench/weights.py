"""What int8 weights change: bytes, loss of a text, greedy tokens.

    python -m kangaroo_jax.bench weights --model=smollm2-135m --text=docs/decode.md,docs/train.md --dtype=float32

The target is loaded with float and with int8 weights, one after the other; the last line is the int8 one with the float
one's embedding and head. Prompts are pieces of the text.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax import compilation_cache, paths
from kangaroo_jax.bench import machine, weights_quality
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.models import load_target_of
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.quantized import WEIGHTS

_MODEL = shared_flags.define_model()
_DTYPE = shared_flags.define_dtype()
_TEXT = flags.DEFINE_list("text", None, "Files of text that the target was not trained on, separated by commas.")
_LENGTH = flags.DEFINE_integer("length", 512, "Tokens of a piece of the text whose loss is measured.")
_PIECES = flags.DEFINE_integer("pieces", 32, "Pieces of the text.")
_PROMPTS = flags.DEFINE_integer("prompts", 100, "Prompts.")
_PROMPT_TOKENS = flags.DEFINE_integer("prompt_tokens", 64, "Tokens of a prompt.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "New tokens per prompt; EOS does not end them.")


def main() -> None:
    shared_flags.check_positive(_LENGTH, _PIECES, _PROMPTS, _PROMPT_TOKENS, _MAX_NEW_TOKENS)
    if not _TEXT.value:
        raise InputError("--text is missing; give files of text")
    text = "\n".join(_read(path) for path in _TEXT.value)
    compilation_cache.enable()
    print(machine.describe())
    print(f"{'':46}{'bytes':>14}{'loss':>10}{'changed':>10}{'same answers':>14}")
    reference = tables = None

    def measure(target: Target, name: str) -> weights_quality.Quality:
        found = weights_quality.measure(
            target,
            weights_quality.windows(target, text, _LENGTH.value, _PIECES.value),
            weights_quality.windows(target, text, _PROMPT_TOKENS.value, _PROMPTS.value),
            _MAX_NEW_TOKENS.value,
            None if reference is None else reference.answers,
        )
        print(
            f"{name:46}{found.num_bytes:14}{found.loss:10.4f}{found.changed:10.2%}{found.same:10} of {_PROMPTS.value}",
            flush=True,
        )
        return found

    for weights in WEIGHTS:
        target = load_target_of(_MODEL.value, _DTYPE.value, weights=weights)
        found = measure(target, target.model.arithmetic)
        if reference is None:
            reference, tables = found, (target.model.embed_tokens, target.model.lm_head)
            del target  # the next one needs the memory
    name = target.model.arithmetic
    target.model.embed_tokens, target.model.lm_head = tables
    measure(target, f"{name}, float embedding and head")


def _read(path: str) -> str:
    try:
        return paths.expanded(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InputError(f"--text: {path}: {reason}; give files of text") from None
