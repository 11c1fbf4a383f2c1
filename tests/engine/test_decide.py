"""Sequences that decide how far to draft, in a running batch: whatever they decide, tokens are plain decoding's; what a
sequence decides depends on itself alone; and the draft model loses nothing by not being run.

Truth: plain decoding; each request alone, in an engine of the same settings; prefill of the committed tokens.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from kangaroo_jax import (
    DecideConfig,
    DraftConfig,
    Engine,
    EngineConfig,
    LookupConfig,
    Request,
    SamplingConfig,
    generate,
    generate_plain,
)
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.decode.decide import Costs
from kangaroo_jax.decode.prefill import Admission, prefill, resize
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.engine.costs import predicted
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from tests.decode.models import LAYERS, VOCABULARY, tiny_adapter, tiny_target
from tests.engine.test_engine import run

# Where drafts pay at some places of a text and not at others; a probe each few rounds; and where they cannot pay.
UNDECIDED = RoundCosts(1, 0.25, ((1, 1.0), (2, 1.05), (6, 1.3)), 0.05)
OF_THREE = RoundCosts(3, 0.08, ((1, 1.0), (2, 1.02), (6, 1.1)), 0.05)  # as undecided, where others wait for drafts
HOPELESS = RoundCosts(1, 5.0, ((1, 1.0), (2, 2.0)), 0.1)
CHEAP = RoundCosts(1, 0.01, ((1, 1.0),), 0.01)
LOOKUP = LookupConfig(5, 2, 3)


def draft_of(costs, lookup=None):
    return DraftConfig(2, 4, lookup=lookup, decide=DecideConfig((costs,)))


def test_an_engine_of_few_slots_keeps_to_gamma_and_eta_where_only_batches_decide():
    fixed = DraftConfig(2, 4, 0.3)
    draft = dataclasses.replace(fixed, decide=DecideConfig((HOPELESS,), from_slots=2))
    engines = {
        (slots, one): Engine(tiny_target(), tiny_adapter(2), EngineConfig(slots), one)
        for slots in (1, 2)
        for one in (fixed, draft, draft_of(HOPELESS))
    }
    shapes = {key: engine.shapes.round for key, engine in engines.items()}
    assert shapes[1, draft] == shapes[1, fixed] != shapes[1, draft_of(HOPELESS)]
    assert shapes[2, draft] == shapes[2, draft_of(HOPELESS)] != shapes[2, fixed]


def requests():
    """More than slots: repetitive and random prompts, greedy and sampled, short and long answers."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 4 if i % 2 else VOCABULARY, rng.integers(1, 40)).tolist() for i in range(7)]
    sampling = [None, SamplingConfig(0.8, seed=3)]
    return [
        Request(prompt, int(rng.integers(40, 90)), sampling[i % 3 == 2], eos_token_ids=(), drafts=True)
        for i, prompt in enumerate(prompts)
    ]


def kinds_of(answer):
    """What each round drafted with."""
    pairs = zip(answer.draft_lengths, answer.lookup_lengths, strict=True)
    return ["looked up" if found else "drafted" if steps else "nothing" for steps, found in pairs]


def test_tokens_are_plain_decoding_s_whatever_is_drafted():
    prompts = [[1, 2, 3, 1, 2, 3, 1, 2], list(range(20, 31))]
    out = generate(tiny_target(), tiny_adapter(2), prompts, 60, draft_of(UNDECIDED, LOOKUP), eos_token_ids=())
    assert out.tokens == generate_plain(tiny_target(), prompts, 60, eos_token_ids=()).tokens
    pairs = zip(*(itertools.chain(*lengths) for lengths in (out.draft_lengths, out.lookup_lengths)), strict=True)
    assert {(steps > 0, found > 0) for steps, found in pairs} == {(False, False), (True, False), (False, True)}


@pytest.mark.long
@pytest.mark.parametrize("lookup", [None, LOOKUP], ids=["drafts", "look-ups"])
def test_requests_in_slots_that_are_refilled(lookup):
    """In all kinds of rounds, tokens are plain decoding's, and everything is as it is alone."""
    engine = Engine(tiny_target(), tiny_adapter(2), EngineConfig(3), draft_of(OF_THREE, lookup))
    ids = [engine.add(request) for request in requests()]
    answers = run(engine)[0]
    seen = []
    for i, (request, id) in enumerate(zip(requests(), ids, strict=True)):
        answer = answers[id]
        if request.sampling is None:
            plain = generate_plain(tiny_target(), [request.prompt], request.max_new_tokens, eos_token_ids=())
            assert answer.tokens == plain.tokens[0]
        if i < 3:  # one greedy, one of a repetitive prompt, one sampled
            again = engine.add(request)
            alone = run(engine)[0][again]
            assert (alone.tokens, alone.accept_lengths) == (answer.tokens, answer.accept_lengths)
            assert kinds_of(alone) == kinds_of(answer)
        seen += kinds_of(answer)
        assert all(len(round.drafted) <= 5 for round in answer.rounds)
    # The cases must be worth checking.
    for kind in ("drafted", "nothing", *(["looked up"] if lookup else [])):
        assert 0.02 < seen.count(kind) / len(seen) < 0.98, kind


@pytest.mark.long
def test_a_conversation_whose_beginning_a_slot_holds():
    """What the draft model has not seen is not taken for what it has."""
    engine = Engine(tiny_target(), tiny_adapter(2), EngineConfig(1), draft_of(HOPELESS))
    fresh = functools.partial(Engine, tiny_target(), tiny_adapter(2), EngineConfig(1))
    prompt = [*range(20), *range(6)]
    for turn in range(3):
        id = engine.add(Request(prompt, 60, eos_token_ids=()))
        answer = run(engine)[0][id]
        assert answer.tokens == generate_plain(tiny_target(), [prompt], 60, eos_token_ids=()).tokens[0]
        assert (answer.reused_tokens > 0) == (turn > 0)
        prompt = prompt + answer.tokens + [40, 41, 42, 43, 44]
    # Drafts of a last turn, with the same program and other costs, are those of an engine that holds nothing.
    rounds = []
    for one in (engine, fresh(draft_of(CHEAP))):
        one._costs = fresh(draft_of(CHEAP))._costs
        id = one.add(Request(prompt, 40, eos_token_ids=(), drafts=True))
        rounds.append(run(one)[0][id])
    assert rounds[0].reused_tokens > 0
    assert [round.drafted for round in rounds[0].rounds] == [
        [dataclasses.replace(ours, confidence=pytest.approx(ours.confidence, abs=1e-4)) for ours in round.drafted]
        for round in rounds[1].rounds
    ]
    assert sum(len(round.drafted) for round in rounds[0].rounds) > 20


@pytest.mark.long
def test_answers_that_end_at_the_caches_end():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, 41).tolist() for _ in range(4)]
    plain = generate_plain(tiny_target(), prompts, 160).tokens
    draft = draft_of(UNDECIDED, LookupConfig(20, 1, 3))
    positions = RoundShape.kangaroo(2, draft, VOCABULARY, "cpu").positions
    for limit in sorted({128 - reserve - 41 + extra for reserve in (positions, 22, 5) for extra in (-1, 0, 1)}):
        out = generate(tiny_target(), tiny_adapter(2), prompts, limit, draft)
        assert out.tokens == [tokens[:limit] for tokens in plain], limit


def test_costs_are_predicted_from_bytes_where_none_are_given():
    target, adapter = tiny_target(), tiny_adapter(2)
    shape = RoundShape.kangaroo(2, DraftConfig(2, 4, decide=DecideConfig()), VOCABULARY, "cpu")
    layer = 4 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)  # attention, MLP and norms, in float32
    head, drafter = 4 * 48 * 32, 4 * (32 * 32 * 2 + 2 * 32 * 16 + 2 * 32)
    costs = predicted(target, adapter, shape, 1, "cpu")
    assert costs.shallow == pytest.approx(2 * layer / (LAYERS * layer + head))
    assert costs.draft_step == pytest.approx((2 * layer + drafter + head) / (LAYERS * layer + head))
    assert dict(costs.verification)[1] == 1
    assert dict(costs.verification)[5] == pytest.approx(1.40)
    # Of a batch, plain steps take longer too.
    assert dict(predicted(target, adapter, shape, 8, "cpu").verification)[5] == pytest.approx(3.85 / 1.61)
    assert dict(predicted(target, adapter, shape, 8, "gpu").verification)[5] == 1
    assert dict(predicted(target, adapter, shape, 80, "gpu").verification)[5] == pytest.approx(400 / 240)


class Rounds:
    """Two sequences, decoded by the program that engines run, with costs that change on the way."""

    def __init__(self, backend, tokens):
        draft = DraftConfig(2, 4, decide=DecideConfig())
        self.shape, self.backend = RoundShape.kangaroo(2, draft, VOCABULARY, "cpu"), backend
        self.model, self.adapter = tiny_target().model, tiny_adapter(2).model
        self.tokens = tokens
        self.program = jax.jit(functools.partial(run_rounds, shape=self.shape, sampled=False, tokens=tokens))

    def start(self, sequences, kept):
        lengths = np.asarray([len(tokens) for tokens in sequences], np.int32)
        rows = np.asarray([[*tokens, *[0] * (128 - len(tokens))] for tokens in sequences], np.int32)
        admission = Admission(np.full(2, 200, np.int32), np.full((2, 4), -1, np.int32), Sampling.greedy(2))
        static = {"exit_layer": 2, "capacity": 256, "backend": self.backend, "sampled": False, "kept": kept}
        return prefill(self.model, self.adapter, rows, lengths, admission, **static)

    def run(self, state, costs):
        costs = Costs.of(costs, 0.7, 1, 4, None)
        state, chunk = self.program(
            self.model, self.adapter, state, np.ones(2, bool), np.float32(0), 0, self.tokens, costs
        )
        return state, [chunk.tokens[i, : chunk.num_tokens[i]].tolist() for i in range(2)], chunk


@pytest.mark.long
@pytest.mark.parametrize("backend", [CpuBackend(), DenseBackend()], ids=["cpu", "dense"])
def test_the_draft_model_catches_up_on_what_it_has_not_seen(backend):
    rounds, prompts = Rounds(backend, 10), [[1, 2, 3], list(range(20, 31))]
    state = rounds.start(prompts, rounds.shape.kept)
    committed = [[*prompt, int(first)] for prompt, first in zip(prompts, state.token, strict=True)]
    behind = []
    for costs in (HOPELESS, HOPELESS, HOPELESS, CHEAP, CHEAP, HOPELESS, CHEAP):
        before = state
        state, new, chunk = rounds.run(state, costs)
        committed = [tokens + more for tokens, more in zip(committed, new, strict=True)]
        behind.append(state.pace.behind.tolist())
        drafted = np.max(chunk.draft_lengths) > 0
        assert drafted == (costs is CHEAP or len(behind) > 3)  # what was cheap is given up after a few dear rounds
        if state.pace.behind[0] == before.pace.behind[0] + 10:
            # Nothing of the draft model has run: its cache is as it was.
            ours, theirs = state.draft.cache, before.draft.cache
            jax.tree.map(np.testing.assert_array_equal, (ours.keys, ours.values), (theirs.keys, theirs.values))
    assert [10, 10] in behind
    # Caught up, the cache is what prefill of the same tokens leaves, and what is kept is what it would keep.
    while min(state.pace.behind) <= 3:  # a probe comes now and then
        state, new, _ = rounds.run(state, HOPELESS)
        committed = [tokens + more for tokens, more in zip(committed, new, strict=True)]
    expected = rounds.start([tokens[:-1] for tokens in committed], rounds.shape.kept).draft
    # Also in caches that end behind what the next round fills: catching up writes more.
    end = int(max(state.shallow.length)) + rounds.shape.positions
    assert min(state.pace.behind) + rounds.shape.positions < rounds.shape.kept
    for held in (state, resize(state, end)):
        ours = rounds.adapter.catch_up(held.draft, held.shallow.length, held.pace.behind)
        for i, tokens in enumerate(committed):
            ours_row, expected_row = (cache.row(i).resized(len(tokens) - 1) for cache in (ours.cache, expected.cache))
            pairs = zip(ours_row.keys + ours_row.values, expected_row.keys + expected_row.values, strict=True)
            for x, y in pairs:
                np.testing.assert_allclose(x, y, atol=2e-4)
        np.testing.assert_allclose(ours.last, expected.last, atol=2e-4)
