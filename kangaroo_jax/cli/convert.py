"""Writes an adapter that the authors' PyTorch code trained as an Orbax checkpoint.

    python -m kangaroo_jax.cli.convert --adapter=FOLDER --target=FOLDER --exit_layer=2 --output=FOLDER

The checkpoint records the exit layer and the target, and needs no torch to be read.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax.cli import command_line

_ADAPTER = flags.DEFINE_string("adapter", None, "Folder in the authors' format.")
_TARGET = flags.DEFINE_string("target", None, "Its target: a folder in Hugging Face format, or a hub id.")
_EXIT_LAYER = flags.DEFINE_integer("exit_layer", None, "Number of shallow layers it was trained for.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command_line.run("convert", _convert, argv, usage=__doc__)


def _convert() -> None:
    command_line.require(_ADAPTER, _TARGET, _EXIT_LAYER, _OUTPUT)
    import jax.numpy as jnp

    from kangaroo_jax import load_target
    from kangaroo_jax.checkpoint.adapter import check_exit_layer, save_adapter
    from kangaroo_jax.checkpoint.upstream import load_upstream

    target = load_target(_TARGET.value, "bfloat16")
    check_exit_layer(_EXIT_LAYER.value, target.config)
    # float32 is the authors' own type, so nothing is lost whatever type the target is run in later.
    adapter = load_upstream(_ADAPTER.value, target, jnp.float32)
    training = {"converted_from": _ADAPTER.value}
    save_adapter(_OUTPUT.value, adapter, exit_layer=_EXIT_LAYER.value, target=target, training=training)


if __name__ == "__main__":
    main()
