"""The store of compiled programs, and what a process that goes through many shapes keeps of them."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from kangaroo_jax.engine.programs import ProgramStore

ROOT = pathlib.Path(__file__).parents[2]


def test_the_programs_used_last_are_kept_and_never_more_than_the_limit():
    store, built = ProgramStore(2), []

    def get(key):
        def build():
            built.append((key, len(store._programs)))  # how many are held beside the new one
            return lambda: key

        return store.get(key, build)()

    assert [get(key) for key in "abacab"] == list("abacab")
    # c takes the place of b, which was used before a; b comes again in place of c.
    assert built == [("a", 0), ("b", 1), ("c", 1), ("b", 1)]


_CALLS = """
import json, os, pathlib
from kangaroo_jax import demo, generate_plain, load_target

target = load_target(demo.MODEL, "float32")
sizes = []
for i in range(5):
    generate_plain(target, [[5] * (100 * i + 10)], max_new_tokens=8 + 32 * i, eos_token_ids=[])
    sizes.append(int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
print(json.dumps(sizes))
"""


@pytest.mark.long
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="resident memory is read from Linux's /proc")
def test_two_more_shapes_take_less_memory_than_their_programs():
    """Beyond the limit of programs, each new shape takes the place of an old one: about 15 MB of some 33."""
    done = subprocess.run(
        [sys.executable, "-c", _CALLS],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes[4] - sizes[2] < 0.6 * (sizes[2] - sizes[0]), sizes
