"""Runs `python -m kangaroo_jax.bench` command lines in one process, most of whose time is imports.

Reads a JSON list of words per line of standard input and answers each with a JSON list: exit code, standard output and
standard error of the command. Words that are no flags: "without:NAME" hides a module from the command, "fake:times"
replaces what measures the parts of a round by the times below, "fake:decoding" what decodes by the outputs below,
"fake:found", after that, what is looked up by the target's own tokens, and "fake:machines" what machines there are.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pkgutil
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
from absl import app, flags
from absl.testing import flagsaver

import kangaroo_jax.bench
from kangaroo_jax import DraftConfig
from kangaroo_jax.bench import machine, parts, tree_speed, tuning
from kangaroo_jax.bench.acceptance import Chains, Found, Trees
from kangaroo_jax.cli.bench import main as bench
from kangaroo_jax.preflight import machines

# Seconds: a draft step takes 2 ms, a shallow pass 1 ms, a tree level 3 ms.
TIMES = {
    parts: {
        "plain_step_seconds": lambda context: 8e-3,
        "draft_seconds": lambda context, count: (1 + 2 * count) * 1e-3,
        "verification_seconds": lambda context, width: (6 + width) * 1e-3,
        "round_seconds": lambda context, count, tree=None: (20 + count) * 1e-3,
        "lookup_seconds": lambda context, count: (15 + count) * 1e-3,
        "growth_seconds": lambda context, topk, levels: 3 * levels * 1e-3,
        "tree_verification_seconds": lambda context, tree, levels: 12e-3,
        "prefill_seconds": lambda context: 4e-3,
    },
    machine: {
        "read_bandwidth": lambda num_bytes, dtype: 1e9,
        "copy_bandwidth": lambda num_bytes: 2e9,
        "matmul_peak": lambda dtype: 1e11,
        "few_rows_peak": lambda num_bytes, dtype: 1e9,
    },
}


def _decoded(seconds: float, accepted: list[int], drafted: list[int]) -> SimpleNamespace:
    times = SimpleNamespace(prefill=0.0, decode=seconds)
    return SimpleNamespace(tokens=[list(range(9))], accept_lengths=[accepted], draft_lengths=[drafted], seconds=times)


def _drafting(target: object, adapter: object, prompts: list, count: int, draft: DraftConfig, **_: object):
    alone = draft.tree is None and draft.lookup is None
    return _decoded(0.4 if alone else 0.2, [4, 4], [draft.max_draft_len] * 2)


# Every draft is accepted: rounds of four tokens. A tree is twice as fast as the single sequence, and that as plain
# decoding; so are look-ups, but nothing is found.
DECODING = {
    tree_speed: {"generate_plain": lambda *_, **__: _decoded(0.8, [1] * 8, [0] * 8), "generate": _drafting},
    tuning: {
        "record": lambda *_: Chains(np.full((8, 12), 0.9, np.float32), np.full(8, 3)),
        "record_found": lambda *inputs: {lookup: Found(np.zeros(8, bool), np.zeros(8, int)) for lookup in inputs[3]},
        "record_trees": lambda *inputs: {
            topk: Trees(np.full((8, 12), 0.9, np.float32), np.zeros((8, 12, 12), int)) for topk in inputs[5]
        },
    },
}
FOUND = {
    tuning: {"record_found": lambda *inputs: {lookup: Found(np.ones(8, bool), np.full(8, 12)) for lookup in inputs[3]}}
}
# This machine's device, with as many KiB of memory as the name says.
MACHINES = {
    machines: {
        "find_machine": lambda name: machines.Machine(
            name, jax.devices()[:1], int(name) * 2**10, machines.Limits(1e6, {"float32": 4e6})
        )
    }
}
FAKES = {"fake:times": TIMES, "fake:decoding": DECODING, "fake:found": FOUND, "fake:machines": MACHINES}


def flags_of_library() -> list[str]:
    """The flags that importing every module of kangaroo_jax.bench defines."""
    before = set(flags.FLAGS)
    for module in pkgutil.iter_modules(kangaroo_jax.bench.__path__):
        if module.name != "__main__":
            importlib.import_module(f"kangaroo_jax.bench.{module.name}")
    return sorted(set(flags.FLAGS) - before)


@contextlib.contextmanager
def without(name: str) -> Iterator[None]:
    """Makes an import of the module fail."""
    module = sys.modules.get(name)
    sys.modules[name] = None
    yield
    del sys.modules[name]
    if module is not None:
        sys.modules[name] = module


def run(line: list[str]) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    loaded = set(sys.modules)
    words = [word for word in line if not word.startswith(("without:", "fake:"))]
    hidden = [word.removeprefix("without:") for word in line if word.startswith("without:")]
    saved = flagsaver.save_flag_values()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(mock.patch.object(sys, "argv", ["bench", *words]))
        for name in hidden:
            stack.enter_context(without(name))
        for word in filter(FAKES.__contains__, line):
            for module, functions in FAKES[word].items():
                stack.enter_context(mock.patch.multiple(module, **functions))
        try:
            bench.main()
        except SystemExit as stop:
            code = stop.code or 0
    # Two commands have flags of the same name: forget this one's.
    flagsaver.restore_flag_values(saved)
    for name in sorted(set(sys.modules) - loaded):
        if name.startswith("kangaroo_jax.cli."):
            package, _, module = name.rpartition(".")
            del sys.modules[name]
            delattr(sys.modules[package], module)
    return code, out.getvalue(), err.getvalue()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    print(json.dumps(flags_of_library()), file=answers, flush=True)
    app.define_help_flags()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
