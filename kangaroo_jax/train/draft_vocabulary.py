"""Which tokens to draft from: how often the training data has each, and how many are best.

A draft step reads the LM head's rows of the tokens that can be drafted. Fewer tokens make it cheaper, and end a draft
wherever the target's own token is not among them. `predicted_speed` weighs one against the other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Int, PyTree

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import AdapterConfig, DraftConfig, TrainConfig
from kangaroo_jax.data.cache import TokenCache
from kangaroo_jax.data.input import Rows
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kinds import abstract_adapter

# The chance that a trained adapter's draft is the target's token, where it can be drafted: it is not known before
# training.
_ACCEPTANCE = 0.7


@dataclasses.dataclass(frozen=True)
class StepBytes:
    """Bytes of the weights that decoding reads.

    Attributes:
      shallow: of the shallow layers.
      deep: of the deep layers and the final norm.
      adapter: of the adapter.
      head_row: of one token's row of the LM head.
    """

    shallow: int
    deep: int
    adapter: int
    head_row: int

    @classmethod
    def of(cls, target: Target, exit_layer: int, adapter: AdapterConfig) -> StepBytes:
        model = target.model
        layers = [_nbytes(layer) for layer in model.layers]
        head = _nbytes(model.embed_tokens if model.lm_head is None else model.lm_head)
        return cls(
            shallow=sum(layers[:exit_layer]),
            deep=sum(layers[exit_layer:]) + _nbytes(model.norm),
            adapter=_nbytes(abstract_adapter(target.config, model.dtype, adapter)),
            head_row=head // target.config.vocab_size,
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """A draft vocabulary, and how good it is.

    Attributes:
      token_ids: its tokens, ascending.
      coverage: the share of the held-out tokens that are among them.
      speed: `predicted_speed`, over that with all tokens.
    """

    token_ids: Int[np.ndarray, " drafted"]
    coverage: float
    speed: float


def check_setting(setting: str, config: ModelConfig) -> int | None:
    """The size that `TrainConfig.draft_vocabulary` names; 0: all tokens; None: "auto".

    Raises:
      InputError: for one that a target with `config` does not have.
    """
    if setting == "auto":
        return None
    if int(setting) >= config.vocab_size:
        raise InputError(
            f"draft_vocabulary: expected less than {config.vocab_size}, the target's vocabulary, or 0 for all of it; "
            f"found {setting}"
        )
    return int(setting)


def choose_for_run(config: TrainConfig, target: Target, training: Rows, held_out: Rows) -> Choice | None:
    """The draft vocabulary of a run: the most frequent tokens of its training data. None means all tokens.

    Args:
      config: of the run.
      target: of the run.
      training: rows that are trained on.
      held_out: rows that are not.

    Raises:
      InputError: for a size that is out of range.
    """
    size, vocab_size = check_setting(config.draft_vocabulary, target.config), target.config.vocab_size
    if size == 0:
        return None
    counts, unseen = (count_tokens(rows.cache, vocab_size, rows.records) for rows in (training, held_out))
    ranked = _ranked(counts, target.eos_token_ids)
    parts = StepBytes.of(target, config.exit_layer, config.adapter)
    if size is None:
        size = best_size(ranked, unseen, parts, len(target.eos_token_ids))
        if size == vocab_size:
            return None
    token_ids = choose(counts, size, target.eos_token_ids)
    coverage = float(unseen[token_ids].sum() / unseen.sum())
    speed = predicted_speed(size, coverage, vocab_size, parts) / predicted_speed(vocab_size, 1.0, vocab_size, parts)
    return Choice(token_ids, coverage, speed)


def count_tokens(cache: TokenCache, vocab_size: int, records: Sequence[int] | None = None) -> Int[np.ndarray, " vocab"]:
    """How often each token follows a position that counts in the loss, in the given records; in all by default."""
    counts = np.zeros(vocab_size, np.int64)
    starts, lengths = cache.starts, cache.lengths
    for record in range(len(cache)) if records is None else records:
        start, length = starts[record], lengths[record]
        tokens = cache.tokens(record)
        run = np.searchsorted(cache.counted[:, 1], start, side="right")
        while run < len(cache.counted) and cache.counted[run, 0] < start + length:
            first, end = cache.counted[run] - start
            counts += np.bincount(tokens[max(first, 0) + 1 : min(end, length) + 1], minlength=vocab_size)
            run += 1
    return counts


def choose(counts: Int[np.ndarray, " vocab"], size: int, always: tuple[int, ...]) -> Int[np.ndarray, " size"]:
    """The `size` most frequent tokens, ascending; `always` are among them, and of two equally frequent
    tokens the lower id comes first.

    Raises:
      InputError: for a size that is not between the number of `always` and the vocabulary's size.
    """
    if not len(always) < size < len(counts):
        raise InputError(
            f"draft vocabulary: expected more than {len(always)} and less than {len(counts)} tokens, found {size}"
        )
    return np.sort(_ranked(counts, always)[:size])


def _ranked(counts: Int[np.ndarray, " vocab"], always: tuple[int, ...]) -> Int[np.ndarray, " vocab"]:
    """All tokens, from the most frequent to the least; `always` come first."""
    ranked = counts.astype(np.float64)
    ranked[list(always)] = np.inf
    return np.argsort(-ranked, kind="stable")


def best_size(
    ranked: Int[np.ndarray, " vocab"], held_out: Int[np.ndarray, " vocab"], parts: StepBytes, least: int
) -> int:
    """The number of tokens with the highest predicted speed, the smallest of equals: a power of two, or one and a half
    times one, above `least`; or all.

    Args:
      ranked: all tokens, in the order in which a draft vocabulary takes them.
      held_out: how often held-out data has each token.
      parts: of the target and its adapter.
      least: tokens that a draft vocabulary has in any case.
    """
    vocab_size = len(ranked)
    powers = [2**i for i in range(vocab_size.bit_length())]
    sizes = sorted({size for power in powers for size in (power, 3 * power // 2) if least < size < vocab_size})
    covered = np.cumsum(held_out[ranked]) / held_out.sum()
    return max([*sizes, vocab_size], key=lambda size: predicted_speed(size, covered[size - 1], vocab_size, parts))


def predicted_speed(size: int, coverage: float, vocab_size: int, parts: StepBytes) -> float:
    """The speed of decoding one sequence with a draft vocabulary of `size` tokens, over that of plain decoding.

    A prediction, by which sizes are compared:

      - A step takes as long as reading its weights. A plain step reads P = `shallow + deep + vocab_size * head_row`
        bytes, a draft step D = `shallow + adapter + size * head_row`, and a round of K drafts K D + P.
      - A draft is accepted with the same chance a at each place: `coverage`, as the target's token must be among those
        that can be drafted, times 0.7, for an adapter that is trained. So a round commits 1 + a + ... + a^K tokens.
      - K is the best of 1 to 6 (the paper's gamma).

    So the speed is the maximum over K of (1 + a + ... + a^K) P / (K D + P). Left out: caches, and that verification of
    several positions takes longer than a plain step. Neither depends on `size`.

    Args:
      size: tokens that can be drafted.
      coverage: share of held-out tokens that are among them.
      vocab_size: of the target.
      parts: of the target and its adapter.
    """
    plain = parts.shallow + parts.deep + vocab_size * parts.head_row
    draft_step = parts.shallow + parts.adapter + size * parts.head_row
    accepted = _ACCEPTANCE * coverage
    return max(
        sum(accepted**i for i in range(drafts + 1)) * plain / (drafts * draft_step + plain)
        for drafts in range(1, DraftConfig().max_draft_len + 1)
    )


def _nbytes(tree: PyTree) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
