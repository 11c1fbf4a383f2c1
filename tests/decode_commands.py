"""Runs many command lines in one process, most of whose time is Python's imports."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

RUNNER = """
import contextlib, importlib, io, json, os, sys
from absl.testing import flagsaver

module, command, *common = sys.argv[1:]
main = importlib.import_module(module).main

lines, results = json.load(sys.stdin), []
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.stdin = open(0)
for line in lines:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        saved = flagsaver.save_flag_values()
        try:
            main([command, *common, *line])
        except SystemExit as stop:
            code = stop.code
        flagsaver.restore_flag_values(saved)
    results.append((code or 0, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def decode_in_one_process(lines, environment):
    """Exit code, standard output and standard error of `decode.py` with each line of flags."""
    # JAX looks for a cluster once in a process only.
    return run_in_one_process(["kangaroo_jax.cli.decode", "decode.py", "--num_processes=1"], lines, environment)


def run_in_one_process(command, lines, environment):
    """The same of a command: its module, its name and flags that all lines have."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, *command],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
