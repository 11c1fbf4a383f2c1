"""The parts that decoding is made of: what each reads and multiplies, and the cost of a round that follows from what
each takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.target import TargetModel


@dataclasses.dataclass(frozen=True)
class PartCounts:
    """A count for each part, on one device: of bytes, or of operations.

    Attributes:
      plain_step: of a plain step.
      shallow: of a shallow pass.
      draft_step: of one more drafted token: adapter, LM head, and the shallow layers for the token.
      verification: of a pass of the deep layers, with its LM head.
      head: of the LM head alone.
      adapter: of a pass of the draft model's own layers; 0 without one.
      once: of what the draft model computes once a round, beside its steps.
    """

    plain_step: int
    shallow: int
    draft_step: int
    verification: int
    head: int
    adapter: int
    once: int = 0

    @classmethod
    def of_bytes(
        cls, model: TargetModel, adapter: Adapter | None, exit_layer: int, cached: Sequence[int] = ()
    ) -> PartCounts:
        """Bytes that each part has to read: weights, and the complete cache buffers of the layers it runs (attention
        reads the unused positions too).

        Args:
          model: the target, or its shapes.
          adapter: or its shapes; None for a round that drafts nothing by it.
          exit_layer: number of shallow layers.
          cached: of each layer of the target, numbers in its buffers, keys and values together, on one device; an
            adapter's layers are as the first. Empty leaves caches out.
        """
        attention = [numbers * model.dtype.itemsize for numbers in cached]
        return cls._of(model, adapter, exit_layer, lambda x: size_on_device(x) * x.dtype.itemsize, attention)

    @classmethod
    def of_operations(
        cls, model: TargetModel, adapter: Adapter | None, exit_layer: int, batch: int, cached: Sequence[int]
    ) -> PartCounts:
        """Floating-point operations of the matrix products for one position of each sequence.

        Args:
          model: the target, or its shapes.
          adapter: as above.
          exit_layer: number of shallow layers.
          batch: sequences on one device.
          cached: as above.
        """
        groups = model.config.num_attention_heads // model.config.num_key_value_heads
        matrix = lambda x: 2 * batch * size_on_device(x) if x.ndim > 1 else 0  # noqa: E731
        # Each of a group's queries is multiplied with each key, and its weights with each value.
        return cls._of(model, adapter, exit_layer, matrix, [2 * groups * numbers for numbers in cached])

    @classmethod
    def _of(
        cls,
        model: TargetModel,
        adapter: Adapter | None,
        exit_layer: int,
        count: Callable[[Any], int],
        attention: Sequence[int],
    ) -> PartCounts:
        def total(tree: Any) -> int:
            return sum(map(count, jax.tree.leaves(tree)))

        attention = attention or [0] * len(model.layers)
        layers = [total(layer) + more for layer, more in zip(model.layers, attention, strict=True)]
        head = total(model.embed_tokens if model.lm_head is None else model.lm_head)
        shallow, deep = sum(layers[:exit_layer]), sum(layers[exit_layer:])
        own, drafted, once = 0, 0, 0
        if adapter is not None:
            once = total(adapter.once_a_round)
            # An adapter with a draft vocabulary has its own rows of the head, and reads those instead.
            rows = 0 if adapter.draft_vocabulary is None else total(adapter.draft_vocabulary)
            own = total(adapter) - once - rows + len(adapter.layers) * attention[0]
            drafted = rows or head
        return cls(shallow + deep + head, shallow, shallow + own + drafted, deep + head, head, own, once)


def size_on_device(x: Any) -> int:
    """Numbers of an array, or of its shape, that one device holds."""
    where = getattr(x, "sharding", None)
    return math.prod(x.shape if where is None else where.shard_shape(x.shape))


@dataclasses.dataclass(frozen=True)
class PartTimes:
    """Seconds of the parts.

    Attributes:
      plain_step: of one plain step.
      shallow: of one shallow pass.
      draft_step: of one more drafted token.
      reduced_draft_step: the same with a draft vocabulary; None if not known.
      verification: width -> of a verification pass.
    """

    plain_step: float
    shallow: float
    draft_step: float
    reduced_draft_step: float | None
    verification: Mapping[int, float]

    def round_seconds(self, drafts: float) -> float:
        """The sum of the parts of a round of `drafts` drafts (or of so many in the mean), with the narrowest
        verification that holds them."""
        width = min(width for width in self.verification if width > drafts)
        return drafts * self.draft_step + self.shallow + self.verification[width]

    def round_cost(self, drafts: float) -> float:
        """The same in plain steps; the speed-up is the mean accept length over this."""
        return self.round_seconds(drafts) / self.plain_step
