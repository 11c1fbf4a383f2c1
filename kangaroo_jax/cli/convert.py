"""Writes an adapter alone, to keep or to give to others: what the authors' PyTorch code trained as an Orbax checkpoint,
or the best step of a training run in bfloat16, half as large and without the optimizer's state.

    python -m kangaroo_jax.cli.convert --adapter=FOLDER --target=FOLDER --exit_layer=2 --output=FOLDER     the authors'
    python -m kangaroo_jax.cli.convert --adapter=runs/NAME --target=FOLDER --output=FOLDER

What is written records the exit layer and the target, and needs no torch to be read.
"""

from __future__ import annotations

from absl import flags

from kangaroo_jax.cli import command_line

_ADAPTER = flags.DEFINE_string("adapter", None, "Folder in the authors' format, or of a training run or adapter.")
_TARGET = flags.DEFINE_string("target", None, "Its target: a folder in Hugging Face format, a GGUF file, or a hub id.")
_EXIT_LAYER = flags.DEFINE_integer(
    "exit_layer", None, "Number of shallow layers it was trained for, which the authors' format does not record."
)
_OUTPUT = flags.DEFINE_string("output", None, "Folder to write; must not exist.")


def main(argv: list[str] | None = None) -> None:
    """The command. `argv`: the command line; the process's own by default."""
    command_line.run("convert", _convert, argv, usage=__doc__)


def _convert() -> None:
    command_line.require(_ADAPTER, _TARGET, _OUTPUT)
    import jax.numpy as jnp

    from kangaroo_jax import InputError, load_target, paths
    from kangaroo_jax.buckets import is_bucket
    from kangaroo_jax.checkpoint.adapter import check_exit_layer, load_adapter, metadata_of, save_adapter
    from kangaroo_jax.checkpoint.fingerprint import is_int8
    from kangaroo_jax.checkpoint.upstream import is_upstream, load_upstream

    folder = _ADAPTER.value if is_bucket(_ADAPTER.value) else paths.expanded(_ADAPTER.value)
    theirs = not is_bucket(_ADAPTER.value) and is_upstream(folder)
    if theirs:
        command_line.require(_EXIT_LAYER)
    recorded = None if theirs else metadata_of(folder)
    weights = "float" if theirs or not is_int8(recorded["target"]["fingerprint"]) else "int8"
    target = load_target(_TARGET.value, "bfloat16", weights=weights)
    if theirs:
        exit_layer, training = _EXIT_LAYER.value, {"converted_from": _ADAPTER.value}
        check_exit_layer(exit_layer, target.config)
        # float32 is the authors' own type, so nothing is lost whatever type the target is run in later.
        model = load_upstream(folder, target, jnp.float32)
    else:
        adapter = load_adapter(folder, target)
        if adapter.other_target is not None:
            raise InputError(f"--target: the adapter was trained for {adapter.other_target}; give that")
        if _EXIT_LAYER.value not in (None, adapter.exit_layer):
            raise InputError(f"--exit_layer: the adapter was trained for {adapter.exit_layer}; leave the flag out")
        model, exit_layer, training = adapter.model, adapter.exit_layer, recorded["training"]
    save_adapter(_OUTPUT.value, model, exit_layer=exit_layer, target=target, training=training)


if __name__ == "__main__":
    main()
