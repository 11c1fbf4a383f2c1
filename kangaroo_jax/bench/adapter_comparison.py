"""Adapters of one target beside each other: how many tokens a round of each commits, at the same gamma and etas."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from kangaroo_jax import DraftConfig, generate
from kangaroo_jax.bench.progress import Progress, silent
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target


@dataclasses.dataclass(frozen=True)
class AdapterAcceptance:
    """One adapter's mean accept lengths, by eta."""

    adapter: TrainedAdapter
    accept_lengths: dict[float, float]


def compare_adapters(
    target: Target,
    adapters: Sequence[TrainedAdapter],
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    max_draft_len: int,
    thresholds: Sequence[float],
    progress: Progress = silent,
) -> Iterator[AdapterAcceptance]:
    """Decodes every prompt greedily with every adapter and eta; EOS does not end an answer.

    Args:
      target: of all adapters.
      adapters: to compare.
      prompts: token ids.
      max_new_tokens: length of each answer.
      max_draft_len: gamma.
      thresholds: etas.
      progress: shows how many adapters are done.
    """
    for adapter in progress(adapters, "decoding", "adapter"):
        means = {}
        for threshold in thresholds:
            draft = DraftConfig(adapter.exit_layer, max_draft_len, threshold)
            rounds = [
                generate(target, adapter, [prompt], max_new_tokens, draft, eos_token_ids=()).accept_lengths[0]
                for prompt in prompts
            ]
            means[threshold] = sum(map(sum, rounds)) / sum(map(len, rounds))
        yield AdapterAcceptance(adapter, means)
