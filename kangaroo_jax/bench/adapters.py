"""Adapters of one target beside each other: how many tokens a round of each commits.

    python -m kangaroo_jax.bench adapters --adapters=runs/a,runs/b --model=...

Greedy, on held-out prompts, at the same gamma and eta for all. Prints a row per adapter.
"""

from __future__ import annotations

import jax
from absl import flags
from tqdm import tqdm

from kangaroo_jax import DraftConfig, compilation_cache, demo, generate, load_adapter, load_target
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.prompts import held_out_functions
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", str(demo.MODEL), "Target of all adapters.")
_ADAPTERS = flags.DEFINE_list("adapters", [str(demo.ADAPTER)], "Their folders, separated by commas.")
_PROMPTS = flags.DEFINE_integer("prompts", 32, "Held-out prompts.", lower_bound=1)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", 6, "gamma.")
_THRESHOLD = flags.DEFINE_list("threshold", ["0", "0.3"], "etas.")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")


def main() -> None:
    try:
        thresholds = [float(value) for value in _THRESHOLD.value]
    except ValueError:
        raise InputError(f"--threshold: expected numbers, found {','.join(_THRESHOLD.value)!r}") from None
    compilation_cache.enable()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    target = load_target(_MODEL.value, dtype)
    adapters = [load_adapter(path, target) for path in _ADAPTERS.value]
    prompts = [target.tokenizer.encode(text) for text in held_out_functions(_PROMPTS.value)]
    print(machine.describe())
    print(f"{len(prompts)} prompts, {_MAX_NEW_TOKENS.value} new tokens, gamma {_MAX_DRAFT_LEN.value}, {dtype}, greedy")
    columns = "".join(f"{f'accept at eta {eta:g}':>20}" for eta in thresholds)
    print(f"{'adapter':32}{'exit layer':>12}{columns}")
    for adapter in tqdm(adapters, unit="adapter", leave=False):
        accepts = []
        for threshold in thresholds:
            draft = DraftConfig(adapter.exit_layer, _MAX_DRAFT_LEN.value, threshold)
            results = [
                generate(target, adapter, [prompt], _MAX_NEW_TOKENS.value, draft, eos_token_ids=()).accept_lengths[0]
                for prompt in prompts
            ]
            accepts.append(sum(map(sum, results)) / sum(map(len, results)))
        row = "".join(f"{accept:20.3f}" for accept in accepts)
        tqdm.write(f"{adapter.name:32}{adapter.exit_layer:12}{row}")
