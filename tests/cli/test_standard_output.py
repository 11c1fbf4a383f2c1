"""Standard output that cannot be written to, or whose encoding lacks a character: one line at most, no traceback."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import sys
from kangaroo_jax.cli import command_line

def main():
    for _ in range(int(sys.argv[1])):
        print("h\u00e9llo")

sys.argv, count = sys.argv[:1], sys.argv[1:]
sys.argv += count
command_line.run("command.py", main, sys.argv[:1])
"""


def start(count, stdout, **more):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more
    command = [sys.executable, "-c", SCRIPT, str(count)]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("count", [1, 100_000], ids=["found at the end", "found while writing"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(count):
    with open("/dev/full", "w") as full:
        done = start(count, full)
    assert done.communicate()[1] == "command.py: error: standard output: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize("count", [1, 100_000], ids=["found at the end", "found while writing"])
def test_a_reader_that_leaves_ends_the_command_in_silence(count):
    reader, writer = os.pipe()
    os.close(reader)
    done = start(count, writer)
    os.close(writer)
    assert done.communicate()[1] == ""
    assert done.returncode == 1


def test_a_character_that_the_encoding_lacks_is_escaped():
    done = start(1, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.communicate() == ("h\\xe9llo\n", "")
    assert done.returncode == 0
