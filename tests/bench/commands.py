"""Runs many lines of one `python -m kangaroo_jax.bench` command in one process, most of whose time is imports."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence

from tests.train.runs import LESS_OPTIMIZATION

ROOT = pathlib.Path(__file__).parents[2]

_RUNNER = """
import contextlib, importlib, io, json, sys
from absl.testing import flagsaver
from kangaroo_jax.bench import __main__ as bench
importlib.import_module("kangaroo_jax.bench." + sys.argv[1])  # whose flags are saved and restored

results = []
for line in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    without = [word.removeprefix("without:") for word in line if word.startswith("without:")]
    hidden = {name: sys.modules.get(name) for name in without}
    sys.modules.update(dict.fromkeys(without))
    sys.argv = ["bench", *(word for word in line if not word.startswith("without:"))]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        saved = flagsaver.save_flag_values()
        try:
            bench.main()
        except SystemExit as stop:
            code = stop.code
        flagsaver.restore_flag_values(saved)
    for name, module in hidden.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module
    results.append((code or 0, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def bench(
    lines: Sequence[Sequence[str]], cache: pathlib.Path, command: str = "spec_bench"
) -> list[tuple[int, str, str]]:
    """Exit code, standard output and standard error of each; "without:NAME" in a line hides that module from it.

    All lines are of one `command`, since others have flags of the same names, or of none.
    `cache` keeps compiled programs, however small, for the next call.
    """
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": LESS_OPTIMIZATION,
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUNNER, command],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
