"""What holds for all tests."""

import gc
import os
import shutil
import tempfile

import jax
import pytest

from kangaroo_jax.decode import rounds
from kangaroo_jax.engine.programs import SHARED
from tests.train.runs import LESS_OPTIMIZATION

pytest_plugins = ["tests.targets", "tests.emulators"]

# One for all processes of a session, and for the sessions of .ci/run: many tests compile the same programs.
_CACHE_VARIABLE = "KANGAROO_TESTS_CACHE"
_OWN_CACHE = None if _CACHE_VARIABLE in os.environ else tempfile.mkdtemp(prefix="kangaroo_jax-tests-")
_CACHE = os.environ.setdefault(_CACHE_VARIABLE, _OWN_CACHE or "")
_SLOW_FILES = tuple(
    f"tests/{name}.py"
    for name in (
        "test_decode_input",
        "test_decode_command",
        "decode/test_sampling",
        "engine/test_boundaries",
        "decode/test_tree",
        "model/test_sharding",
        "engine/test_engine",
    )
)
_SETTINGS = {"jax_compilation_cache_dir": _CACHE, "jax_persistent_cache_min_compile_time_secs": 0.5}


def pytest_configure():
    # Half of the time goes into compiling. Commands in processes of their own are compiled as users have them, unless
    # their test says otherwise.
    SHARED.limit = 64  # tests go back and forth between more shapes than calls do
    rounds._MAX_WIDTHS = 2  # less to compile; tests/decode/test_lossless.py has all of them where it is long
    before = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{before} {LESS_OPTIMIZATION}"
    jax.devices()  # reads it
    os.environ["XLA_FLAGS"] = before
    for name, value in _SETTINGS.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


def pytest_unconfigure():
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """Files that take long go first, so that neither of the two processes is left alone with one."""
    items.sort(key=lambda item: not item.nodeid.startswith(_SLOW_FILES))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of one module are of no use to the next, and each holds memory mappings, of which a process
    may have 65,530: beyond that, compiling crashes."""
    yield
    SHARED.clear()
    jax.clear_caches()
    gc.collect()
