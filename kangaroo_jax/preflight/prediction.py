"""How fast work would be on a machine: what it reads and multiplies against the machine's limits, and what the
compiler itself estimates. docs/preflight.md states the model and its error."""

from __future__ import annotations

import dataclasses

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
    """

    limits: Limits
    dtype: str
    parts: list[Part]
    times: PartTimes | None
    cycles: PartTimes | None
    max_draft_len: int
    tokens: int


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


def decoding_prediction(
    limits: Limits,
    dtype: str,
    num_bytes: PartCounts,
    operations: PartCounts,
    work: RoundWork | None,
    prefill: Part,
    *,
    width: int,
    rows: int,
    max_draft_len: int,
    batch: int,
) -> Prediction:
    """How fast decoding would be.

    Args:
      limits: of one device.
      dtype: of the products.
      num_bytes: that the parts read on one device.
      operations: of the parts for one position of each sequence, on one device.
      work: what the compiled parts launch.
      prefill: predicted with `part`.
      width: positions that a verification holds.
      rows: tokens of each sequence that a draft step takes: more than 1 in a tree.
      max_draft_len: gamma.
      batch: sequences over all devices.
    """
    launched = work or RoundWork(*[Launched()] * 4)
    plain = part("plain step", num_bytes.plain_step, operations.plain_step, limits, dtype, launched.plain_step)
    shallow = part("shallow pass", num_bytes.shallow, operations.shallow, limits, dtype, launched.shallow)
    name = "draft step" if rows == 1 else f"level of {rows} tokens"
    step = part(name, num_bytes.draft_step, rows * operations.draft_step, limits, dtype, launched.draft_step, 1)
    verifications = {}
    for size in sorted({*_WIDTHS, width}):
        # Another width is another program: as many kernels, most likely, but not as many cycles.
        of_width = launched.verification if size == width else Launched(launched.verification.kernels)
        name, counts = f"verification of {size}", (num_bytes.verification, size * operations.verification)
        verifications[size] = part(name, *counts, limits, dtype, of_width)
    verification = verifications[width]
    times = PartTimes(plain.seconds, shallow.seconds, step.seconds, None, {width: verification.seconds})
    cycles = None
    if plain.cycles:
        cycles = PartTimes(plain.cycles, shallow.cycles, step.cycles, None, {width: verification.cycles})
    parts = [plain, shallow, step, *verifications.values(), prefill]
    return Prediction(limits, dtype, parts, times, cycles, max_draft_len, batch)
