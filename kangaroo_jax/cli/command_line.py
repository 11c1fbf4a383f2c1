"""What the commands have in common: flags, and one line for what a user can fix."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from kangaroo_jax.cli import standard_output
from kangaroo_jax.cli.devices import skip_missing_tpu
from kangaroo_jax.errors import InputError, MachineError

PROFILE = flags.DEFINE_string("profile", None, "Folder to write a trace of the device's work into (Perfetto, XProf).")


def name(argv: list[str] | None = None) -> str:
    """The command as the user called it, for messages: decode.py, or kangaroo-decode where it is installed."""
    return pathlib.Path((argv or sys.argv)[0]).name


def fail(command: str, message: object, code: int = 2) -> NoReturn:
    """Prints one line on standard error and exits."""
    print(f"{command}: error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        # JAX's exit handler would wait for the other processes, and abort this one when they do not come.
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def require(*holders: flags.FlagHolder) -> None:
    """Raises `InputError` for the first of the flags that was not given."""
    for holder in holders:
        if holder.value is None:
            raise InputError(f"--{holder.name} is missing; {flags.FLAGS[holder.name].help}")


def parse_flags(command: str, argv: list[str]) -> list[str]:
    """Parses absl's flags; what is wrong with them is one line."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        fail(command, error)
    return settle(command, rest)


def settle(command: str, rest: list[str]) -> list[str]:
    """Call after the flags are parsed: refuses arguments that are not flags, and sets absl's log level."""
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
    usage: str | None = None,
) -> None:
    """Parses flags and runs `main`; an `InputError` becomes one line and exit code 2, a `MachineError` one and 1,
    Ctrl-C one and 130.

    Args:
      command: its name, for messages.
      main: does the work.
      argv: the command line; the process's own by default.
      parse: used in place of `parse_flags`.
      interrupted: what to say after Ctrl-C.
      usage: what --help prints before the flags; the main module's docstring by default.
    """

    def guarded(_: list[str]) -> None:
        skip_missing_tpu()
        standard_output.guard()
        try:
            main()
            sys.stdout.flush()
        except standard_output.OutputError as error:
            if error.reader_left:  # as `head` does, once it has enough
                sys.exit(1)
            fail(command, f"standard output: {error}", code=1)
        except InputError as error:
            fail(command, error)
        except MachineError as error:
            fail(command, error, code=1)
        except KeyboardInterrupt:
            print(f"\n{command}: {interrupted}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            os._exit(130)  # JAX can crash where the interpreter ends while the device is at work

    # For --help, absl prints the main module's docstring and flags; ours are defined in modules of this package.
    if usage is not None:
        sys.modules["__main__"].__doc__ = usage
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module.startswith("kangaroo_jax."):
            for flag in defined:
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(guarded, argv=argv, flags_parser=parse or (lambda argv: parse_flags(command, argv)))
