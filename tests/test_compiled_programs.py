"""What compilers for accelerators make of decoding's programs: nothing is copied or gathered that need not be. Each is
skipped where its compiler is not installed."""

import dataclasses
import functools
import importlib.util
import re

import pytest

from kangaroo_jax import DraftConfig, program
from kangaroo_jax.checkpoint.known_models import model_config
from kangaroo_jax.model import sharding
from kangaroo_jax.preflight.decoding import Work
from kangaroo_jax.preflight.machines import find_machine
from tests.test_preflight import TARGET

pytestmark = pytest.mark.long
_MODULES = {"v5e": "libtpu", "h100": "jax_cuda13_plugin"}
# A TPU's lanes divide a head and the MLP's width, as in large models: else what goes into a program has another order
# of axes. Two devices share the vocabulary and the heads.
CONFIG = dataclasses.replace(model_config(str(TARGET)), head_dim=128, intermediate_size=384, vocab_size=512)
CACHE, MLP = "1,2,512,128", "128,2,384"


@functools.cache
def compiled(machine, model_parallel=1, batch=1):
    """Texts and reports of rounds with drafts and of plain ones, in bfloat16."""
    module = _MODULES[machine.partition(":")[0]]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    found = find_machine(machine)
    mesh = sharding.decoding_mesh(model_parallel, found.devices)
    work = Work(CONFIG, None, "bfloat16", DraftConfig(2, 2), 64, 32, found, mesh, batch)
    texts, body = {}, program.body
    with pytest.MonkeyPatch.context() as patch:
        reports = {}
        for run in (work.rounds, work.plain_rounds):
            patch.setattr(program, "body", lambda text: texts.update({run.__name__: text}) or body(text))  # noqa: B023
            reports[run.__name__] = run()
    return texts, reports


def copies(text, shape, memories=1):
    """Instructions that copy an array of this shape. On a machine of several `memories` per device, as a TPU, those
    that give it another order of axes: a copy between memories keeps the order."""
    order = rf"\w+\[{shape}\]\{{([\d,]+)"
    found = []
    for line in text.splitlines():
        match = re.search(rf"= \(?{order}\S* .*?\b(?:copy|copy-start|transpose)\(%?([\w.\-]+)\)", line)
        if match is None:
            continue
        source = re.search(rf"^\s*%?{re.escape(match.group(2))} = \(?{order}", text, re.MULTILINE)
        if memories == 1 or source is None or source.group(1) != match.group(1):
            found.append(line.strip()[:120])
    return found


@pytest.mark.parametrize("machine", ["v5e:1x1", "h100"])
@pytest.mark.parametrize("name", ["rounds", "plain_rounds"])
def test_no_cache_is_copied_in_a_loop_or_at_its_edges(machine, name):
    texts, _ = compiled(machine)
    assert re.search(rf"\w+\[{CACHE}\]", texts[name])
    assert copies(texts[name], CACHE, 2 if machine == "v5e:1x1" else 1) == []


@pytest.mark.parametrize("name", ["rounds", "plain_rounds"])
def test_no_weight_of_the_shallow_layers_is_copied_to_another_order(name):
    texts, _ = compiled("v5e:1x1")
    assert re.search(rf"bf16\[{MLP}\]", texts[name])
    outside = re.sub(r"^%?[\w.\-]*fus[\w.\-]* \(.*?^\}", "", texts[name], flags=re.MULTILINE | re.DOTALL)
    assert copies(outside, MLP, 2) == []


@pytest.mark.parametrize("machine", ["v5e:2x2", "h100:2"])
def test_with_tensor_parallelism_no_weight_is_gathered(machine):
    """Gathered are a few numbers of each device: the best logit and its token."""
    _, reports = compiled(machine, 2)
    for report in reports.values():
        assert report.collectives["all-reduce"].count > 0
        # Plain rounds may gather logits. Sums are of activations, a row of hidden states each.
        others = {kind: found.num_bytes for kind, found in report.collectives.items() if kind != "all-reduce"}
        assert sum(others.values()) <= 8 * CONFIG.vocab_size, others


@pytest.mark.parametrize(("machine", "model_parallel"), [("v5e:1x1", 1), ("v5e:2x2", 2), ("h100", 1)])
def test_a_batch_is_written_to_its_caches_without_a_loop_over_sequences(machine, model_parallel):
    """The loops are that of rounds and, inside, that of draft steps."""

    def loops(body):
        return [(loop.name, loops(loop)) for loop in body.loops]

    _, reports = compiled(machine, model_parallel, 8)
    (drafting,) = loops(reports["rounds"].body)[0][1]
    assert (len(reports["rounds"].body.loops), drafting) == (1, ("jit(run_rounds)/while/body/draft/while", []))
    assert [inner for _, inner in loops(reports["plain_rounds"].body)] == [[]]
