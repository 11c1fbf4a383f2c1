"""`python -m kangaroo_jax.serve [flags]`."""

from kangaroo_jax.cli.serve import main

if __name__ == "__main__":
    main()
