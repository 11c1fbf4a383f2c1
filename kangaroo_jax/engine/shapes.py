"""The shapes that programs are compiled for: few, so that there are few compilations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kangaroo_jax.decode.rounds import RoundShape, max_chunk_tokens
from kangaroo_jax.model.config import AttentionKind

# The device works alone until every sequence has this many new tokens; then the host streams and checks stop strings.
CHUNK = 32
ONLINE_CHUNK = 1  # one round: where a request that comes meanwhile finds a slot, and waits for the chunk's end
PIECE = 512  # tokens of a prompt that are processed at a time
MAX_EOS = 16  # tokens that may end a sequence
_PROMPT_STEP = 64
_SMALLEST_CAPACITY = 128
_AT_ONCE = 512  # positions that caches begin with where they may need them
_RING_STEP = 128


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes for one prompt.

    Attributes:
      width: tokens of its last piece, padded.
      prompt_capacity: positions of the caches that it is prefilled in.
      positions: the most positions of a cache that it and its answer fill.
    """

    width: int
    prompt_capacity: int
    positions: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Rounds up what requests need. Used by the engine, by preflight and by the benchmarks.

    Attributes:
      round: what a round is.
      accelerator: whether positions and sequences cost little beside reading the weights, and compiling takes long:
        prompts then have few widths and are admitted in few sizes of groups. On a CPU every position costs.
    """

    round: RoundShape
    accelerator: bool = False

    def plan(self, prompt_tokens: int, max_new_tokens: int) -> Plan:
        """Shapes for a prompt of so many tokens, and the most new ones."""
        last = (prompt_tokens - 1) % PIECE + 1
        width = self.prompt_width(last)
        positions = prompt_tokens + max_new_tokens + self.round.positions
        return Plan(width, prompt_tokens - last + width, positions)

    def capacity(self, filled: int, positions: int) -> int:
        """Positions of caches for a sequence that fills `filled` and may come to fill `positions`: they grow by
        doubling, so that long limits cost nothing before they are used."""
        capacity = min(positions, max(_AT_ONCE, 2 * filled))
        return capacity_class(max(capacity, _AT_ONCE) if self.accelerator else capacity)

    def room(self, plan: Plan, filled: int, chunks: int, *, begins: bool) -> int:
        """Positions of caches for a sequence of so many tokens that goes on for so many chunks; `begins`: and that has
        no token of its answer yet."""
        capacity = self.capacity(filled + self.chunk_positions(chunks) + self.round.positions, plan.positions)
        return max(capacity, capacity_class(plan.prompt_capacity)) if begins else capacity

    def rings(self, kinds: Sequence[AttentionKind]) -> tuple[int | None, ...]:
        """The most positions that the cache of each layer holds; None: all (`KVCache.empty`). Where no layer has a
        window, empty."""
        return rings(kinds, self.round.beyond_window)

    def prompt_width(self, length: int) -> int:
        """Tokens that a piece of a prompt is padded to: on a CPU, two sizes between powers of two, from 128 on."""
        if self.accelerator:
            return max(PIECE // 2, _power_of_two(length))
        step = max(_PROMPT_STEP, _power_of_two(length) // 4)
        return -(-length // step) * step

    def group(self, count: int, slots: int) -> tuple[int, int]:
        """How many of `count` prompts are prefilled together in a batch of `slots`, and as how many rows: on a CPU, as
        many as there are slots, as a batch begins, else a power of four of them; on an accelerator all of them, with
        rows of padding."""
        if self.accelerator:
            rows = 8
            while rows < min(count, slots):
                rows *= 8
            return count, min(rows, slots)
        if count >= slots:
            return slots, slots
        size = 1
        while size * 4 <= count:
            size *= 4
        return size, size

    def refill(self, slots: int) -> int:
        """How many of so many slots have to be free before a chunk of rounds ends early for prompts that wait: one of
        a small batch; of a large one, in which sequences end all the time, as many as are worth an interruption."""
        return max(1, slots // 32)

    def least_tokens(self, tokens: int, sequences: int) -> int:
        """The fewest tokens that a chunk of rounds that goes on for `tokens` commits for each of so many sequences,
        where none ends. It ends early where one is far ahead."""
        return tokens if sequences == 1 else min(tokens, -(-2 * tokens // self.round.max_commit))

    def chunk_positions(self, chunks: int) -> int:
        """The most positions that a sequence goes on by in so many chunks."""
        return chunks * max_chunk_tokens(CHUNK, self.round)


def capacity_class(positions: int) -> int:
    """The smallest capacity of caches that holds so many positions: a power of two, or one and a half times one."""
    power = _power_of_two(max(positions, _SMALLEST_CAPACITY))
    return power * 3 // 4 if positions <= power * 3 // 4 and power > _SMALLEST_CAPACITY else power


def rings(kinds: Sequence[AttentionKind], beyond: int) -> tuple[int | None, ...]:
    """`Shapes.rings`, where rounds need so many positions `beyond` a window. Windows are few and do not grow, so unlike
    capacities they are not rounded up by halves: for a window of 4,096 that would be 2,048 positions for nothing."""
    if all(kind.window is None for kind in kinds):
        return ()
    return tuple(
        None if kind.window is None else -(-(kind.window + beyond) // _RING_STEP) * _RING_STEP for kind in kinds
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
