"""Trains an adapter.

    train.py --config=configs/demo.py --config.optimizer.learning_rate=1e-4
    train.py --config=configs/llama7b.py --preflight=v5e:4x4      would it fit? Needs no TPU

Running the same command again goes on from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from kangaroo_jax import paths
from kangaroo_jax.cli import command_line, preflight_flag, process_flags
from kangaroo_jax.errors import InputError

try:
    from ml_collections import config_flags
except ModuleNotFoundError:
    message = "training's packages are not installed; install the project with its extra: pip install '.[train]'"
    command_line.fail(command_line.name(), message, code=1)

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/demo.py.", lock_config=True)


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command = command_line.name(argv)
    with _ended_by_sigterm(command):
        command_line.run(
            command,
            functools.partial(_train, command),
            argv,
            parse=functools.partial(_parse, command),
            interrupted="interrupted; the same command goes on from the newest checkpoint",
            usage=__doc__,
        )


def _train(command: str) -> None:
    from kangaroo_jax.train.settings import check_config

    if preflight_flag.PREFLIGHT.value is not None:
        from kangaroo_jax.preflight.training import training

        report = training(check_config(_CONFIG.value), preflight_flag.find_machine())
        sys.exit(0 if preflight_flag.show(report) else 1)
    process_flags.join(command)
    from kangaroo_jax import compilation_cache, profiling
    from kangaroo_jax.cli.report import TerminalReport
    from kangaroo_jax.cli.synthesis_progress import SynthesisProgress
    from kangaroo_jax.train.loop import train

    profiling.check(command_line.PROFILE.value)
    compilation_cache.enable()
    with SynthesisProgress() as progress:
        train(check_config(_CONFIG.value), command_line.PROFILE.value, TerminalReport(), on_data=progress.show)


@contextlib.contextmanager
def _ended_by_sigterm(command: str) -> Iterator[None]:
    """SIGTERM before the first step, or after the last: one line, and exit code 0. Between them train/preemption.py
    handles it, of several processes JAX from when they have joined. Python's handlers wait for a compilation's end."""

    def end(*_: object) -> NoReturn:
        # Not by `print`, which the signal may have interrupted.
        os.write(1, f"{command}: SIGTERM; there was nothing to save, and the same command goes on\n".encode())
        os._exit(0)  # what was being written is as after a kill, which all of it withstands

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parse(command: str, argv: list[str]) -> list[str]:
    """Parses the flags and reads the configuration; what is wrong with either is one line."""
    from kangaroo_jax.train.settings import check_overrides

    path = _config_path(argv)
    try:
        with _importable(path):
            check_overrides(argv)
            rest = flags.FLAGS(argv)
            if _CONFIG.value is None:
                command_line.fail(command, "--config is missing; give one, e.g. --config=configs/demo.py")
            _CONFIG.value.lock()  # the file is read at its first use, and errors in it come up only then
    except InputError as error:
        command_line.fail(command, error)
    except OSError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        command_line.fail(command, f"--config cannot be read: {reason}; give one, e.g. configs/demo.py")
    except Exception as error:  # a configuration is code, which may raise anything
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, InputError):  # from within the file
            command_line.fail(command, first)
        # config_flags may put a traceback into the message; its last line says what happened.
        lines = str(error).strip().strip("'\"").splitlines() or [repr(first)]
        reason = lines[-1] if len(lines) > 2 else " ".join(lines)
        command_line.fail(command, f"--config={path}: the configuration could not be read: {reason}")
    return command_line.settle(command, rest)


def _config_path(argv: list[str]) -> str | None:
    """The last --config=PATH or --config PATH of a command line."""
    path = None
    for word, following in itertools.zip_longest(argv[1:], argv[2:]):
        name, equals, value = word.partition("=")
        if name in ("-config", "--config"):
            path = value if equals else following
    return path


@contextlib.contextmanager
def _importable(config_path: str | None) -> Iterator[None]:
    """Lets a configuration import its neighbours as `from configs import llama7b`, whatever the working directory:
    inside, modules are also looked for in the folder that holds the configuration's folder."""
    if config_path is None:
        yield
        return
    parent = str(paths.expanded(config_path).resolve().parent.parent)
    sys.path.insert(0, parent)
    try:
        yield
    finally:
        sys.path.remove(parent)


if __name__ == "__main__":
    main()
