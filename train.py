"""Trains an adapter.

    python train.py --config=configs/demo.py --config.optimizer.learning_rate=1e-4
    python train.py --config=configs/llama7b.py --preflight=v5e:4x4      would it fit? Needs no TPU

Running the same command again goes on from the newest checkpoint.
"""

import sys

from absl import flags
from ml_collections import config_flags

from kangaroo_jax import compilation_cache, distributed, preflight, profiling
from kangaroo_jax.cli import command_line
from kangaroo_jax.train.loop import train

_NAME = "train.py"
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/demo.py.", lock_config=True)


def _parse(argv: list[str]) -> list[str]:
    """Flags, or one line about what is wrong with them."""
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value is None:
            command_line.fail(_NAME, "--config is missing; give one, e.g. --config=configs/demo.py")
        _CONFIG.value.lock()  # a file that cannot be read says so when it is first used
    except AttributeError as error:  # an override of a setting that there is none of; it carries a KeyError
        what = getattr(error.args[0], "args", error.args)[0]
        command_line.fail(_NAME, f"a --config override names no setting of the configuration: {what}")
    except OSError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[-1]
        command_line.fail(_NAME, f"--config cannot be read: {reason}; give one, e.g. configs/demo.py")
    except (flags.Error, SyntaxError, ImportError, KeyError, TypeError, ValueError) as error:
        # config_flags may put a traceback into the message; its last line says what happened.
        lines = str(error).strip().splitlines()
        command_line.fail(
            _NAME, f"the configuration could not be read: {lines[-1] if len(lines) > 2 else ' '.join(lines)}"
        )
    return command_line.settle(_NAME, rest)


def main() -> None:
    if preflight.PREFLIGHT.value is not None:
        fits = preflight.training(_CONFIG.value, preflight.find_machine(preflight.PREFLIGHT.value))
        sys.exit(0 if fits else 1)
    distributed.initialize(_NAME)
    profiling.check(command_line.PROFILE.value)
    compilation_cache.enable()
    train(_CONFIG.value, profile=command_line.PROFILE.value)


if __name__ == "__main__":
    command_line.run(
        _NAME, main, parse=_parse, interrupted="interrupted; the same command goes on from the newest checkpoint"
    )
