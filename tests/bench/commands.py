"""A process that runs bench commands for the tests: see command_runner.py."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


class Commands:
    """Runs command lines one after the other. `cache` keeps compiled programs, however small.

    Attributes:
      flags_of_library: the flags that importing kangaroo_jax.bench's modules defined.
    """

    def __init__(self, cache: pathlib.Path):
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._errors = (cache.parent / "commands.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.command_runner"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        self.flags_of_library = self._answer()

    def run(self, *line: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error of `python -m kangaroo_jax.bench` with these words."""
        print(json.dumps(line), file=self._process.stdin, flush=True)
        code, out, err = self._answer()
        return code, out, err

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> Any:
        answer = self._process.stdout.readline()
        if not answer:
            self._errors.seek(0)
            raise AssertionError(f"the process ended: {self._errors.read()}")
        return json.loads(answer)
