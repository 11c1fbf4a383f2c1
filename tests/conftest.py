"""What holds for all tests."""

import gc

import jax
import pytest

from kangaroo_jax.decode import host_loop


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of one module are of no use to the next, and each holds memory mappings, of which a process
    may have 65,530: beyond that, compiling crashes."""
    yield
    host_loop._programs.clear()
    jax.clear_caches()
    gc.collect()
