"""Adapters of one target beside each other: how many tokens a round of each commits.

    python -m kangaroo_jax.bench adapters --adapters=runs/a,runs/b --model=...

Greedy, on held-out prompts, at the same gamma and etas for all. Prints a row per adapter.
"""

from __future__ import annotations

from absl import flags
from tqdm import tqdm

from kangaroo_jax import compilation_cache
from kangaroo_jax.bench import machine
from kangaroo_jax.bench.adapter_comparison import compare_adapters
from kangaroo_jax.bench.benchmark_prompts import held_out_functions
from kangaroo_jax.cli.bench import shared_flags
from kangaroo_jax.cli.bench.printing import progress_bar
from kangaroo_jax.cli.models import load_adapter_of, load_target_of

_MODEL = shared_flags.define_model()
_ADAPTERS = flags.DEFINE_list(
    "adapters", [], "Folders of adapters, separated by commas. Default: the one that comes with the package."
)
_PROMPTS = shared_flags.define_prompt_count(32)
_MAX_NEW_TOKENS = shared_flags.define_max_new_tokens()
_MAX_DRAFT_LEN = flags.DEFINE_integer("max_draft_len", 6, "gamma.")
_THRESHOLD = shared_flags.define_thresholds(["0", "0.3"])
_DTYPE = shared_flags.define_dtype()


def main() -> None:
    shared_flags.check_positive(_PROMPTS, _MAX_NEW_TOKENS, _MAX_DRAFT_LEN)
    thresholds = shared_flags.numbers(_THRESHOLD)
    compilation_cache.enable()
    target = load_target_of(_MODEL.value, _DTYPE.value)
    dtype = str(target.model.dtype)
    adapters = [load_adapter_of(target, path) for path in _ADAPTERS.value or [None]]
    prompts = shared_flags.encoded_prompts(
        target,
        shared_flags.texts_for(target, lambda: held_out_functions(_PROMPTS.value), _PROMPTS.value),
        _MAX_NEW_TOKENS.value,
    )
    print(machine.describe())
    print(f"{len(prompts)} prompts, {_MAX_NEW_TOKENS.value} new tokens, gamma {_MAX_DRAFT_LEN.value}, {dtype}, greedy")
    columns = "".join(f"{f'accept at eta {eta:g}':>20}" for eta in thresholds)
    print(f"{'adapter':32}{'exit layer':>12}{columns}")
    rows = compare_adapters(
        target, adapters, prompts, _MAX_NEW_TOKENS.value, _MAX_DRAFT_LEN.value, thresholds, progress_bar
    )
    for row in rows:
        cells = "".join(f"{row.accept_lengths[eta]:20.3f}" for eta in thresholds)
        tqdm.write(f"{row.adapter.name:32}{row.adapter.exit_layer:12}{cells}")
