"""`python -m kangaroo_jax.bench COMMAND [flags]`."""

from kangaroo_jax.cli.bench.main import main

if __name__ == "__main__":
    main()
