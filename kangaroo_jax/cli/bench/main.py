"""`python -m kangaroo_jax.bench COMMAND [flags]`, also installed as kangaroo-bench."""

from __future__ import annotations

import importlib
import sys

from kangaroo_jax import profiling
from kangaroo_jax.cli import command_line
from kangaroo_jax.engine import programs

_COMMANDS = {
    "peers": "the demo against plain decoding and Hugging Face transformers",
    "roofline": "what each part costs, against the machine's limits",
    "tune": "the best gamma and eta for an adapter on this machine, and whether a tree is faster",
    "fit": "which of several machines decoding fits, and how fast it would be there",
    "tree": "trees of several widths and budgets beside the single sequence",
    "batch": "batches against plain decoding, refilled slots against fixed batches",
    "adapters": "adapters of one target beside each other: accept lengths",
    "load": "bytes read and host memory of loading a target split over devices and processes",
    "weights": "what int8 weights change: bytes, loss of a text, greedy tokens",
    "serve": "the server over loopback, beside generate_many",
    "spec_bench": "Spec-Bench's questions, with Kangaroo and plainly",
}


def main() -> None:
    """Runs the command that the first argument names; its module defines its flags when it is imported."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in _COMMANDS:
        known = "; ".join(f"{name}: {what}" for name, what in _COMMANDS.items())
        command_line.fail("bench", f"expected a command, found {command!r} ({known})")
    name = f"bench {command}"
    module = importlib.import_module(f"kangaroo_jax.cli.bench.{command}")

    # Two methods in turn, prompt after prompt: more shapes than other calls come back to.
    programs.SHARED.limit = 64

    def traced() -> None:
        profiling.check(command_line.PROFILE.value)
        with profiling.trace(command_line.PROFILE.value, print):
            module.main()

    command_line.run(name, traced, [name, *sys.argv[2:]], usage=module.__doc__)
