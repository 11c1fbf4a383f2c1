"""--preflight: the flag, and the tables it prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from absl import flags

from kangaroo_jax.cli.prediction_table import print_prediction

if TYPE_CHECKING:
    from kangaroo_jax.preflight.machines import Machine
    from kangaroo_jax.preflight.report import Program, Report

PREFLIGHT = flags.DEFINE_string(
    "preflight",
    None,
    "Compile for this machine, print what it needs there against what there is, and stop: a TPU topology such as "
    "v5e:4x4 (pip install -e '.[preflight]'; no TPU needed), GPUs such as h100 or h100:8 (pip install -e "
    "'.[preflight-cuda]'; no GPU needed), or local. No weights are read.",
)
_GIB = 2**30
_TAKEN = 0.75  # of a GPU's memory, where XLA_PYTHON_CLIENT_MEM_FRACTION does not say otherwise


def find_machine() -> Machine:
    """The machine that the flag names, and a line on a terminal to wait for what follows.

    Raises:
      InputError, MachineError: as `machines.find_machine`.
    """
    from kangaroo_jax.preflight import machines

    machine = machines.find_machine(PREFLIGHT.value)
    if sys.stderr.isatty():
        print(f"compiling for {machine}; minutes for a large model", file=sys.stderr)
    return machine


def show(report: Report) -> bool:
    """Prints a report; whether what it is about fits, or may fit where the machine's memory is not known."""
    print(f"{report.machine}: mesh " + ", ".join(f"{axis} {size}" for axis, size in report.mesh.items()))
    print(report.work)
    for note in report.notes:
        print(f"note: {note}")
    for program in report.programs:
        print(f"\n{program.name}")
        for row, value in _rows(program).items():
            print(f"  {row:30}{value:>24}")
        if program.no_room is not None:
            print(f"  no room: {program.no_room}")
    _print_verdict(report)
    if report.prediction is not None:
        print_prediction(report.prediction)
    return report.fits is not False


def _print_verdict(report: Report) -> None:
    if report.fits is None:
        print("\nthe memory of this device is not known; compare the peak with it")
        return
    verdict = "fits" if report.fits else "does not fit"
    if report.peak == float("inf"):
        print(f"\n{verdict}")
    else:
        memory = report.machine.memory
        print(f"\n{verdict}: {_gib(report.peak)} of {_gib(memory)} ({report.peak / memory:.0%})")
        if report.machine.platform == "gpu" and report.fits and report.peak > _TAKEN * memory:
            print(f"with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: JAX takes {_TAKEN:.0%} of a GPU's memory by itself")


def _rows(program: Program) -> dict[str, str]:
    if program.no_room is not None:
        return {}
    rows = {
        "arguments, per device": _gib(program.arguments),
        "temporary, per device": _gib(program.temporary),
        "peak, per device": _gib(program.peak),
        "matrix products, all devices": f"{program.operations:.3g} FLOPs",
        "compiled in": f"{program.seconds:.0f} s",
    }
    if program.collectives is None:
        rows["communication"] = "unreadable; install the compiler that goes with this JAX: '.[preflight]'"
        return rows
    for kind, found in program.collectives.items():
        rows[f"{kind}, per device"] = f"{_gib(found.num_bytes)} in {found.count}"
    return rows


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f} GiB"
