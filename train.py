"""Trains an adapter.

    python train.py --config=configs/demo.py --config.optimizer.learning_rate=1e-4
    python train.py --config=configs/llama7b.py --preflight=v5e:4x4      would it fit? Needs no TPU

Running the same command again goes on from the newest checkpoint.
"""

import sys

from absl import flags
from ml_collections import config_flags

from kangaroo_jax import command_line, compilation_cache, distributed, preflight, profiling
from kangaroo_jax.errors import InputError
from kangaroo_jax.train.loop import train
from kangaroo_jax.train.settings import check_config, check_overrides

_NAME = "train.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/demo.py.", lock_config=True)


def _parse(argv: list[str]) -> list[str]:
    """Flags, or one line about what is wrong with them."""
    try:
        check_overrides(argv)
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            command_line.fail(_NAME, "--config is missing; give one, e.g. --config=configs/demo.py")
        _CONFIG.value.lock()  # a file that cannot be read says so when it is first used
    except InputError as error:
        command_line.fail(_NAME, error)
    except OSError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        command_line.fail(_NAME, f"--config cannot be read: {reason}; give one, e.g. configs/demo.py")
    except (flags.Error, SyntaxError, ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        first: BaseException = error
        while first.__context__ is not None:
            first = first.__context__
        if isinstance(first, InputError):  # from within the file
            command_line.fail(_NAME, first)
        # config_flags may put a traceback into the message; its last line says what happened.
        lines = str(error).strip().splitlines()
        command_line.fail(
            _NAME, f"the configuration could not be read: {lines[-1] if len(lines) > 2 else ' '.join(lines)}"
        )
    return command_line.settle(_NAME, rest)


def main() -> None:
    if preflight.PREFLIGHT.value is not None:
        fits = preflight.training(check_config(_CONFIG.value), preflight.find_machine(preflight.PREFLIGHT.value))
        sys.exit(0 if fits else 1)
    distributed.initialize(_NAME)
    profiling.check(command_line.PROFILE.value)
    compilation_cache.enable()
    train(check_config(_CONFIG.value), profile=command_line.PROFILE.value)


if __name__ == "__main__":
    command_line.run(
        _NAME, main, parse=_parse, interrupted="interrupted; the same command goes on from the newest checkpoint"
    )
