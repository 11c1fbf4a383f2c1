"""Against traces of the authors' own PyTorch code (tests/fixtures/golden): tokens and every accept length.

Their loop stops a round's length early, so their accept lengths are the beginning of ours.
"""

import functools
import json
import pathlib

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
