"""Against traces of the authors' own PyTorch code (tests/fixtures/golden): tokens and every accept length.

Their loop stops a round's length early, so their accept lengths are the beginning of ours.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from kangaroo_jax import DraftConfig, generate, generate_plain, load_adapter, load_target

GOLDEN = pathlib.Path(__file__).parents[1] / "fixtures" / "golden"
TRACES = {name: json.loads((GOLDEN / f"traces-{name}.json").read_text()) for name in ("mha", "gqa")}


@functools.cache
def load(name):
    target = load_target(str(GOLDEN / f"tiny-{name}"), "float32")
    return target, load_adapter(str(GOLDEN / f"tiny-{name}-adapter-orbax"), target)


def cases():
    """All traces; quick are the paper's gamma for each model, and gamma 1."""
    seen = set()
    for name, traces in TRACES.items():
        for i, trace in enumerate(traces):
            quick = trace["gamma"] in (1, 6) and (name, trace["gamma"]) not in seen
            yield pytest.param(name, i, marks=[] if quick else [pytest.mark.long])
            seen.add((name, trace["gamma"]))


@pytest.mark.parametrize(("name", "index"), list(cases()))
def test_tokens_and_accept_lengths_equal_the_authors(name, index):
    trace = TRACES[name][index]
    target, adapter = load(name)
    prompt = trace["prompt"]
    draft = DraftConfig(trace["exit_layer"], trace["gamma"], trace["eta"])
    out = generate(target, adapter, [prompt], trace["max_new_tokens"], draft)
    assert prompt + out.tokens[0] == trace["greedy_ids"]
    theirs = trace["accept_lengths"][1:]
    assert len(theirs) > 5
    assert out.accept_lengths[0][: len(theirs)] == theirs
    assert 1 + sum(out.accept_lengths[0]) == len(out.tokens[0])


@pytest.mark.parametrize("name", TRACES)
def test_plain_decoding_equals_the_authors_greedy(name):
    target, _ = load(name)
    trace = TRACES[name][0]
    out = generate_plain(target, [trace["prompt"]], trace["max_new_tokens"])
    assert trace["prompt"] + out.tokens[0] == trace["greedy_ids"]


_LAYOUTS = """
import json, sys
import jax
from kangaroo_jax import DraftConfig, generate, load_adapter, load_target
from kangaroo_jax.engine import engine
from kangaroo_jax.model import sharding
from kangaroo_jax.model.attention.dense import DenseBackend

golden, results = sys.argv[1], []
for name, data, model, platform in (
    ("mha", 1, 1, None), ("gqa", 1, 1, "tpu"), ("mha", 1, 2, None), ("gqa", 2, 2, None), ("mha", 4, 1, "tpu")
):
    mesh = None if data * model == 1 else sharding.decoding_mesh(model, jax.devices(), data)
    sharding._ORDERS = {"cpu": sharding._tpu_order} if platform == "tpu" else {}
    engine.choose_backend = lambda mesh, devices: DenseBackend(mesh, platform)
    target = load_target(f"{golden}/tiny-{name}", "float32", mesh)
    adapter = load_adapter(f"{golden}/tiny-{name}-adapter-orbax", target)
    for trace in [x for x in json.load(open(f"{golden}/traces-{name}.json")) if x["gamma"] in (1, 6)][:2]:
        draft = DraftConfig(trace["exit_layer"], trace["gamma"], trace["eta"])
        out = generate(target, adapter, [trace["prompt"]] * data, trace["max_new_tokens"], draft)
        theirs = trace["accept_lengths"][1:]
        for tokens, lengths in zip(out.tokens, out.accept_lengths):
            results.append([trace["prompt"] + tokens == trace["greedy_ids"], lengths[: len(theirs)] == theirs])
print(json.dumps(results))
"""


@pytest.mark.long
def test_accelerators_layouts_and_meshes_equal_the_authors():
    """On 4 virtual devices: caches as accelerators have them, weights in TPUs' order of axes, both split."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": str(GOLDEN.parents[2]),
    }
    command = [sys.executable, "-c", _LAYOUTS, str(GOLDEN)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert results == [[True, True]] * (2 * (1 + 1 + 1 + 2 + 4))
