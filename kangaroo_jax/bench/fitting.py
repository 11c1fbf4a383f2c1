"""Which of several machines decoding fits, by context and batch, and how fast it would be there: a preflight for
each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kangaroo_jax.config import DraftConfig
from kangaroo_jax.errors import MachineError
from kangaroo_jax.preflight.decoding import decoding
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.report import Report


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is to be decoded.

    Attributes:
      target: as for `model_config`.
      dtype: of weights and caches.
      weights: as `load_target`.
      draft: how to draft; must name its exit layer.
      max_new_tokens: of each answer.
    """

    target: str
    dtype: str
    weights: str
    draft: DraftConfig
    max_new_tokens: int

    def on(self, machine: Machine, batch_size: int, prompt_tokens: int) -> Report:
        """Its preflight, each layer split over all devices of the machine."""
        lengths = prompt_tokens, self.max_new_tokens, len(machine.devices)
        shape = self.target, self.dtype, self.draft, *lengths, machine
        return decoding(*shape, weights=self.weights, batch_size=batch_size)


def first_that_fits(
    work: Decoding, machines: Sequence[Machine], batch_size: int, prompt_tokens: int
) -> tuple[Report | None, list[str]]:
    """The preflight of the first machine that decoding fits, and why machines before it could not be compiled for;
    without a preflight where it fits none.

    Args:
      work: what is decoded.
      machines: whose memory is known, in the order to try.
      batch_size: sequences decoded together.
      prompt_tokens: of each.

    Raises:
      InputError: as `decoding`.
    """
    failures = []
    for machine in machines:
        try:
            report = work.on(machine, batch_size, prompt_tokens)
        except MachineError as error:  # of this program alone
            failures.append(str(error))
            continue
        if report.fits:
            return report, failures
    return None, failures
