"""What rounds cost on an engine's devices, for sequences that decide how far to draft: measured, or predicted."""

from __future__ import annotations

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, RoundCosts
from kangaroo_jax.decode.decide import Costs
from kangaroo_jax.decode.rounds import RoundShape
from kangaroo_jax.engine.part_costs import PartCounts

# A pass that reads all weights for several rows at once takes longer than for one: on a CPU, where one row is a product
# with a vector, by a step and by what each row adds (measured: SmolLM2-135M in float32 on 2 cores of a Zen 2 EPYC, 2,
# 5, 9, 20 and 40 rows: 1.2, 1.2, 1.6, 2.3 and 4.3; on an EPYC with AVX-512, 2 to 9 rows: 1.1, 1.4, 1.5); on an
# accelerator when computing takes longer than reading, at so many rows.
_CPU_SEVERAL, _CPU_ROW = 0.05, 0.07
_ACCELERATOR_ROWS = 240


def costs_of_rounds(
    target: Target, adapter: TrainedAdapter | None, draft: DraftConfig, shape: RoundShape, slots: int, platform: str
) -> Costs | None:
    """What `shape`'s rounds cost in an engine of so many slots: as `draft.decide` says, else predicted; None where
    sequences do not decide."""
    if not shape.kept:
        return None
    decide = draft.decide
    costs = decide.nearest(slots) if decide.costs else predicted(target, adapter, shape, slots, platform)
    return Costs.of(costs, decide.acceptance, slots, shape.max_draft_len, shape.lookup)


def predicted(
    target: Target, adapter: TrainedAdapter | None, shape: RoundShape, slots: int, platform: str
) -> RoundCosts:
    """Costs from the bytes of the weights that each part reads. Caches and the overhead of many small operations are
    left out."""
    read = PartCounts.of_bytes(target.model, None if adapter is None else adapter.model, shape.exit_layer)
    base = _pass(slots, platform)
    verification = tuple((width, _pass(slots * width, platform) / base) for width in range(1, shape.max_commit + 1))
    # What a round reads once for its drafts, as a part of each of the most that it may draft.
    draft_step = read.draft_step + read.once / max(1, shape.max_draft_len)
    return RoundCosts(slots, draft_step / read.plain_step, verification, read.shallow / read.plain_step)


def _pass(rows: int, platform: str) -> float:
    """How long a pass over `rows` rows takes, over one of a single row."""
    if platform == "cpu":
        return 1.0 if rows == 1 else 1.0 + _CPU_SEVERAL + _CPU_ROW * rows
    return max(1.0, rows / _ACCELERATOR_ROWS)
