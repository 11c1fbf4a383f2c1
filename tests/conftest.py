"""What holds for all tests."""

import gc
import os
import shutil
import tempfile

import jax
import pytest

from kangaroo_jax.decode import rounds
from kangaroo_jax.engine.programs import SHARED

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
        "train/test_bucket_run",  # waits for services that fail
    )
)
# Without optimization, the older emitters of fusions compile in half of the time.
_LESS_OPTIMIZATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
_SETTINGS = {"jax_compilation_cache_dir": _CACHE, "jax_persistent_cache_min_compile_time_secs": 0.5}


def pytest_configure():
    # Most of the time goes into compiling. Commands in processes of their own inherit the flags, unless their test says
    # that it compiles as users do.
    SHARED.limit = 64  # tests go back and forth between more shapes than calls do
    rounds._MAX_WIDTHS = 2  # less to compile; tests/decode/test_lossless.py has all of them where it is long
    before = os.environ.get("XLA_FLAGS", "")
    if _LESS_OPTIMIZATION not in before:  # the first process's flags are the workers' too
        os.environ["XLA_FLAGS"] = f"{before} {_LESS_OPTIMIZATION}"
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
