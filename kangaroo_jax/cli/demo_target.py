"""Trains the demo's target from scratch on the Python standard library and writes it in Hugging Face format.

    python -m kangaroo_jax.cli.demo_target --output=kangaroo_jax/demo/model --minutes=60

Running it again starts from scratch.
"""

from __future__ import annotations

import pathlib

from absl import flags, logging

from kangaroo_jax.cli import command_line

_OUTPUT = flags.DEFINE_string("output", "kangaroo_jax/demo/model", "Folder to write.")
_MINUTES = flags.DEFINE_float("minutes", 60.0, "Wall-clock training budget, compilation included.")
_LAYERS = flags.DEFINE_integer("layers", 16, "Decoder layers.")
_HIDDEN = flags.DEFINE_integer("hidden", 256, "Hidden size; the MLP is 2.5 times as wide.")
_TOKENS = flags.DEFINE_integer("tokens_per_step", 4096, "Tokens in a batch.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak learning rate.")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command_line.run("demo_target", _train, argv, usage=__doc__)


def _train() -> None:
    from kangaroo_jax.demo.train_target import train_target

    logging.set_verbosity(logging.INFO)  # its progress
    train_target(
        pathlib.Path(_OUTPUT.value),
        _MINUTES.value,
        _LAYERS.value,
        _HIDDEN.value,
        _TOKENS.value,
        _LEARNING_RATE.value,
    )


if __name__ == "__main__":
    main()
