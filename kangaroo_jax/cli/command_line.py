"""What the commands have in common: flags, and one line for what a user can mend."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from kangaroo_jax.errors import InputError, MachineError

PROFILE = flags.DEFINE_string("profile", None, "Folder to write a trace of the device's work into (Perfetto, XProf).")


def fail(command: str, message: object, code: int = 2) -> NoReturn:
    """Prints one line on standard error and exits."""
    print(f"{command}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        # JAX's exit handler would wait for the other processes, and abort this one when they do not come.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def parse_flags(command: str, argv: list[str]) -> list[str]:
    """absl's flags; what is wrong with them is one line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(command, error)
    return settle(command, rest)


def settle(command: str, rest: list[str]) -> list[str]:
    """After the flags are parsed: there are no arguments without a flag, and libraries keep quiet."""
    if len(rest) > 1:
        fail(command, f"unexpected argument {rest[1]!r}; everything is given as --NAME=VALUE")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl's default in a script is INFO, and Orbax says a lot there
    return rest


def run(
    command: str,
    main: Callable[[], None],
    argv: list[str] | None = None,
    parse: Callable[[list[str]], list[str]] | None = None,
    interrupted: str = "interrupted",
) -> None:
    """Parses flags and runs `main`; an `InputError` becomes one line and exit code 2, a `MachineError` one and 1,
    Ctrl-C one and 130.

    Args:
      command: its name, for messages.
      main: does the work.
      argv: the command line; the process's own by default.
      parse: in place of `parse_flags`.
      interrupted: what to say after Ctrl-C.
    """

    def guarded(_: list[str]) -> None:
        try:
            main()
        except InputError as error:
            fail(command, error)
        except MachineError as error:
            fail(command, error, code=1)
        except KeyboardInterrupt:
            print(f"\n{command}: {interrupted}", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, argv=argv, flags_parser=parse or (lambda argv: parse_flags(command, argv)))
