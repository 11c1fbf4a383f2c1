"""Trains an adapter; see kangaroo_jax/cli/train.py. `python train.py --help` lists the flags."""

from kangaroo_jax.cli.train import main

if __name__ == "__main__":
    main()
