"""How fast work would be on a machine: what it reads and multiplies against the machine's limits, and what the
compiler itself estimates. docs/preflight.md states the model and its error."""

from __future__ import annotations

import dataclasses

from kangaroo_jax.config import TreeConfig
from kangaroo_jax.engine.part_costs import PartCounts, PartTimes
from kangaroo_jax.preflight.machines import Limits
from kangaroo_jax.program import Body, Launched

# Widths of verification that are predicted beside the one that is compiled.
_WIDTHS = (1, 8, 16, 32)


@dataclasses.dataclass(frozen=True)
class Part:
    """One part, on one device.

    Attributes:
      name: what it is.
      num_bytes: that it reads.
      operations: floating-point operations of its matrix products.
      kernels: that it starts, on a GPU; 0 where they are not known or do not matter.
      cycles: by the compiler's estimate; 0 where it makes none.
      seconds: predicted.
    """

    name: str
    num_bytes: int
    operations: int
    kernels: int
    cycles: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """How fast work would be.

    Attributes:
      limits: of the machine.
      dtype: of its products.
      parts: of the work.
      times: of the parts of a round, in seconds; None in training.
      cycles: the same in the compiler's cycles; None where it makes no estimate.
      max_draft_len: gamma, or levels of a tree; 0 in training.
      tokens: that one run of the first part makes, over all devices.
      cached: bytes of caches among those that a plain step reads; 0 in training.
    """

    limits: Limits
    dtype: str
    parts: list[Part]
    times: PartTimes | None
    cycles: PartTimes | None
    max_draft_len: int
    tokens: int
    cached: int = 0


def part(
    name: str,
    num_bytes: int,
    operations: int,
    limits: Limits,
    dtype: str,
    launched: Launched | None = None,
    turns: int = 0,
) -> Part:
    """A part whose reading and multiplying overlap, whose kernels are started one after another, and for which the
    host decides `turns` times whether a loop goes on."""
    launched = launched or Launched()
    seconds = max(num_bytes / (limits.share * limits.bandwidth), operations / limits.products[dtype])
    kernels = launched.kernels if limits.launch else 0
    seconds += kernels * limits.launch + turns * limits.turn
    return Part(name, num_bytes, operations, kernels, launched.cycles, seconds)


@dataclasses.dataclass(frozen=True)
class RoundWork:
    """What the compiled parts of a round, and of a plain step, launch.

    Attributes:
      plain_step: one round of plain decoding.
      shallow: what a draft phase launches beside its steps.
      draft_step: one more token.
      verification: the rest of the round.
    """

    plain_step: Launched
    shallow: Launched
    draft_step: Launched
    verification: Launched

    @classmethod
    def of(cls, plain: Body | None, rounds: Body | None) -> RoundWork | None:
        """From compiled runs of rounds (`run_rounds`), plain and with drafts; None where their loops are not found."""
        if plain is None or rounds is None or len(plain.loops) != 1 or len(rounds.loops) != 1:
            return None
        (step,), (turn,) = plain.loops, rounds.loops
        drafting = [loop for loop in turn.loops if loop.name.endswith("/draft/while")]
        if step.loops or len(turn.loops) != 1 or len(drafting) != 1:
            return None
        one = drafting[0].all
        # Before its loop, a draft phase takes one step, and one more pass of the shallow layers.
        before = turn.within("draft")
        return cls(step.all, before - one, one, turn.all - before)


@dataclasses.dataclass(frozen=True)
class PartPredictor:
    """Predicts the parts of decoding a batch on one device.

    Attributes:
      limits: of the device.
      dtype: of the products.
      num_bytes: that the parts read.
      operations: of the parts for one position of each sequence.
      work: what the compiled parts launch; None where that is not known.
    """

    limits: Limits
    dtype: str
    num_bytes: PartCounts
    operations: PartCounts
    work: RoundWork | None

    def _part(
        self,
        name: str,
        num_bytes: int,
        operations: int,
        launched: Launched,
        turns: int = 0,
    ) -> Part:
        return part(name, num_bytes, operations, self.limits, self.dtype, launched, turns)

    @property
    def _work(self) -> RoundWork:
        return self.work or RoundWork(*[Launched()] * 4)

    def plain_step(self) -> Part:
        """A round of plain decoding."""
        counts = self.num_bytes.plain_step, self.operations.plain_step
        return self._part("plain step", *counts, self._work.plain_step)

    def shallow(self, rows: int = 1) -> Part:
        """A shallow pass over `rows` tokens of each sequence: the one that ends a draft phase."""
        return self._part("shallow pass", self.num_bytes.shallow, rows * self.operations.shallow, self._work.shallow)

    def draft_step(self, rows: int = 1) -> Part:
        """One more drafted token, or a level of a tree that drafts on from `rows` tokens of each sequence."""
        name = "draft step" if rows == 1 else f"level of {rows} tokens"
        counts = self.num_bytes.draft_step, rows * self.operations.draft_step
        return self._part(name, *counts, self._work.draft_step, 1)

    def beginning(self) -> Part:
        """What the draft model computes once in a round that drafts with it. Rounds were compiled without it."""
        return self._part("beginning to draft", self.num_bytes.once, self.operations.once, Launched())

    def looking_up(self, count: int) -> Part:
        """A draft of `count` tokens that were looked up: one pass of the shallow layers and of the draft model's own
        over them and the last committed one, in a loop of one turn. The search, which reads a number of each position,
        is left out. Rounds were compiled without it: it is taken to start as many kernels as a draft step."""
        num_bytes, operations = (x.shallow + x.adapter for x in (self.num_bytes, self.operations))
        return self._part(f"look-up of {count}", num_bytes, (count + 1) * operations, self._work.draft_step, 1)

    def verification(self, width: int, *, compiled: bool) -> Part:
        """A verification of `width` positions. `compiled`: of the width that was compiled. Another width is another
        program: as many kernels, most likely, but not as many cycles."""
        launched = self._work.verification
        launched = launched if compiled else Launched(launched.kernels)
        counts = self.num_bytes.verification, width * self.operations.verification
        return self._part(f"verification of {width}", *counts, launched)

    def round_seconds(self, drafts: int, tree: TreeConfig | None = None) -> float:
        """Seconds of a round that drafts `drafts` tokens, or a tree of so many levels: a draft phase, the shallow pass
        that ends it, and verification of all that was drafted. Of a tree, that pass is over all of its tokens."""
        rows = 1 if tree is None else tree.drafted(drafts)
        width = 1 + (drafts if tree is None else rows)
        steps = self.draft_step().seconds + (drafts - 1) * self.draft_step(1 if tree is None else tree.topk).seconds
        steps += self.beginning().seconds
        return steps + self.shallow(rows).seconds + self.verification(width, compiled=True).seconds


def decoding_prediction(
    predictor: PartPredictor, prefill: Part, *, width: int, rows: int, max_draft_len: int, batch: int, cached: int
) -> Prediction:
    """How fast decoding would be.

    Args:
      predictor: of the parts.
      prefill: predicted with `part`.
      width: positions that the compiled verification holds.
      rows: tokens of each sequence that a draft step takes: more than 1 in a tree.
      max_draft_len: gamma.
      batch: sequences over all devices.
      cached: bytes of caches that a plain step reads.
    """
    plain, shallow, step = predictor.plain_step(), predictor.shallow(), predictor.draft_step(rows)
    verifications = [predictor.verification(n, compiled=n == width) for n in sorted({*_WIDTHS, width})]
    verification = predictor.verification(width, compiled=True)
    times = PartTimes(plain.seconds, shallow.seconds, step.seconds, None, {width: verification.seconds})
    cycles = None
    if plain.cycles:
        cycles = PartTimes(plain.cycles, shallow.cycles, step.cycles, None, {width: verification.cycles})
    parts = [plain, shallow, step, *verifications, prefill]
    return Prediction(predictor.limits, predictor.dtype, parts, times, cycles, max_draft_len, batch, cached)
