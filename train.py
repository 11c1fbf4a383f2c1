"""Trains an adapter.

    python train.py --config=configs/demo.py --config.optimizer.learning_rate=1e-4

Running the same command again goes on from the newest checkpoint.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from kangaroo_jax import compilation_cache
from kangaroo_jax.errors import InputError
from kangaroo_jax.train.loop import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/demo.py.", lock_config=True)


def _fail(message: object) -> None:
    print(f"train.py: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def _parse(argv: list[str]) -> list[str]:
    """Flags, or one line about what is wrong with them."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            _fail("--config is missing; expected a configuration file, e.g. --config=configs/demo.py")
        _CONFIG.value.lock()  # a file that cannot be read says so when it is first used
    except AttributeError as error:  # an override of a setting that there is none of; it carries a KeyError
        what = getattr(error.args[0], "args", error.args)[0]
        _fail(f"a --config override names no setting of the configuration: {what}")
    except OSError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        _fail(f"--config cannot be read: {reason}; expected a configuration file, e.g. configs/demo.py")
    except (flags.Error, SyntaxError, ImportError, KeyError, TypeError, ValueError) as error:
        # config_flags may put a traceback into the message; its last line says what happened.
        lines = str(error).strip().splitlines()
        _fail(f"the configuration could not be read: {lines[-1] if len(lines) > 2 else ' '.join(lines)}")
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING  # absl's default in a script is INFO, and Orbax says a lot there
    return rest


def main(argv: list[str]) -> None:
    del argv
    compilation_cache.enable()
    try:
        train(_CONFIG.value)
    except InputError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("train.py: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
