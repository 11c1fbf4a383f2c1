"""Layers with windows in a running batch: their caches are rings, and everything is as with caches of all positions.

Truth: the same engine with caches of all positions, whose windows are masks; plain decoding with them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Generator
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import DecideConfig, DraftConfig, Engine, EngineConfig, LookupConfig, Request, TreeConfig
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target, save_target
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.decode import rounds as rounds_module
from kangaroo_jax.decode.rounds import RoundShape
from kangaroo_jax.engine import engine as engine_module
from kangaroo_jax.engine import shapes as shapes_module
from kangaroo_jax.engine.requests import Answer
from kangaroo_jax.engine.shapes import Shapes
from kangaroo_jax.model.attention.backend import AttentionBackend
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.config import AttentionKind
from kangaroo_jax.model.drafts.kinds import KINDS
from tests.decode.models import VOCABULARY, lettered_target
from tests.decode.test_families import target_of
from tests.engine.test_engine import run

WINDOW = 6  # of the first two layers and the last; that between them has none
COSTS = RoundCosts(1, 0.25, ((1, 1.0), (2, 1.05), (6, 1.3)), 0.05)
LOOKUP = LookupConfig(5, 2, 3)
DRAFTS = {
    "sequence": DraftConfig(2, 4, 0.05),
    "tree": DraftConfig(2, 3, 0.02, TreeConfig(4, 12)),
    "look-up": DraftConfig(2, 4, 0.05, lookup=LOOKUP),
    "decided": DraftConfig(2, 4, lookup=LOOKUP, decide=DecideConfig((COSTS,))),
}


@functools.cache
def target() -> Target:
    return dataclasses.replace(target_of("gemma3_text"), tokenizer=lettered_target().tokenizer)


@functools.cache
def adapter(kind: str, num_layers: int) -> TrainedAdapter:
    model = KINDS[kind](target().config, rngs=nnx.Rngs(1), num_layers=num_layers)
    strong = jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, model)
    return TrainedAdapter(strong, 2, "adapter", target_fingerprint=None)


@pytest.fixture(autouse=True)
def short_pieces_and_smallest_rings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "PIECE", 64)
    monkeypatch.setattr(shapes_module, "PIECE", 64)
    monkeypatch.setattr(shapes_module, "_RING_STEP", 1)
    monkeypatch.setattr(rounds_module, "_MAX_WIDTHS", 2)  # less to compile


def of_all_positions(*args: object) -> Engine:
    with mock.patch.object(Shapes, "rings", lambda self, kinds: ()):
        return Engine(*args)


def measured(answer: Answer) -> tuple[list[int], ...]:
    return answer.tokens, answer.accept_lengths, answer.draft_lengths, answer.lookup_lengths


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "kind", "adapter_kind", "layers"),
    [
        (CpuBackend(), "tree", "memory", 1),
        (CpuBackend(), "look-up", "memory", 1),
        (CpuBackend(), "decided", "kangaroo", 2),
        (DenseBackend(), "sequence", "kangaroo", 2),
    ],
    ids=["tree", "look-up", "decided", "dense"],
)
def test_requests_in_slots_that_are_refilled(
    monkeypatch: pytest.MonkeyPatch, backend: AttentionBackend, kind: str, adapter_kind: str, layers: int
) -> None:
    """Prompts around the window's length, the ring's, and a piece's; each goes round several times."""
    monkeypatch.setattr(engine_module, "choose_backend", lambda mesh, devices: backend)
    models = target(), adapter(adapter_kind, layers), EngineConfig(3), DRAFTS[kind]
    engines = Engine(*models), of_all_positions(*models)
    ring = engines[0]._rings[0]
    assert engines[0]._rings == (ring, ring, None, ring)
    rng = np.random.default_rng(0)
    # The longest first and last, so that the caches keep their size.
    lengths = [150, 1, WINDOW - 1, WINDOW, WINDOW + 1, ring - 1, ring, ring + 1, 64, 65, 149]
    prompts = [rng.integers(0, 4 if i % 2 else VOCABULARY, length).tolist() for i, length in enumerate(lengths)]
    requests = [Request(prompt, 80 - 3 * i, eos_token_ids=()) for i, prompt in enumerate(prompts)]
    found = []
    for engine in engines:
        ids = [engine.add(request) for request in requests]
        answers = run(engine)[0]
        found.append([measured(answers[id]) for id in ids])
    assert found[0] == found[1]
    assert len({length for _, lengths, _, _ in found[0] for length in lengths}) > 2
    assert len({token for tokens, _, _, _ in found[0] for token in tokens}) > 20
    for engine, places in zip(engines, (ring, engines[1]._capacity), strict=True):
        caches = engine._state.shallow, engine._state.deep
        held = [engine._backend.capacity(values) for cache in caches for values in cache.values]
        assert held == [places, places, engine._capacity, places]
    assert ring < engines[0]._capacity


def session(seed: int) -> Generator[tuple[Request, bool], list[int] | None]:
    """Prompts, and whether they are taken back: new ones, ones that go on from the last answer, or from a part of it.
    The last answer is sent in."""
    rng = np.random.default_rng(seed)
    text: list[int] = []
    while True:
        how = rng.choice(["new", "on", "on", "part"]) if text else "new"
        more = rng.integers(0, VOCABULARY, rng.integers(1, 40)).tolist()
        start = {"new": 0, "on": len(text), "part": int(rng.integers(0, len(text) + 1))}[how]
        prompt = (text[:start] + more)[-150:]
        stop = ["ab", "c"] if rng.random() < 0.3 else None
        request = Request(prompt, int(rng.integers(20, 70)), eos_token_ids=[int(rng.integers(0, 48))], stop=stop)
        answer = yield request, rng.random() < 0.15
        text = prompt + (answer or [])


@pytest.mark.long
@pytest.mark.parametrize(("kind", "step"), [("sequence", 40), ("decided", 1)])
def test_beginnings_that_a_slot_holds_are_used_again_or_not_and_tokens_stay_the_same(
    monkeypatch: pytest.MonkeyPatch, kind: str, step: int
) -> None:
    """Answers that end by EOS, by their length, by a stop string, which the device does not know, and in the middle."""
    monkeypatch.setattr(shapes_module, "_RING_STEP", step)
    models = target(), adapter("kangaroo", 2), EngineConfig(1), DRAFTS[kind]
    engine, other = Engine(*models), of_all_positions(target(), None, EngineConfig(1))
    used, refused = 0, 0
    requests = session(0)
    sent = None
    for _ in range(30):
        request, taken_back = requests.send(sent)
        if taken_back:
            id = engine.add(request)
            for _ in range(2):
                engine.step()
            engine.abort(id)
        ids = [one.add(request) for one in (engine, other)]
        answer, expected = (run(one)[0][id] for one, id in zip((engine, other), ids, strict=True))
        assert answer.tokens == expected.tokens
        used += answer.reused_tokens > 0
        refused += expected.reused_tokens > 0 and answer.reused_tokens == 0
        sent = answer.tokens
    assert used > 2
    assert refused > 0


@pytest.mark.long
@pytest.mark.parametrize(("kind", "ends"), [("sequence", "stop string"), ("sequence", "limit"), ("decided", "limit")])
def test_an_answer_that_the_device_went_beyond_is_not_gone_on_from(kind: str, ends: str) -> None:
    """A stop string is found in the text, after the device has decoded more: the ring lacks what is before its end.
    Where another answer is gone on from, it holds the window."""
    engine, other = (Engine(target(), adapter("kangaroo", 1), EngineConfig(1), DRAFTS[kind]) for _ in range(2))
    prompt = np.random.default_rng(3).integers(0, VOCABULARY, 40).tolist()
    id = other.add(Request(prompt, 90, eos_token_ids=()))
    text = run(other)[0][id].text
    length = next(i for i in range(5, 90) if text[i] not in text[:i])  # a letter is a token
    cut = {"stop": [text[length]], "max_new_tokens": 90} if ends == "stop string" else {"max_new_tokens": length + 1}
    id = engine.add(Request(prompt, eos_token_ids=(), **cut))
    answer = run(engine)[0][id]
    assert len(answer.tokens) == length + 1
    longer = Request(prompt + answer.tokens + [7, 8, 9], 40, eos_token_ids=())
    found = []
    for one in (engine, Engine(target(), adapter("kangaroo", 1), EngineConfig(1), DRAFTS[kind])):
        id = one.add(longer)
        found.append(run(one)[0][id])
    assert found[0].tokens == found[1].tokens
    unseen = max(1, engine.shapes.round.kept)  # by the draft model
    assert found[0].reused_tokens == (0 if ends == "stop string" else len(prompt) + length - unseen)


@pytest.mark.long
def test_caches_that_grow_into_rings_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 160 positions: caches of 128 hold all, larger ones do not."""
    monkeypatch.setattr(shapes_module, "_RING_STEP", 160)
    monkeypatch.setattr(shapes_module, "_AT_ONCE", 128)
    models = target(), adapter("kangaroo", 1), EngineConfig(2), DRAFTS["sequence"]
    engines, found, sizes = (Engine(*models), of_all_positions(*models)), [], set()
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (20, 30, 40, 10, 150)]
    for engine in engines:
        answers = {}
        for wave in (((0, 300), (1, 60)), ((2, 30), (3, 40)), ((4, 100), (2, 60))):
            ids = [engine.add(Request(prompts[i], most, eos_token_ids=())) for i, most in wave]
            while engine.busy:
                answers |= {event.id: event.answer for event in engine.step() if hasattr(event, "answer")}
                sizes.add((engine._capacity, engine._backend.capacity(engine._state.deep.values[-1])))
            assert ids[0] in answers
        found.append([measured(answers[id]) for id in sorted(answers)])
    assert found[0] == found[1]
    assert {(128, 128), (192, 160), (384, 160), (384, 384)} <= sizes


_ON_A_MESH = """
import functools, json, re, sys
import jax, numpy as np

from kangaroo_jax import Engine, EngineConfig, Request, load_target
from kangaroo_jax.decode import rounds
from kangaroo_jax.engine import engine as engine_module, shapes
from kangaroo_jax.model import sharding
from tests.engine import test_rings
from tests.engine.test_engine import run

engine_module.PIECE = shapes.PIECE = 32
shapes._RING_STEP, rounds._MAX_WIDTHS = 1, 2
folder, kind, lengths, results = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), []
rng = np.random.default_rng(0)
prompts = [rng.integers(0, 4 if i % 2 else test_rings.VOCABULARY, length).tolist() for i, length in enumerate(lengths)]
for data, model in ((1, 1), (2, 2)):
    mesh = None if data * model == 1 else sharding.decoding_mesh(model, jax.devices(), data)
    target = load_target(folder, "float32", mesh)
    engine = Engine(target, test_rings.adapter("kangaroo", 1), EngineConfig(4), test_rings.DRAFTS[kind])
    ids = [engine.add(Request(prompt, 50, eos_token_ids=())) for prompt in prompts]
    answers = run(engine)[0]
    state, ring = engine._state, engine._rings[0]
    held = [cache.keys[-1].addressable_shards[0].data.shape for cache in (state.shallow, state.deep, state.draft.cache)]
    answers = [test_rings.measured(answers[id]) for id in ids]
    results.append({"answers": answers, "held": held, "ring": ring})
program = functools.partial(rounds.run_rounds, shape=engine.shapes.round, sampled=False, tokens=32)
inputs = (*engine._weights, state, np.ones(4, bool), np.float32(0), 0, 32)
text = jax.jit(program).lower(*inputs).compile().as_text()
gathered = re.findall(r"= (\\S+) all-gather\\(", text)
print(json.dumps([*results, gathered, "all-reduce(" in text]))
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sequence", "tree"])
def test_rings_split_over_4_devices_give_the_tokens_of_one(kind: str, tmp_path: pathlib.Path) -> None:
    """Sequences over two devices and heads over two; prompts shorter and longer than window, ring and piece."""
    save_target(target().model, tmp_path, jnp.float32)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
    }
    lengths = [70, 1, WINDOW - 1, WINDOW + 1, 40]
    done = subprocess.run(
        [sys.executable, "-c", _ON_A_MESH, tmp_path, kind, json.dumps(lengths)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    one, four, gathered, is_split = json.loads(done.stdout.splitlines()[-1])
    assert four["answers"] == one["answers"]
    assert len({length for _, lengths, _, _ in one["answers"] for length in lengths}) > 2
    ring = one["ring"]
    assert one["held"] == [[8, 8, ring]] * 3  # the CPU's own layout: 4 sequences x 2 heads
    assert four["held"] == [[2, 1, ring, 8]] * 3
    assert is_split
    assert not [shape for shape in gathered if f",{ring},8]" in shape]


def test_rings_hold_the_window_and_what_rounds_write(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [AttentionKind(None, window) for window in (4096, None, 1024)]
    shapes = Shapes(RoundShape(2, 6, None, (7,)))  # 7 positions, and the one before the last token
    assert shapes.rings(kinds) == (4096 + 7, None, 1024 + 7)
    assert Shapes(dataclasses.replace(shapes.round, kept=25)).rings(kinds)[0] == 4096 + 6 + 25
    monkeypatch.setattr(shapes_module, "_RING_STEP", 128)
    assert shapes.rings(kinds) == (4224, None, 1152)
    assert shapes.rings(kinds[1:2]) == ()
