"""Writes an adapter that the authors' PyTorch code trained as an Orbax checkpoint.

    python -m kangaroo_jax.checkpoint.convert --adapter=FOLDER --target=FOLDER --exit_layer=2 --output=FOLDER

The checkpoint records the exit layer and the target, and needs no torch to be read.
"""

from __future__ import annotations

import argparse

import jax.numpy as jnp

from kangaroo_jax.checkpoint.adapter import check_exit_layer, save_adapter
from kangaroo_jax.checkpoint.huggingface import load_target
from kangaroo_jax.checkpoint.upstream import load_upstream
from kangaroo_jax.cli.command_line import fail
from kangaroo_jax.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(prog="convert.py", description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", required=True, help="Folder in the authors' format.")
    parser.add_argument("--target", required=True, help="Its target: a folder in Hugging Face format, or a hub id.")
    parser.add_argument("--exit_layer", required=True, type=int, help="Number of shallow layers it was trained for.")
    parser.add_argument("--output", required=True, help="Folder to write; must not exist.")
    args = parser.parse_args()
    try:
        target = load_target(args.target)
        check_exit_layer(args.exit_layer, target.config)
        # float32: the authors' own, so that nothing is lost whatever the target is run in later.
        adapter = load_upstream(args.adapter, target, jnp.float32)
        training = {"converted_from": args.adapter}
        save_adapter(args.output, adapter, exit_layer=args.exit_layer, target=target, training=training)
    except InputError as error:
        fail("convert.py", error)


if __name__ == "__main__":
    main()
