"""Trees of several widths and budgets beside the single sequence: accept length and speed.

Every setting decodes the same prompts, interleaved, with plain decoding among them. Greedy; EOS ends nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import numpy as np

from kangaroo_jax import DraftConfig, Generation, TreeConfig, generate, generate_plain
from kangaroo_jax.bench.interleaved import Timings, time_interleaved
from kangaroo_jax.bench.progress import Progress, silent
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target


@dataclasses.dataclass(frozen=True)
class SettingSpeed:
    """One way of drafting, over all prompts.

    Attributes:
      draft: the setting.
      accept_length: mean tokens committed by a round.
      draft_steps: mean draft steps of a round.
      rounds: number of rounds.
      seconds: decoding, without prefill.
      plain_seconds: of plain decoding.
      identical: prompts whose tokens are plain decoding's.
      prompts: number of prompts.
    """

    draft: DraftConfig
    accept_length: float
    draft_steps: float
    rounds: int
    seconds: float
    plain_seconds: float
    identical: int
    prompts: int


def single_sequence(written: DraftConfig, max_draft_len: int | None) -> DraftConfig:
    """An adapter's settings without a tree, look-ups and deciding: with the paper's eta where the written one is a
    tree's, which compares with the probability of paths; with another gamma if given."""
    threshold = written.threshold if written.tree is None else DraftConfig().threshold
    gamma = written.max_draft_len if max_draft_len is None else max_draft_len
    return dataclasses.replace(written, max_draft_len=gamma, threshold=threshold, tree=None, lookup=None, decide=None)


def settings_to_compare(
    single: DraftConfig, topks: Sequence[int], budgets: Sequence[int], thresholds: Sequence[float]
) -> list[DraftConfig]:
    """`single`, the single sequence with each of the other thresholds, and every tree with every threshold."""
    others = [dataclasses.replace(single, threshold=eta) for eta in thresholds if eta != single.threshold]
    trees = [
        dataclasses.replace(single, threshold=eta, tree=TreeConfig(topk, budget))
        for topk, budget, eta in itertools.product(topks, budgets, thresholds)
    ]
    return [single, *others, *trees]


def compare_settings(
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[list[int]],
    settings: Sequence[DraftConfig],
    max_new_tokens: int,
    runs: int,
    progress: Progress = silent,
) -> list[SettingSpeed]:
    """A row per setting; `prompts` are token ids."""
    timings = time_settings(target, adapter, prompts, settings, max_new_tokens, runs, progress, "decoding")
    plain, *others = timings.outputs
    plain_seconds, *seconds = timings.seconds.sum(axis=1).tolist()
    rows = []
    for draft, outputs, total in zip(settings, others, seconds, strict=True):
        lengths = [length for out in outputs for length in out.accept_lengths[0]]
        steps = [length for out in outputs for length in out.draft_lengths[0]]
        identical = sum(out.tokens == reference.tokens for out, reference in zip(outputs, plain, strict=True))
        rows.append(
            SettingSpeed(
                draft,
                float(np.mean(lengths)),
                float(np.mean(steps)),
                len(lengths),
                total,
                plain_seconds,
                identical,
                len(prompts),
            )
        )
    return rows


def time_settings(
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[list[int]],
    settings: Sequence[DraftConfig],
    max_new_tokens: int,
    runs: int,
    progress: Progress,
    description: str,
) -> Timings[Generation]:
    """Decoding without prefill: plainly (the first call), then with each setting."""

    def plain(ids: list[int]) -> Generation:
        return generate_plain(target, [ids], max_new_tokens, eos_token_ids=())

    def drafting(draft: DraftConfig, ids: list[int]) -> Generation:
        return generate(target, adapter, [ids], max_new_tokens, draft, eos_token_ids=())

    calls = [plain, *(functools.partial(drafting, draft) for draft in settings)]
    return time_interleaved(calls, prompts, runs, lambda out: out.seconds.decode, progress, description)
