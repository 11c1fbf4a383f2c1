"""What a preflight found: what each program needs, and whether all of them fit."""

from __future__ import annotations

import dataclasses

from jaxtyping import PyTree

from kangaroo_jax import program
from kangaroo_jax.preflight.machines import Machine
from kangaroo_jax.preflight.prediction import Prediction


@dataclasses.dataclass(frozen=True)
class Program:
    """What one compiled program needs and does.

    Attributes:
      name: what it is.
      arguments: bytes of its arguments on one device.
      temporary: bytes of everything in between, on one device.
      peak: the largest number of bytes at any moment, on one device; infinite where there is no room.
      operations: floating-point operations of its matrix products, over all devices.
      seconds: time to compile.
      collectives: its communication by kind; None where the compiler's output could not be read.
      no_room: why it has no room in the device's memory, by the compiler or by the count of its arguments, else None;
        most fields are then 0.
      outputs: shapes and placements of its results; None where it could not be compiled.
      body: what it launches; None where the compiler's output could not be read.
    """

    name: str
    arguments: int
    temporary: int
    peak: float
    operations: int
    seconds: float
    collectives: dict[str, program.Collective] | None
    no_room: str | None
    outputs: PyTree
    body: program.Body | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What some work needs on a machine.

    Attributes:
      machine: compiled for.
      mesh: size of each axis of the devices' mesh.
      work: one line that says what was compiled.
      notes: lines about what is not as one may expect.
      programs: in the order they run.
      prediction: how fast the work is; None where the machine's limits are not known.
    """

    machine: Machine
    mesh: dict[str, int]
    work: str
    notes: list[str]
    programs: list[Program]
    prediction: Prediction | None = None

    @property
    def peak(self) -> float:
        """The largest peak of the programs, in bytes per device."""
        return max(program.peak for program in self.programs)

    @property
    def fits(self) -> bool | None:
        """Whether the peak fits the memory of a device; None where that is not known."""
        return None if self.machine.memory is None else self.peak <= self.machine.memory
