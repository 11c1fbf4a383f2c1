"""What an index alone decides about a record: the shares of kinds are exact, whatever is left out or added."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from kangaroo_jax.config import SynthesisConfig

# frac(index / root ** k) for k = 1, 2, 3 spreads shares evenly over the indices, and independently of each other:
# Roberts' sequence; the root is that of x ** 4 = x + 1.
_ROOT = 1.2207440846057596


@dataclasses.dataclass(frozen=True)
class Kind:
    """What record `index`, from 0, is like.

    Attributes:
      greedy: whether its answers are greedy, or sampled.
      turns: most questions.
    """

    greedy: bool
    turns: int

    @classmethod
    def of(cls, index: int, settings: SynthesisConfig) -> Kind:
        greedy, several, many = (math.modf((index + 0.5) * _ROOT**-power)[0] for power in (1, 2, 3))
        turns = 1
        if settings.turns > 1 and several < settings.several_turns:
            turns = 2 + int(many * (settings.turns - 1))
        return cls(greedy < settings.greedy, turns)


def seed_of(*numbers: int) -> int:
    """A seed for sampling, from numbers that say what for."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
