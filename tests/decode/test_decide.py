"""Deciding how far to draft, without a model: a simulated sequence whose drafts are accepted with a given chance.

Truth: what the costs say is best for that chance, worked out here by adding up.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import DecideConfig, DraftConfig, InputError, LookupConfig, TreeConfig
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.decode.decide import DRAFTED, Costs, Pace, _paid_for, decide, learn, worth_another

GAMMA, LOOKED_UP = 6, 10
# A CPU on which a verification of several positions is dear, and an accelerator on which it costs next to nothing.
CPU = RoundCosts(1, 0.25, ((1, 1.0), (2, 1.35), (7, 1.75), (11, 2.1)), 0.1)
ACCELERATOR = RoundCosts(1, 0.09, ((1, 1.0), (11, 1.04)), 0.05)


@functools.cache
def functions(may_draft):
    return jax.jit(functools.partial(decide, may_draft=may_draft)), jax.jit(_further), jax.jit(learn)


def _further(pace, costs, rate, k, confidence):
    return worth_another(pace, costs, rate)(k, confidence)


class Simulated:
    """One sequence. `seen` is a list of (what a round drafted with, tokens drafted, tokens committed, cost)."""

    def __init__(self, costs, slots=1, lookup=False, may_draft=True, seed=0, acceptance=0.7):
        self.lookup = LookupConfig(LOOKED_UP) if lookup else None
        self.costs = Costs.of(costs, acceptance, slots, GAMMA if may_draft else 0, self.lookup)
        self.pace, self.random, self.seen = Pace.fresh(1), np.random.default_rng(seed), []
        self.decide, self.further, self.learn = functions(may_draft)

    def round(self, chance, confidence, found_chance=None):
        """One round of a text whose drafts are accepted with `chance`, whatever the draft model's confidence, and what
        is looked up with `found_chance`; None: nothing is found."""
        found, one = found_chance is not None, np.ones(1, bool)
        if self.lookup:
            self.pace = self.pace.looked(one & found, one)
        choice = self.decide(self.pace, self.costs, one & found, one)
        confidences, length = np.zeros((1, LOOKED_UP if self.lookup else GAMMA), np.float32), 0
        if choice.looks_up[0]:
            length, chance = LOOKED_UP, found_chance
            confidences[:] = 1
        elif choice.drafts[0]:
            while length < GAMMA:
                confidences[0, length] = confidence()
                length += 1
                if not self.further(self.pace, self.costs, choice.rate, length - 1, confidences)[0]:
                    break
        stands = self.random.random(length) < chance
        accepted = int(np.cumprod(stands).sum())
        kind = "looked up" if choice.looks_up[0] else "drafted" if length else "nothing"
        rounds = self.costs.rounds
        cost = rounds[length + 1] + (length * self.costs.draft_step if kind == "drafted" else 0)
        cost += self.costs.shallow * (rounds[length + 1] - rounds[1]) if kind == "looked up" else 0
        self.seen.append((kind, length, accepted + 1, float(cost)))
        self.pace = self.learn(
            self.pace,
            self.costs,
            length=np.asarray([length]),
            looked_up=choice.looks_up,
            confidence=confidences,
            accepted=np.asarray([accepted]),
            count=np.asarray([accepted + 1]),
        )

    def rounds(self, count, chance, confidence=lambda: 0.9, found_chance=None):
        """So many rounds; returns the share that drafted with the draft model, and the one that looked up."""
        for _ in range(count):
            self.round(chance, confidence, found_chance)
        last = [kind for kind, *_ in self.seen[-count:]]
        return last.count("drafted") / count, last.count("looked up") / count

    def speed(self, count):
        """Tokens per plain step in the last so many rounds."""
        return sum(x[2] for x in self.seen[-count:]) / sum(x[3] for x in self.seen[-count:])


@pytest.mark.parametrize("costs", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("seed", range(3))
def test_drafting_ends_and_comes_back_with_acceptance(costs, seed):
    sequence = Simulated(costs, seed=seed)
    pause = int(sequence.costs.pause[DRAFTED])
    sequence.rounds(40, 0.85)
    assert sequence.rounds(40, 0.85)[0] > 0.5
    assert sequence.speed(40) > 1.1
    # Within 40 rounds of the change nothing is drafted, but for probes.
    sequence.rounds(40, 0.02)
    drafted, _ = sequence.rounds(4 * pause, 0.02)
    assert 0 < drafted * 4 * pause <= 8
    # Within three of the longest pauses, as a probe may fail, it drafts again.
    sequence.rounds(3 * pause, 0.85)
    assert sequence.rounds(40, 0.85)[0] > 0.5
    assert sequence.speed(40) > 1.1


@pytest.mark.parametrize("costs", [CPU, ACCELERATOR], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("seed", range(3))
def test_a_text_that_is_never_accepted_costs_next_to_nothing(costs, seed):
    """The draft model is sure, and wrong."""
    sequence = Simulated(costs, seed=seed)
    sequence.rounds(128, 0.0)
    assert sequence.speed(128) > 0.965
    sequence.rounds(512, 0.0)
    assert sequence.speed(512) > 0.985


@pytest.mark.long
def test_a_batch_in_which_each_sequence_probes_loses_as_little():
    # Each sequence's probe is a longer round for all of them.
    slots = 8
    dear = RoundCosts(slots, 0.5, ((1, 1.0), (2, 1.8), (7, 3.0)), 0.1)
    sequences = [Simulated(dear, slots, seed=seed) for seed in range(slots)]
    for i, sequence in enumerate(sequences):
        sequence.rounds(200 + 37 * i, 0.1)  # out of step
        sequence.rounds(1000, 0.1)
    steps = [max(round[3] for round in rounds) for rounds in zip(*(s.seen[-1000:] for s in sequences), strict=True)]
    tokens = [sum(round[2] for round in rounds) for rounds in zip(*(s.seen[-1000:] for s in sequences), strict=True)]
    assert sum(tokens) / slots / sum(steps) > 0.98


def test_a_batch_in_which_one_sequence_alone_would_draft_is_no_slower_than_plain():
    """Four drafted tokens cost a batch of four more than the three that one sequence gets by them."""
    slots, costs = 4, RoundCosts(4, 0.19, ((1, 1.0), (2, 1.13), (5, 1.51), (7, 1.8)), 0.1)
    sequences = [Simulated(costs, slots, seed=seed) for seed in range(slots)]
    for sequence, chance in zip(sequences, (0.85, 0.3, 0.3, 0.3), strict=True):
        sequence.rounds(128, chance, lambda chance=chance: chance)
    steps = sum(max(round[3] for round in rounds) for rounds in zip(*(s.seen for s in sequences), strict=True))
    assert sum(round[2] for s in sequences for round in s.seen) / slots / steps > 0.97


@pytest.mark.parametrize(("share", "expected"), [(1.0, 1), (0.5, 1.875), (0.0, 4)])
def test_a_draft_pays_for_the_rounds_that_it_makes_longer(share, expected):
    """Of four sequences, each in a share of its rounds: those in which any drafts, for each in which this one does."""
    costs = Costs.of(CPU, 0.7, 4, GAMMA, None)
    assert _paid_for(jnp.full((1,), share), costs)[0] == pytest.approx(expected, rel=0.01)


def test_a_batch_in_which_all_gain_drafts_and_does_so_again_after_a_pause():
    sequence = Simulated(ACCELERATOR, 8)
    pause = int(sequence.costs.pause[DRAFTED])
    assert sequence.rounds(100, 0.8)[0] > 0.9
    assert sequence.speed(100) > 1.5
    sequence.rounds(60, 0.02)
    assert sequence.rounds(2 * pause, 0.02)[0] * 2 * pause <= 8
    sequence.rounds(3 * pause, 0.8)
    assert sequence.rounds(100, 0.8)[0] > 0.9


def test_what_can_never_pay_is_not_even_tried_at_first():
    hopeless = RoundCosts(16, 1.0, ((1, 1.0), (2, 2.0), (7, 7.0)), 0.1)
    sequence = Simulated(hopeless, 16)
    assert sequence.rounds(200, 1.0) == (0, 0)


def test_drafts_are_as_long_as_they_pay():
    """Where tokens are accepted with their confidence, the number drafted is near the one with the highest rate."""
    for chance, costs in ((0.95, ACCELERATOR), (0.6, ACCELERATOR), (0.9, CPU), (0.8, CPU)):
        sequence = Simulated(costs, acceptance=chance)
        sequence.rounds(300, chance, lambda chance=chance: chance)
        rounds = sequence.costs.rounds
        rates = [
            sum(chance**i for i in range(k + 1)) / (rounds[k + 1] + k * costs.draft_step) for k in range(1, GAMMA + 1)
        ]
        lengths = [length for kind, length, *_ in sequence.seen[-200:] if kind == "drafted"]
        assert abs(np.mean(lengths) - 1 - np.argmax(rates)) < 1.3, (chance, costs)
        assert sequence.speed(200) > 0.9 * max(rates)


def test_an_unsure_token_ends_a_draft_and_a_sure_one_does_not():
    sequence = Simulated(CPU)
    sequence.rounds(40, 0.85)
    pace, rate = sequence.pace, jnp.ones(1)
    sure, unsure = np.full((1, GAMMA), 0.9, np.float32), np.full((1, GAMMA), 0.05, np.float32)
    assert sequence.further(pace, sequence.costs, rate, 0, sure)[0]
    assert not sequence.further(pace, sequence.costs, rate, 0, unsure)[0]
    mixed = np.where(np.arange(GAMMA) == 1, unsure, sure)
    assert sequence.further(pace, sequence.costs, rate, 0, mixed)[0]
    assert not sequence.further(pace, sequence.costs, rate, 1, mixed)[0]
    assert not sequence.further(pace, sequence.costs, rate, 2, mixed)[0]  # all before a token have to stand


def test_look_ups_are_taken_where_they_bring_more_and_left_where_they_bring_less():
    sequence = Simulated(CPU, lookup=True)
    assert sequence.rounds(60, 0.85, found_chance=0.95)[1] > 0.7
    sequence.rounds(40, 0.85, found_chance=0.02)
    drafted, looked_up = sequence.rounds(60, 0.85, found_chance=0.02)
    assert drafted > 0.5
    assert looked_up < 0.05
    sequence.rounds(int(sequence.costs.pause[1]) + 10, 0.85, found_chance=0.95)
    assert sequence.rounds(60, 0.85, found_chance=0.95)[1] > 0.7


def test_a_batch_in_which_each_looks_up_now_and_then_is_no_slower_than_plain():
    """Look-ups pay for one sequence alone; eight that find something at different times wait for each other."""
    slots, costs = 8, RoundCosts(8, 0.2, ((1, 1.0), (2, 1.45), (11, 2.4)), 0.1)
    sequences, random = [Simulated(costs, slots, lookup=True, seed=seed) for seed in range(slots)], []
    for seed, sequence in enumerate(sequences):
        finds = np.random.default_rng(seed)
        random.append([0.75 if finds.random() < 0.15 else None for _ in range(200)])
        for found_chance in random[-1]:
            sequence.round(0.3, lambda: 0.3, found_chance)
    steps = sum(max(round[3] for round in rounds) for rounds in zip(*(s.seen for s in sequences), strict=True))
    assert sum(round[2] for s in sequences for round in s.seen) / slots / steps > 0.98
    # One sequence in slots of its own takes them all the same.
    alone = Simulated(costs, 1, lookup=True)
    for found_chance in random[0]:
        alone.round(0.3, lambda: 0.3, found_chance)
    assert [kind for kind, *_ in alone.seen].count("looked up") > 20
    assert alone.speed(200) > 1.05


def test_what_repeats_itself_is_found_at_the_first_look_up():
    sequence = Simulated(
        CPU, lookup=True, acceptance=0.95
    )  # so much is expected of the draft model, and not of look-ups
    assert sequence.rounds(10, 0.95, lambda: 0.95, found_chance=1.0)[1] == 1


def test_without_a_draft_model_look_ups_end_as_well():
    sequence = Simulated(CPU, lookup=True, may_draft=False)
    assert sequence.rounds(40, 0.0, found_chance=0.95) == (0, 1)
    sequence.rounds(25, 0.0, found_chance=0.02)
    drafted, looked_up = sequence.rounds(100, 0.0, found_chance=0.02)
    assert drafted == 0
    assert looked_up < 0.05


def test_a_sequence_that_idles_learns_nothing():
    sequence = Simulated(CPU)
    sequence.rounds(5, 0.85)
    after = sequence.learn(
        sequence.pace,
        sequence.costs,
        length=np.asarray([3]),
        looked_up=np.asarray([False]),
        confidence=np.full((1, GAMMA), 0.5, np.float32),
        accepted=np.asarray([2]),
        count=np.asarray([0]),
    )
    jax.tree.map(np.testing.assert_array_equal, after, sequence.pace)


def test_tokens_behind_a_refused_one_are_not_counted():
    learned = [
        functions(True)[2](
            Pace.fresh(1),
            Costs.of(CPU, 0.7, 1, GAMMA, None),
            length=np.asarray([GAMMA]),
            looked_up=np.asarray([False]),
            confidence=np.asarray([[0.9, 0.5, behind, behind, behind, behind]], np.float32),
            accepted=np.asarray([1]),
            count=np.asarray([2]),
        )
        for behind in (0.3, 0.99)
    ]
    jax.tree.map(np.testing.assert_array_equal, *learned)
    assert (np.sum(learned[0].accepted), np.sum(learned[0].seen)) == (1, 2)


def test_costs_are_those_of_the_nearest_batch_size():
    costs = tuple(RoundCosts(size, 0.1, ((1, 1.0),), 0.1) for size in (1, 8, 32))
    sizes = {size: DecideConfig(costs).nearest(size).batch_size for size in (1, 2, 3, 8, 15, 16, 100)}
    assert sizes == {1: 1, 2: 1, 3: 8, 8: 8, 15: 8, 16: 32, 100: 32}
    # Between and beyond what was measured, on straight lines.
    lines = Costs.of(RoundCosts(1, 0.1, ((1, 1.0), (3, 2.0), (5, 2.5)), 0.1), 0.7, 1, 6, None).rounds
    np.testing.assert_allclose(lines[1:], [1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoundCosts(0, 0.1, ((1, 1.0),), 0.1), "batch_size must be a positive integer, found 0"),
        (
            lambda: RoundCosts(1, -0.1, ((1, 1.0),), 0.1),
            "draft_step must be a number of plain steps, .* found -0.1",
        ),
        (lambda: RoundCosts(1, 0.1, ((2, 1.0),), 0.1), r"from 1 on, found \[2\]"),
        (lambda: RoundCosts(1, 0.1, ((1, 1.0), (3, 2.0), (2, 1.5)), 0.1), r"ascending numbers .* found \[1, 3, 2\]"),
        (
            lambda: RoundCosts(1, 0.1, ((1, 0),), 0.1),
            "cost of verifying 1 must be .* above 0 and .*, found 0",
        ),
        (lambda: DecideConfig(acceptance=1.5), "acceptance must be between 0 and 1, found 1.5"),
        (lambda: DecideConfig((CPU, CPU)), r"different batch sizes, found \[1, 1\]"),
        (lambda: DraftConfig(tree=TreeConfig(), decide=DecideConfig()), "trees and deciding .* exclude each other"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()
