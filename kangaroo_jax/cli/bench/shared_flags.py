"""Flags that several bench commands have, each defined once, and the checks they share.

A command calls the functions for the flags it has, when its module is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from kangaroo_jax import DraftConfig
from kangaroo_jax.bench.chat_prompts import CHAT_PROMPTS
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.engine.prompts import encode_prompts, user_turn
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.quantized import WEIGHTS

flags.disclaim_key_flags()  # they belong to the command that calls for them, so that its --help shows them


def define_model() -> flags.FlagHolder[str | None]:
    """--model; None is the demo's target."""
    return flags.DEFINE_string(
        "model", None, "Target: a folder in Hugging Face format, or a hub id. Default: the demo."
    )


def define_adapter() -> flags.FlagHolder[str | None]:
    """--adapter; None is the one that comes with the package."""
    return flags.DEFINE_string(
        "adapter",
        None,
        "Adapter of --model: a folder that train.py wrote, or the authors' PyTorch one. Default: the one that comes "
        "with the package for --model.",
    )


def define_dtype(
    kinds: Sequence[str] = ("float32", "bfloat16"), default: str | None = None
) -> flags.FlagHolder[str | None]:
    """--dtype; without a default of its own, None is for `load_target_of` to decide."""
    rule = default or "float32 on CPU and for the demo, else bfloat16"
    return flags.DEFINE_enum("dtype", default, list(kinds), f"Type of the weights. Default: {rule}.")


def define_weights() -> flags.FlagHolder[str]:
    """--weights."""
    return flags.DEFINE_enum("weights", "float", WEIGHTS, "int8: matrices are rounded when they are loaded.")


def define_prompt_count(default: int) -> flags.FlagHolder[int]:
    """--prompts as a number."""
    return flags.DEFINE_integer("prompts", default, "Number of prompts: held-out code, or questions for a chat model.")


def define_prompt_file(default: str) -> flags.FlagHolder[str | None]:
    """--prompts as a file; `default` says which prompts are taken without it."""
    return flags.DEFINE_string("prompts", None, f'JSON Lines with a "prompt" each. Default: {default}.')


def define_max_new_tokens() -> flags.FlagHolder[int]:
    """--max_new_tokens."""
    return flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")


def define_runs(default: int = 3) -> flags.FlagHolder[int]:
    """--runs."""
    return flags.DEFINE_integer("runs", default, "Timed runs of each, interleaved; the median counts.")


@dataclasses.dataclass(frozen=True)
class DraftFlags:
    """gamma and eta in place of those of the adapter's decode.json. An eta goes before deciding how far to draft."""

    max_draft_len: flags.FlagHolder[int | None]
    threshold: flags.FlagHolder[float | None]

    def given(self) -> dict[str, Any]:
        """The settings that were given.

        Raises:
          InputError: for a value out of range.
        """
        values = {"max_draft_len": self.max_draft_len.value, "threshold": self.threshold.value}
        values = {name: value for name, value in values.items() if value is not None}
        DraftConfig(**values)
        return values

    def over(self, written: DraftConfig) -> DraftConfig:
        """`written` with what was given."""
        given = self.given()
        return dataclasses.replace(written, **given, **({"decide": None} if "threshold" in given else {}))


def define_draft() -> DraftFlags:
    """--max_draft_len and --threshold, of one setting."""
    return DraftFlags(
        flags.DEFINE_integer("max_draft_len", None, "gamma. Default: that of the adapter's decode.json, else 6."),
        flags.DEFINE_float("threshold", None, "eta. Default: that of the adapter's decode.json, else 0.6."),
    )


def define_thresholds(default: Sequence[str]) -> flags.FlagHolder[list[str]]:
    """--threshold as a list."""
    return flags.DEFINE_list("threshold", list(default), "etas, separated by commas.")


@dataclasses.dataclass(frozen=True)
class TreeFlags:
    """Trees of every K with every budget."""

    topk: flags.FlagHolder[list[str] | None]
    budget: flags.FlagHolder[list[str] | None]

    def shapes(self, topks: Sequence[int] = (), budgets: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """Ks and budgets, ascending; no trees if either is empty. The arguments are the values of flags not given.

        Raises:
          InputError: for a value that is not a whole number above 0.
        """
        found_topks, found_budgets = _or_default(self.topk, topks), _or_default(self.budget, budgets)
        return (found_topks, found_budgets) if found_topks and found_budgets else ([], [])


def _or_default(flag: flags.FlagHolder[list[str] | None], default: Sequence[int]) -> list[int]:
    if flag.value is None:
        return list(default)
    return sorted(set(counts(flag))) if flag.value else []


def define_trees(topk: Sequence[int] | None, budget: Sequence[int] | None, default: str = "") -> TreeFlags:
    """--tree_topk and --tree_budget. With None, the command passes its defaults to `shapes`; `default` names them."""
    return TreeFlags(
        flags.DEFINE_list(
            "tree_topk", _texts(topk), f"Ks of the trees, separated by commas; no trees if empty.{default}"
        ),
        flags.DEFINE_list("tree_budget", _texts(budget), "Their budgets, separated by commas; no trees if empty."),
    )


def _texts(values: Sequence[int] | None) -> list[str] | None:
    return None if values is None else [str(value) for value in values]


def check_positive(*holders: flags.FlagHolder[int | None]) -> None:
    """Raises `InputError` for a value below 1; None is allowed."""
    for flag in holders:
        if flag.value is not None and flag.value < 1:
            raise InputError(f"--{flag.name}: expected at least 1, found {flag.value}")


def counts(flag: flags.FlagHolder[list[str]]) -> list[int]:
    """The whole numbers above 0 of a list, or `InputError`."""
    if not flag.value or not all(value.isdecimal() and int(value) > 0 for value in flag.value):
        raise InputError(f"--{flag.name}: expected whole numbers above 0, found {','.join(flag.value or [])!r}")
    return [int(value) for value in flag.value]


def numbers(flag: flags.FlagHolder[list[str]]) -> list[float]:
    """The numbers of a list, or `InputError`."""
    try:
        return [float(value) for value in flag.value]
    except ValueError:
        raise InputError(
            f"--{flag.name}: expected numbers separated by commas, found {','.join(flag.value)!r}"
        ) from None


def encoded_prompts(target: Target, texts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
    """Token ids of each text; of a chat model, of a user's turn with it. `InputError` for a target without a tokenizer,
    or a text that does not fit with its answer."""
    chat = is_chat(target)
    prompts = [user_turn(text) if chat else text for text in texts]
    return encode_prompts(target, prompts, max_new_tokens, None)


def texts_for(target: Target, modules: Callable[[], Sequence[str]], count: int | None = None) -> Sequence[str]:
    """What is measured with where no file of prompts is given, at most `count` of it: questions for a chat model, else
    library code, which `modules` reads."""
    return (CHAT_PROMPTS if is_chat(target) else modules())[:count]


def is_chat(target: Target) -> bool:
    """Whether a target's prompts are users' turns."""
    return target.tokenizer is not None and bool(target.tokenizer.chat_template)
