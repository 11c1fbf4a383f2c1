"""Whether a sequence's next round drafts nothing, what was looked up, or with the draft model, and how far.

Each sequence decides from its own past: what its earlier rounds brought, against what rounds cost. Nothing of another
sequence is looked at, so a text depends on its prompt and seed alone; and whatever a sequence has learned, it learned
from random numbers that no later round draws again (`Sampling.of_round`), so that sampling stays exact.

Rates are in tokens per plain step, costs in plain steps: a plain step is worth one token.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kangaroo_jax.config import LookupConfig, RoundCosts

# Drafted tokens are counted by the draft model's confidence in them, in the ranges between these.
_CONFIDENCES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 0.95)
_BUCKETS = len(_CONFIDENCES) + 1
DRAFTED, LOOKED_UP = range(2)  # the kinds of drafts, in this order where arrays have both
# What a kind's earlier rounds count for after each further one. A round brings one token or several by chance: with a
# shorter memory, a few rounds without luck end drafts that pay.
_RECENT = 0.985
_PRIOR = 0.95  # the same for what is expected before a sequence has tried a kind; a probe that fails ends that
# A kind's earlier rounds are taken to have brought so many tokens more than plain steps at most: after so many lost
# ones it is given up, however much it once brought.
_AHEAD = 4.0
_RECENT_TOKENS = 0.97  # the same for tokens by confidence
# What is left of these when a kind is tried again after a pause: less than the one round that is then known. Where that
# one pays, the kind begins as if it had not been tried.
_STALE, _STALE_TOKENS = 0.05, 0.25
_PSEUDO_TOKENS = 2.0  # how many tokens' worth a confidence counts, as an estimate of acceptance
# In plain steps: what first tries may lose of a batch together, the least of each, and how much evidence may stand for
# them at most.
_FIRST_LOSS, _LEAST_LOSS, _MOST_TRUST = 1.0, 0.3, 8.0
# Of looked-up tokens: the chance that one is accepted before a sequence has tried any; how much more their first tries
# may lose, as those that are right bring more; and the share of a look-up that stands behind one that stood completely,
# as text that is copied goes on.
_FOUND, _FOUND_LOSS, _COPIED = 0.7, 1.5, 0.8
# Before anything is known: the share of rounds in which something is found, and in which a sequence drafts. And how
# much of either estimate is left after each further round.
_USUAL_SHARE, _DRAFTING_SHARE, _RECENT_SHARE = 0.15, 0.5, 0.97
# A probe is a round of a kind that has not paid lately. At most one round in so many may be lost to probes; and any
# sequence's probe makes a round of the complete batch longer.
_ONE_LOST_IN = 128
_SHORTEST_PAUSE = 8
# Pauses begin shorter than that, and double while probes do not pay: so many times where few sequences pay for each
# other's, and else so many.
_DOUBLED_ALONE, _DOUBLED, _FEW = 2, 1, 2


@flax.struct.dataclass
class Costs:
    """What rounds cost, and what follows from that alone. Data of a program, not part of it."""

    rounds: Float[Array, " tokens"]  # of a round that verifies so many tokens, and drafts none; the first is unused
    draft_step: Float[Array, ""]
    shallow: Float[Array, ""]  # share of a round that the shallow layers take
    found: Float[Array, ""]  # of a round that looks up
    copied: Float[Array, ""]  # tokens that one brings behind one that stood completely
    slots: Int[Array, ""]
    # A round with drafts costs no less than one with so many: more sequences than a few wait for the longest draft.
    full: Int[Array, ""]
    acceptance: Float[Array, ""]  # of a drafted token, before anything is known
    prior_tokens: Float[Array, " kinds"]  # what a kind of draft is taken to have brought
    prior_steps: Float[Array, " kinds"]  # and cost, before a sequence has tried it
    pause: Int[Array, " kinds"]  # the longest pause between probes, in rounds
    doubled: Int[Array, ""]  # how often the first pause has doubled when it is as long

    @classmethod
    def of(
        cls, costs: RoundCosts, acceptance: float, slots: int, max_draft_len: int, lookup: LookupConfig | None
    ) -> Costs:
        """For an engine.

        Args:
          costs: at the engine's batch size, or one near it.
          acceptance: of a drafted token, before anything is known.
          slots: sequences that are decoded together.
          max_draft_len: gamma; 0 without a draft model.
          lookup: None: nothing is looked up.
        """
        looked_up = 0 if lookup is None else lookup.max_tokens
        widths, steps = zip(*costs.verification, strict=True)
        rounds = np.interp(np.arange(max(max_draft_len, looked_up) + 2), widths, steps)
        if rounds.size > widths[-1] and len(widths) > 1:  # beyond what was measured, on in a straight line
            slope = (steps[-1] - steps[-2]) / (widths[-1] - widths[-2])
            rounds += np.maximum(np.arange(len(rounds)) - widths[-1], 0) * max(slope, 0.0)
        committed = np.cumsum(acceptance ** np.arange(len(rounds)))  # tokens, with so many drafts
        full = max_draft_len if slots > _FEW else 0
        lengths = range(max(1, full), max_draft_len + 1)
        drafted = [(committed[k], rounds[k + 1] + k * costs.draft_step) for k in lengths]
        found = rounds[looked_up + 1] + costs.shallow * (rounds[looked_up + 1] - rounds[1])
        kinds = [
            max(drafted, key=lambda kind: kind[0] / kind[1], default=(1.0, 1.0)),
            (np.sum(_FOUND ** np.arange(looked_up + 1)), found),
        ]
        # So that first tries are given up after about the same loss, whether a round costs little more than a plain
        # step or much. Where nothing is expected of a kind, one round that brings something is to count for more.
        gains = [tokens * rounds[1] / steps - 1 for tokens, steps in kinds]
        may_lose = max(_LEAST_LOSS, _FIRST_LOSS / slots)
        weights = [
            min(_MOST_TRUST, may_lose * more / max(1e-3, gain)) if gain > 0 else 1.0
            for gain, more in zip(gains, (1.0, _FOUND_LOSS), strict=True)
        ]
        losses = (rounds[min(2, len(rounds) - 1)] + costs.draft_step - rounds[1], found - rounds[1])
        pauses = [min(1 << 20, max(_SHORTEST_PAUSE, math.ceil(_ONE_LOST_IN * slots * loss))) for loss in losses]
        return cls(
            rounds=np.asarray(rounds, np.float32),
            draft_step=np.float32(costs.draft_step),
            shallow=np.float32(costs.shallow),
            found=np.float32(found),
            copied=np.float32(_COPIED * (looked_up + 1)),
            slots=np.int32(slots),
            full=np.int32(full),
            acceptance=np.float32(acceptance),
            prior_tokens=np.asarray([w * x[0] / x[1] for w, x in zip(weights, kinds, strict=True)], np.float32),
            prior_steps=np.asarray(weights, np.float32),
            pause=np.asarray(pauses, np.int32),
            doubled=np.int32(_DOUBLED_ALONE if slots <= _FEW else _DOUBLED),
        )


@flax.struct.dataclass
class Pace:
    """What a sequence's own past says about drafting. Before its first round, zeros but for `drafting`."""

    accepted: Float[Array, "batch buckets"]  # drafted tokens by confidence: those that the target accepted,
    seen: Float[Array, "batch buckets"]  # and those that it judged; older ones count less
    tokens: Float[Array, "batch kinds"]  # that rounds of a kind brought,
    steps: Float[Array, "batch kinds"]  # and what they cost; older ones count less
    tries: Int[Array, "batch kinds"]  # rounds of a kind
    since: Int[Array, "batch kinds"]  # rounds since the last one of a kind
    level: Int[Array, "batch kinds"]  # how often the pause has doubled
    rounds: Int[Array, " batch"]  # in which it looked for something to look up,
    share: Float[Array, " batch"]  # and the share of them that found something; older ones count less
    drafting: Float[Array, " batch"]  # the share of its rounds in which it drafted; older ones count less
    copying: Bool[Array, " batch"]  # whether the last round looked up, and all of that stood
    behind: Int[Array, " batch"]  # positions below n that the draft model may not have seen

    @classmethod
    def fresh(cls, batch: int) -> Pace:
        def zeros(dtype: jnp.dtype, *shape: int) -> Array:
            return jnp.zeros((batch, *shape), dtype)

        buckets, kinds = [(jnp.float32, _BUCKETS)] * 2, [(jnp.float32, 2)] * 2 + [(jnp.int32, 2)] * 3
        rest = [(jnp.int32,), (jnp.float32,), (jnp.float32,), (jnp.bool_,), (jnp.int32,)]
        pace = cls(*(zeros(*each) for each in (*buckets, *kinds, *rest)))
        return pace.replace(drafting=pace.drafting + _DRAFTING_SHARE)

    def looked(self, found: Bool[Array, " batch"], going_on: Bool[Array, " batch"]) -> Pace:
        """After a search for something to look up."""
        share = _RECENT_SHARE * self.share + (1 - _RECENT_SHARE) * found
        return self.replace(share=jnp.where(going_on, share, self.share), rounds=self.rounds + going_on)


@flax.struct.dataclass
class Choice:
    """What each sequence's round drafts; nothing where neither is True."""

    drafts: Bool[Array, " batch"]  # with the draft model
    looks_up: Bool[Array, " batch"]  # what was found
    rate: Float[Array, " batch"]  # tokens per plain step that a further draft has to be worth


def decide(
    pace: Pace, costs: Costs, found: Bool[Array, " batch"], going_on: Bool[Array, " batch"], *, may_draft: bool
) -> Choice:
    """The kind of draft that has brought the most for its cost, if that is more than plain steps bring; now and then
    one that has not, to find out whether it does again.

    Args:
      pace: of each sequence, after `looked` where anything is looked up.
      costs: of rounds.
      found: whether there is something to look up.
      going_on: sequences that have a next round.
      may_draft: whether there is a draft model, static.
    """
    drafting, looking_up = _rate_of_drafted(pace, costs), _rate_of_found(pace, costs)
    due, plain = _due(pace, costs), 1 / costs.rounds[1]
    # What repeats itself in a text shows at its first look-up. Where a batch pays for it, it has to be expected.
    first = (pace.tries[:, LOOKED_UP] == 0) & (costs.slots <= _FEW)
    best = jnp.maximum(plain, drafting) if may_draft else plain
    looks_up = found & (first | due[:, LOOKED_UP] | (looking_up > best))
    drafts = ~looks_up & (due[:, DRAFTED] | (drafting > plain)) if may_draft else jnp.zeros_like(looks_up)
    rate = jnp.maximum(plain, _rates(pace, costs)[:, DRAFTED])
    return Choice(drafts & going_on, looks_up & going_on, rate)


def worth_another(pace: Pace, costs: Costs, rate: Float[Array, " batch"]) -> Callable[[Array, Array], Array]:
    """Whether drafting one more token is worth what it costs.

    Args:
      pace: of each sequence.
      costs: of rounds.
      rate: tokens per plain step that it has to be worth.

    Returns:
      A function of the number of tokens that are drafted, less one, and of all confidences, [batch, drafts].
    """
    # How far the confidences of this text can be trusted is not known before a few rounds. One token is a probe.
    most = jnp.where(_due(pace, costs)[:, DRAFTED], 1, 2 * (1 + pace.tries[:, DRAFTED]))
    usual = (jnp.sum(pace.accepted, 1) + _PSEUDO_TOKENS * costs.acceptance) / (jnp.sum(pace.seen, 1) + _PSEUDO_TOKENS)

    def goes_on(k: Int[Array, ""], confidence: Float[Array, "batch drafts"]) -> Bool[Array, " batch"]:
        bucket = _bucket(confidence)
        seen, accepted = (jnp.take_along_axis(x, bucket, axis=1) for x in (pace.seen, pace.accepted))
        chance = (accepted + _PSEUDO_TOKENS * confidence) / (seen + _PSEUDO_TOKENS)
        # The confidence of a token that is not drafted yet is not known: it is between the usual and the last one's.
        next_one = (usual + jax.lax.dynamic_index_in_dim(chance, k, 1, keepdims=False)) / 2
        all_stand = jnp.prod(jnp.where(jnp.arange(confidence.shape[1]) <= k, chance, 1.0), axis=1)
        known = k + 1 < most
        last = len(costs.rounds) - 1
        cost = costs.draft_step + costs.rounds[jnp.minimum(k + 3, last)] - costs.rounds[jnp.minimum(k + 2, last)]
        return known & (all_stand * next_one > rate * cost)

    return goes_on


def learn(
    pace: Pace,
    costs: Costs,
    *,
    length: Int[Array, " batch"],
    looked_up: Bool[Array, " batch"] | None,
    confidence: Float[Array, "batch drafts"],
    accepted: Int[Array, " batch"],
    count: Int[Array, " batch"],
) -> Pace:
    """What a round adds to a sequence's past.

    Args:
      pace: with which the round was decided.
      costs: of rounds.
      length: drafted tokens.
      looked_up: whether they were looked up; None: never.
      confidence: of each drafted token.
      accepted: how many of them stand.
      count: tokens that the round committed; 0 for a sequence that idles, which learns nothing.
    """
    ran = count > 0
    looked_up = jnp.zeros_like(ran) if looked_up is None else looked_up & ran
    drafted = ran & ~looked_up & (length > 0)
    used = jnp.stack([drafted, looked_up], axis=1)
    charged = jnp.where(drafted, jnp.maximum(length, costs.full), length)
    verified = costs.rounds[charged + 1]
    extra = jnp.stack([charged * costs.draft_step, costs.shallow * (verified - costs.rounds[1])], axis=1)
    cost, tokens = verified[:, None] + extra, (accepted + 1.0)[:, None]
    due, paid = _due(pace, costs), tokens * costs.rounds[1] > cost
    again = used & due & paid
    recent = jnp.where(again, 0.0, jnp.where(due, _STALE, _RECENT))
    brought, took = recent * pace.tokens + tokens, recent * pace.steps + cost
    kept = jnp.minimum(1.0, _AHEAD / jnp.maximum(brought * costs.rounds[1] - took, _AHEAD))

    # A token is judged if all before it stand.
    index = jnp.arange(confidence.shape[1])
    judged = drafted[:, None] & (index < jnp.minimum(length, accepted + 1)[:, None])
    bucket = jax.nn.one_hot(_bucket(confidence), _BUCKETS) * judged[:, :, None]
    stood = bucket * (index < accepted[:, None])[:, :, None]
    left = jnp.where(drafted, jnp.where(due[:, DRAFTED], _STALE_TOKENS, _RECENT_TOKENS), 1.0)[:, None]
    return Pace(
        accepted=left * pace.accepted + jnp.sum(stood, axis=1),
        seen=left * pace.seen + jnp.sum(bucket, axis=1),
        tokens=jnp.where(used, kept * brought, pace.tokens),
        steps=jnp.where(used, kept * took, pace.steps),
        tries=jnp.where(again, 0, pace.tries + used),
        since=jnp.where(used, 0, pace.since + ran[:, None]),
        level=jnp.where(used & paid, 0, jnp.minimum(pace.level + (used & due), costs.doubled)),
        rounds=pace.rounds,
        share=pace.share,
        drafting=jnp.where(
            again[:, DRAFTED],
            _DRAFTING_SHARE,
            jnp.where(ran, _RECENT_SHARE * pace.drafting + (1 - _RECENT_SHARE) * drafted, pace.drafting),
        ),
        copying=jnp.where(ran, looked_up & (accepted == length), pace.copying),
        # The draft model may not have seen the last drafted token; and nothing of what it did not draft.
        behind=jnp.where(drafted, 1, pace.behind + count),
    )


def _rates(pace: Pace, costs: Costs) -> Float[Array, "batch kinds"]:
    prior = jnp.where(pace.level > 0, 0.0, _PRIOR**pace.tries)
    return (pace.tokens + prior * costs.prior_tokens) / (pace.steps + prior * costs.prior_steps)


def _rate_of_drafted(pace: Pace, costs: Costs) -> Float[Array, " batch"]:
    """Tokens per plain step of drafting. In a batch of more than a few, each draft makes the round as long as the
    longest one does, for all; it pays for its part, as look-ups do (`_rate_of_found`)."""
    rate, cost = _rates(pace, costs)[:, DRAFTED], costs.rounds[costs.full + 1] + costs.full * costs.draft_step
    longer = _paid_for(pace.drafting, costs) * (cost - costs.rounds[1])
    return jnp.where(costs.full > 0, rate * cost / (costs.rounds[1] + longer), rate)


def _paid_for(share: Float[Array, " batch"], costs: Costs) -> Float[Array, " batch"]:
    """How many rounds of the batch become longer for each round in which a sequence drafts, if all sequences draft in
    the same share of their rounds, independently."""
    share = jnp.maximum(share, 1e-3)  # the limit is `slots`
    return (1 - (1 - share) ** costs.slots) / share


def _rate_of_found(pace: Pace, costs: Costs) -> Float[Array, " batch"]:
    """Tokens per plain step of a look-up.

    In a batch, sequences find something at different times, and each look-up makes the round longer for all. Where all
    find as often as this one, the rounds that are longer are those in which any does; each look-up pays for its part.
    """
    tokens = _rates(pace, costs)[:, LOOKED_UP] * costs.found
    tokens = jnp.where(pace.copying, costs.copied, tokens)
    share = pace.share + _RECENT_SHARE**pace.rounds * _USUAL_SHARE
    return tokens / (costs.rounds[1] + _paid_for(share, costs) * (costs.found - costs.rounds[1]))


def _due(pace: Pace, costs: Costs) -> Bool[Array, "batch kinds"]:
    """Whether a kind was not tried for so long that it is time for a probe."""
    return pace.since >= costs.pause >> (costs.doubled - pace.level)


def _bucket(confidence: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    return jnp.sum(confidence[..., None] >= jnp.asarray(_CONFIDENCES), axis=-1)
