"""Trees of several widths and budgets beside the single sequence: accept length and speed.

    python -m kangaroo_jax.bench tree                                             the demo
    python -m kangaroo_jax.bench tree --model=... --adapter=... --topk=10 --budget=16,32,64 --threshold=0.1,0.2,0.4

Every setting decodes the same prompts, interleaved, with the single sequence (the adapter's own settings first,
with the paper's eta where they are a tree's, then the given thresholds) and plain decoding among them. Prints a row per
setting; all are at one gamma.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics

import jax
import numpy as np
from absl import flags
from tqdm import tqdm

from kangaroo_jax import (
    DraftConfig,
    TreeConfig,
    compilation_cache,
    demo,
    generate,
    generate_plain,
    load_adapter,
    load_target,
)
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.prompts import held_out_prompts, read_prompts
from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.decode.host_loop import Generation
from kangaroo_jax.errors import InputError

_MODEL = flags.DEFINE_string("model", None, "Target; the demo if absent.")
_ADAPTER = flags.DEFINE_string("adapter", None, "Adapter of --model.")
_PROMPTS = flags.DEFINE_string("prompts", None, 'JSON Lines with a "prompt" each. Ten held-out modules if absent.')
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the weights. float32 on CPU, else bfloat16.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "New tokens per prompt; EOS does not end them.")
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", None, "gamma of all; what decode.json says if absent, else 6.")
_TOPK = flags.DEFINE_list("topk", ["2", "3", "4"], "Ks.")
_BUDGET = flags.DEFINE_list("budget", ["8", "12", "16"], "Budgets.")
_THRESHOLD = flags.DEFINE_list("threshold", ["0.05", "0.1", "0.2"], "etas.")
_RUNS = flags.DEFINE_integer("runs", 3, "Timed runs of each, interleaved; the median counts.")


def main() -> None:
    compilation_cache.enable()
    dtype = _DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    if (_MODEL.value is None) != (_ADAPTER.value is None):
        raise InputError("--model and --adapter belong together; give both, or neither for the demo")
    topks, budgets = (_numbers(flag, int) for flag in (_TOPK, _BUDGET))
    target = load_target(_MODEL.value or str(demo.MODEL), dtype)
    adapter = load_adapter(_ADAPTER.value or str(demo.ADAPTER), target)
    single = DraftOverrides(tree=False).over(adapter.draft)
    if _MAX_DRAFT_LEN.value is not None:
        single = dataclasses.replace(single, max_draft_len=_MAX_DRAFT_LEN.value)
    thresholds = _numbers(_THRESHOLD, float)
    settings = [single, *(dataclasses.replace(single, threshold=eta) for eta in thresholds if eta != single.threshold)]
    settings += [
        dataclasses.replace(single, threshold=eta, tree=TreeConfig(topk, budget))
        for topk, budget, eta in itertools.product(topks, budgets, thresholds)
    ]
    texts = read_prompts(_PROMPTS.value) if _PROMPTS.value else list(held_out_prompts(10).values())
    prompts = [target.tokenizer.encode(text, verbose=False) for text in texts]
    count = _MAX_NEW_TOKENS.value
    print(machine.describe())
    print(f"{len(prompts)} prompts, gamma {single.max_draft_len}, {count} new tokens, {dtype}, greedy")
    calls = [lambda ids: generate_plain(target, [ids], count, eos_token_ids=())]
    calls += [lambda ids, d=d: generate(target, adapter, [ids], count, d, eos_token_ids=()) for d in settings]
    outs, seconds = [[] for _ in calls], np.zeros((len(calls), len(prompts)))
    for place, ids in enumerate(tqdm(prompts, unit="prompt", leave=False)):
        times = [[] for _ in calls]
        for run in range(_RUNS.value + 1):
            for call, out, each in zip(calls, outs, times, strict=True):
                result = call(ids)
                if run:  # the first warms up
                    each.append(result.seconds.decode)
                else:
                    out.append(result)
        seconds[:, place] = [statistics.median(each) for each in times]
    _print(settings, outs, seconds, dtype)


def _numbers(flag: flags.FlagHolder[list[str]], kind: type) -> list[int] | list[float]:
    try:
        return [kind(value) for value in flag.value]
    except ValueError:
        raise InputError(
            f"--{flag.name}: expected numbers separated by commas, found {','.join(flag.value)!r}"
        ) from None


def _print(settings: list[DraftConfig], outs: list[list[Generation]], seconds: np.ndarray, dtype: str) -> None:
    """A row per setting. `seconds` is [1 + settings, prompts], plain decoding first, as in `outs`."""
    print(
        f"{'':8}{'K':>4}{'budget':>8}{'eta':>6}{'accept length':>15}{'over single':>13}{'steps':>7}{'ms a round':>12}"
        f"{'over single':>13}{'over plain':>12}  identical"
    )
    totals = seconds.sum(axis=1)
    reference = None
    for draft, results, time in zip(settings, outs[1:], totals[1:], strict=True):
        lengths = [length for out in results for length in out.accept_lengths[0]]
        steps = [length for out in results for length in out.draft_lengths[0]]
        reference = reference or (np.mean(lengths), time)
        same = sum(out.tokens == plain.tokens for out, plain in zip(results, outs[0], strict=True))
        shape = ("single", "", "") if draft.tree is None else ("tree", draft.tree.topk, draft.tree.budget)
        print(
            f"{shape[0]:8}{shape[1]:>4}{shape[2]:>8}{draft.threshold:6.2f}{np.mean(lengths):15.2f}"
            f"{np.mean(lengths) / reference[0] - 1:13.0%}{np.mean(steps):7.2f}{time / len(lengths) * 1e3:12.2f}"
            f"{reference[1] / time:13.2f}{totals[0] / time:12.2f}  {same} of {len(results)}"
        )
    if dtype != "float32":
        print(f"{dtype} rounds differently by the width of a pass, so near-ties may fall otherwise")
