"""`python -m kangaroo_jax.data.synthesize [flags]`; see kangaroo_jax/cli/synthesize.py."""

from kangaroo_jax.cli.synthesize import main

if __name__ == "__main__":
    main()
