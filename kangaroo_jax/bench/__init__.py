"""Measurements: libraries that take arguments and return data. Their commands are in kangaroo_jax/cli/bench."""
