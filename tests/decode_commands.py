"""Runs many `decode.py` command lines in one process, most of whose time is Python's imports."""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

# JAX looks for a cluster once in a process only, hence --num_processes.
RUNNER = """
import contextlib, io, json, os, sys
from absl.testing import flagsaver
from kangaroo_jax.cli import decode

lines, results = json.load(sys.stdin), []
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
sys.stdin = open(0)
for line in lines:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        saved = flagsaver.save_flag_values()
        try:
            decode.main(["decode.py", "--num_processes=1", *line])
        except SystemExit as stop:
            code = stop.code
        flagsaver.restore_flag_values(saved)
    results.append((code or 0, out.getvalue(), err.getvalue()))
json.dump(results, sys.stdout)
"""


def decode_in_one_process(lines, environment):
    """Exit code, standard output and standard error of each line of flags."""
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
