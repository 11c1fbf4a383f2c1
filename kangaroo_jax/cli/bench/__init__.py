"""The bench commands, one module each: `python -m kangaroo_jax.bench NAME`."""
