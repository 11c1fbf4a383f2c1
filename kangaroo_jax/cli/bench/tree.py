"""Trees of several widths and budgets beside the single sequence: accept length and speed.

    python -m kangaroo_jax.bench tree                                             the demo
    python -m kangaroo_jax.bench tree --model=... --adapter=... --tree_topk=10 --tree_budget=16,32 --threshold=0.1,0.4

Every setting decodes the same prompts, interleaved, with the single sequence (the adapter's own settings first,
with the paper's eta where they are a tree's, then the given thresholds) and plain decoding among them. Prints a row per
setting; all are at one gamma.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax import compilation_cache
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.benchmark_prompts import held_out_prompts, prompts_of_file
from kangaroo_jax.bench.tree_speed import SettingSpeed, compare_settings, settings_to_compare, single_sequence
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.bench.printing import TREE_COLUMNS, progress_bar, tree_columns
from kangaroo_jax.cli.models import load_adapter_of, load_target_of

_MODEL = shared_flags.define_model()
_ADAPTER = shared_flags.define_adapter()
_PROMPTS = shared_flags.define_prompt_file("ten held-out modules")
_DTYPE = shared_flags.define_dtype()
_MAX_NEW_TOKENS = shared_flags.define_max_new_tokens()
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", None, "gamma of all. Default: decode.json's, else 6.")
_TREES = shared_flags.define_trees((2, 3, 4), (8, 12, 16))
_THRESHOLD = shared_flags.define_thresholds(["0.05", "0.1", "0.2"])
_RUNS = shared_flags.define_runs()


def main() -> None:
    shared_flags.check_positive(_MAX_NEW_TOKENS, _MAX_DRAFT_LEN, _RUNS)
    topks, budgets = _TREES.shapes()
    thresholds = shared_flags.numbers(_THRESHOLD)
    texts = prompts_of_file(_PROMPTS.value) if _PROMPTS.value else None
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value)
    texts = texts or shared_flags.texts_for(target, lambda: list(held_out_prompts(10).values()), 10)
    dtype = str(target.model.dtype)
    adapter = load_adapter_of(target, _ADAPTER.value)
    single = single_sequence(adapter.draft, _MAX_DRAFT_LEN.value)
    settings = settings_to_compare(single, topks, budgets, thresholds)
    prompts = shared_flags.encoded_prompts(target, texts, _MAX_NEW_TOKENS.value)
    count = _MAX_NEW_TOKENS.value
    print(machine.describe())
    print(f"{len(prompts)} prompts, gamma {single.max_draft_len}, {count} new tokens, {dtype}, greedy")
    _print(compare_settings(target, adapter, prompts, settings, count, _RUNS.value, progress_bar))
    if dtype != "float32":
        print(f"in {dtype}, passes of different width round differently, so near-ties can fall either way")


def _print(rows: list[SettingSpeed]) -> None:
    print(
        f"{TREE_COLUMNS}{'eta':>6}{'accept length':>15}{'over single':>13}{'steps':>7}{'ms a round':>12}"
        f"{'over single':>13}{'over plain':>12}  identical"
    )
    single = rows[0]
    for row in rows:
        print(
            f"{tree_columns(row.draft)}{row.draft.threshold:6.2f}{row.accept_length:15.2f}"
            f"{row.accept_length / single.accept_length - 1:13.0%}{row.draft_steps:7.2f}"
            f"{row.seconds / row.rounds * 1e3:12.2f}{single.seconds / row.seconds:13.2f}"
            f"{row.plain_seconds / row.seconds:12.2f}  {row.identical} of {row.prompts}"
        )
