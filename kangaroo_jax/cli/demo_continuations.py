"""Writes the demo target's own greedy continuations of its training text, as JSONL to train the adapter on.

python -m kangaroo_jax.cli.demo_continuations --output=continuations.jsonl
"""

from __future__ import annotations

import pathlib

from absl import flags

from kangaroo_jax.cli import command_line

_OUTPUT = flags.DEFINE_string("output", "continuations.jsonl", "File to write.")
_COUNT = flags.DEFINE_integer("count", 6016, "Continuations; a multiple of the batch of 16.")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command_line.run("demo_continuations", _write, argv, usage=__doc__)


def _write() -> None:
    from kangaroo_jax import compilation_cache
    from kangaroo_jax.cli.report import TerminalReport
    from kangaroo_jax.demo.continuations import write_continuations

    compilation_cache.enable()
    write_continuations(pathlib.Path(_OUTPUT.value), _COUNT.value, TerminalReport())


if __name__ == "__main__":
    main()
