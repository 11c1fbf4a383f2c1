"""Finds the fastest way to draft with an adapter on this machine, and writes it beside the adapter, where decode.py
finds it: gamma and eta of a single sequence, alone or with look-ups, or of a tree with its K and budget.

    python -m kangaroo_jax.bench tune                                            the demo
    python -m kangaroo_jax.bench tune --model=... --adapter=... --prompts=prompts.jsonl
    python -m kangaroo_jax.bench tune --tree_topk=4,10 --tree_budget=16,32,64     other trees; --tree_topk= for none
    python -m kangaroo_jax.bench tune --machine=v5e:1x1          for a machine that is not here

Measures what rounds cost and records what the target accepts on calibration prompts; from these predicts the speed of
every gamma and eta, of a single sequence, with every look-up and of every tree. Predictions are corrected by the ratio
of measured to predicted speed of one setting. Measures the best few of each kind by decoding with them, and writes the
fastest to `decode.json` in the adapter's folder. Unless that is a tree, with the costs of rounds at each of
--batch_sizes, by which sequences then decide how far to draft; and says from which batch size on drafting does not pay.
With several --adapter flags (of other exit layers, say) each gets its own, and the fastest is named.

With --machine, what the target accepts is recorded here, and what rounds cost is predicted for that machine
(docs/preflight.md); nothing is measured, and nothing written without --write.
"""

from __future__ import annotations

import jax
from absl import flags

from kangaroo_jax import compilation_cache
from kangaroo_jax.bench import machine, parts
from kangaroo_jax.bench.benchmark_prompts import held_out_prompts, prompts_of_file
from kangaroo_jax.bench.predicted_tuning import There
from kangaroo_jax.bench.tuning import Effort, Tuning, settings_of_trees, tune
from kangaroo_jax.checkpoint.adapter import write_draft_settings
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.bench.predicted_tune import find_machine, print_tuning
from kangaroo_jax.cli.bench.printing import (
    LOOKUP_COLUMN,
    TREE_COLUMNS,
    lookup_column,
    lookup_note,
    progress_bar,
    tree_columns,
)
from kangaroo_jax.cli.models import load_adapter_of, load_target_of
from kangaroo_jax.errors import InputError

_MODEL = shared_flags.define_model()
_ADAPTER = flags.DEFINE_multi_string(
    "adapter",
    [],
    "Folder of an adapter of --model; may be given several times. Default: the one that comes with the package.",
)
_PROMPTS = shared_flags.define_prompt_file("questions for a chat model, else held-out library modules")
_DTYPE = shared_flags.define_dtype()
_WEIGHTS = shared_flags.define_weights()
_MAX_NEW_TOKENS = shared_flags.define_max_new_tokens()
_CONFIRM = flags.DEFINE_integer(
    "confirm",
    3,
    "Settings to measure: this many of the best predicted single sequences, the best with as many look-ups, and the "
    "best of as many trees. With --machine, to show.",
)
_TREES = shared_flags.define_trees(None, None, " Default of both: 2,3,4 and 8,12,16 on CPU, else 4,10 and 16,32,64.")
_BATCH_SIZES = flags.DEFINE_list("batch_sizes", ["1", "8"], "Batch sizes at which the costs of rounds are measured.")
_RUNS = shared_flags.define_runs()
_WRITE = flags.DEFINE_bool("write", None, "Write decode.json. Default: where costs are measured, not predicted.")
_MACHINE = flags.DEFINE_string(
    "machine",
    None,
    "Predict for this machine, which need not be attached: one TPU, such as v5e:1x1, or one GPU, such as h100. Needs "
    "its compiler (docs/preflight.md). Default: measure on this one.",
)


def main() -> None:
    shared_flags.check_positive(_MAX_NEW_TOKENS, _CONFIRM, _RUNS)
    sizes = tuple(shared_flags.counts(_BATCH_SIZES))
    if _MACHINE.value is not None and _WEIGHTS.value != "float":
        raise InputError("--machine predicts costs of float weights alone; leave --weights out")
    there = None if _MACHINE.value is None else find_machine(_MACHINE.value)
    on_cpu = there is None and jax.default_backend() == "cpu"
    topks, budgets = _TREES.shapes(*(((2, 3, 4), (8, 12, 16)) if on_cpu else ((4, 10), (16, 32, 64))))
    # The first ten held-out modules are for the other benchmarks.
    texts = prompts_of_file(_PROMPTS.value) if _PROMPTS.value else None
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value, weights=_WEIGHTS.value)
    texts = texts or shared_flags.texts_for(target, lambda: list(held_out_prompts(100).values())[10:])
    adapters = [load_adapter_of(target, path) for path in _ADAPTER.value or [None]]
    prompts = shared_flags.encoded_prompts(target, texts, _MAX_NEW_TOKENS.value)
    trees = settings_of_trees(topks, budgets)
    print(machine.describe())
    print(f"{len(prompts)} calibration prompts, {_MAX_NEW_TOKENS.value} new tokens, {target.model.arithmetic}, greedy")
    if there is not None:
        # As decode.py loads it there.
        dtype_there = _DTYPE.value or ("float32" if _MODEL.value is None else "bfloat16")
        place = There(there, dtype_there, max(map(len, prompts)), _MAX_NEW_TOKENS.value)
        for adapter in adapters:
            print_tuning(place, target, adapter, prompts, trees, _CONFIRM.value, sizes, write=bool(_WRITE.value))
        return
    effort = Effort(_MAX_NEW_TOKENS.value, _RUNS.value, _CONFIRM.value, sizes)
    best = {}
    for adapter in adapters:
        exit_layer = parts.exit_layer_of(target, adapter)
        print(f"\n{adapter.name}, exit layer {exit_layer}")
        tuning = tune(target, adapter, exit_layer, prompts, trees, effort, progress_bar)
        _print(tuning)
        best[adapter.name] = max(tuning.fastest.measured, tuning.deciding)
        if _WRITE.value is not False:
            print(f"wrote {write_draft_settings(adapter.name, tuning.draft(machine.name()))}")
    if len(best) > 1:
        path = max(best, key=best.get)
        print(f"fastest: {path}, {best[path]:.2f} times plain decoding")


def _print(tuning: Tuning) -> None:
    print(
        f"with {tuning.reference}, decoding is {tuning.correction:.2f} times as fast as predicted from rounds timed "
        "alone; the predictions below are multiplied by that"
    )
    print(
        f"{TREE_COLUMNS}{LOOKUP_COLUMN}{'gamma':>7}{'eta':>6}{'accept length':>15}{'steps':>7}{'predicted':>11}"
        f"{'measured':>10}{'off':>6}"
    )
    for setting in tuning.settings:
        draft = setting.draft
        print(
            f"{tree_columns(draft)}{lookup_column(draft)}{draft.max_draft_len:7}{draft.threshold:6.2f}"
            f"{setting.accept_length:15.2f}{setting.draft_steps:7.2f}{setting.predicted:11.2f}{setting.measured:10.2f}"
            f"{setting.predicted / setting.measured - 1:6.0%}"
        )
    print(lookup_note([setting.draft for setting in tuning.settings]))
    print(
        f"where each sequence decides how far to draft, the best predicted setting without a tree has "
        f"{tuning.deciding:.2f}, and with gamma and eta {tuning.beside:.2f}"
    )
    for size, (draft, speed) in tuning.batches.items():
        print(f"batch {size}: the best of a single sequence is predicted to be gamma {draft.max_draft_len}, ", end="")
        print(f"eta {draft.threshold}, {speed:.2f} times plain decoding")
    ends = min((size for size, (_, speed) in tuning.batches.items() if speed <= 1), default=None)
    print("drafting pays at each of these" if ends is None else f"drafting does not pay from batch {ends} on")
