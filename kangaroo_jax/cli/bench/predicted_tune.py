"""`bench tune --machine`: how to draft on a machine that is not here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kangaroo_jax.bench import parts
from kangaroo_jax.bench.predicted_tuning import PredictedTuning, There, tune_for
from kangaroo_jax.bench.tuning import DRAFT_LENGTHS
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, write_draft_settings
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.cli.bench.printing import (
    LOOKUP_COLUMN,
    TREE_COLUMNS,
    lookup_column,
    lookup_note,
    progress_bar,
    tree_columns,
)
from kangaroo_jax.config import DraftConfig
from kangaroo_jax.errors import InputError
from kangaroo_jax.preflight import machines
from kangaroo_jax.preflight.machines import Machine


def find_machine(name: str) -> Machine:
    """The machine that --machine names: one chip whose limits are known. One of its devices decodes.

    Raises:
      InputError, MachineError: as `machines.find_machine`, and for this machine or several devices.
    """
    if name == machines.LOCAL:
        raise InputError(f"--machine={name}: what rounds cost on this machine is measured; leave the flag out")
    machine = machines.find_machine(name)
    chips = {device.coords for device in machine.devices} if machine.platform == "tpu" else machine.devices
    if len(chips) > 1:
        raise InputError(
            f"--machine={name}: expected one chip, such as v5e:1x1 or h100, found {len(chips)}; what they send each "
            "other is not predicted"
        )
    return machine


def print_tuning(
    there: There,
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[list[int]],
    trees: Sequence[DraftConfig],
    count: int,
    batch_sizes: Sequence[int],
    *,
    write: bool,
) -> None:
    """Tunes one adapter and prints what was found; with `write`, into its decode.json. Arguments as for `tune_for`."""
    exit_layer = parts.exit_layer_of(target, adapter)
    print(f"\n{adapter.name}, exit layer {exit_layer}")
    tuning = tune_for(there, target, adapter, exit_layer, prompts, trees, count, batch_sizes, progress_bar)
    _print_model(there, tuning)
    _print_settings(tuning)
    if write:
        _write(there, adapter, tuning, adapter.model.num_tokens(target.config.vocab_size))


def _print_model(there: There, tuning: PredictedTuning) -> None:
    """What the prediction is made of, and the costs that it gives."""
    machine, limits = there.machine, there.machine.limits
    print(
        f"predicted, not measured, for {machine} in {there.dtype}, context {there.prompt_tokens}: seconds of a part = "
        f"max(bytes / {limits.share * limits.bandwidth / 1e9:.0f} GB/s, "
        f"operations / {limits.products[there.dtype] / 1e12:.0f} TFLOP/s)"
        + (
            f" + {limits.launch * 1e6:.1f} us per kernel + {limits.turn * 1e3:.2f} ms per draft step"
            * bool(limits.turn)
        )
        + " (docs/preflight.md)"
    )
    memory = f" of {machine.memory / 2**30:.2f}" if machine.memory else ""
    print(f"decoding fits: {tuning.peak / 2**30:.2f}{memory} GiB")
    for vocabulary, by_size in tuning.costs.items():
        for size, costs in by_size.items():
            step = costs.draft_step / costs.plain_step
            rounds = ", ".join(f"{n} {costs.rounds[n] / costs.plain_step:.2f}" for n in DRAFT_LENGTHS)
            print(
                f"batch {size}, {vocabulary} tokens to draft: plain step {costs.plain_step * 1e3:.3f} ms; in plain "
                f"steps, a draft step {step:.3f}, a round by its drafts {rounds}"
            )


def _print_settings(tuning: PredictedTuning) -> None:
    print(
        f"{TREE_COLUMNS}{LOOKUP_COLUMN}{'drafted':>9}{'gamma':>7}{'eta':>6}{'accept length':>15}{'steps':>7}"
        f"{'predicted':>11}"
    )
    for setting in tuning.settings:
        draft = setting.draft
        print(
            f"{tree_columns(draft)}{lookup_column(draft)}{setting.vocabulary:9}{draft.max_draft_len:7}{draft.threshold:6.2f}"
            f"{setting.accept_length:15.2f}{setting.draft_steps:7.2f}{setting.predicted:11.2f}"
        )
    print(lookup_note([setting.draft for setting in tuning.settings]))
    best = tuning.best
    print(f"best: {best.draft}, drafts of {best.vocabulary} tokens: {best.predicted:.2f} times plain decoding")
    for size, best in tuning.batches.items():
        draft = best.draft
        print(
            f"batch {size}: the best of a single sequence is gamma {draft.max_draft_len}, eta {draft.threshold}, "
            f"drafts of {best.vocabulary} tokens, {best.predicted:.2f} times plain decoding"
        )
    ends = min((size for size, best in tuning.batches.items() if best.predicted <= 1), default=None)
    print("drafting pays at each of these" if ends is None else f"drafting does not pay from batch {ends} on")


def _write(there: There, adapter: TrainedAdapter, tuning: PredictedTuning, vocabulary: int) -> None:
    """The best setting of the draft vocabulary that the adapter has."""
    settings = [setting for setting in tuning.settings if setting.vocabulary == vocabulary]
    best, name = max(settings, key=lambda setting: setting.predicted), f"{there.machine.name}, predicted"
    if best != tuning.best:
        print(f"the adapter drafts from {vocabulary} tokens: the best setting with these is written")
    draft = best.draft
    if draft.tree is None:
        draft = dataclasses.replace(draft, decide=tuning.decide(vocabulary, name))
    print(f"wrote {write_draft_settings(adapter.name, draft, name)}, for {name}")
