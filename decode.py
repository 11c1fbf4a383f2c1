"""Generates text with Kangaroo; see kangaroo_jax/cli/decode.py. `python decode.py --help` lists the flags."""

from kangaroo_jax.cli.decode import main

if __name__ == "__main__":
    main()
