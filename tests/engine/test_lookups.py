"""Look-ups in a running batch: what each round looks up is what stands in its sequence's own tokens, however these came
into its slot.

Truth: a slow search in plain Python, after each round of each answer; plain decoding; each request alone.
"""

import dataclasses

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, Engine, EngineConfig, LookupConfig, Request, SamplingConfig, generate_plain
from kangaroo_jax.engine import engine as engine_module
from kangaroo_jax.engine.shapes import PIECE
from kangaroo_jax.model.attention.dense import DenseBackend
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target
from tests.decode.test_lookup import slow_look_up
from tests.engine.test_engine import long_target, run

LOOKUP = LookupConfig(5, 2, 3)
DRAFT = DraftConfig(2, 4, 0.1, lookup=LOOKUP)
SAMPLING = [None, SamplingConfig(0.8, seed=3)]


def engine_of(slots, target=None):
    return Engine(target or tiny_target(), tiny_adapter(2), EngineConfig(slots), DRAFT)


def requests():
    """More than slots: repetitive and random prompts, greedy and sampled, short and long answers."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 4 if i % 2 else VOCABULARY, rng.integers(1, 40)).tolist() for i in range(7)]
    return [
        Request(prompt, int(rng.integers(5, 50)), SAMPLING[i % 3 == 2], eos_token_ids=(), drafts=True)
        for i, prompt in enumerate(prompts)
    ]


def check(request, answer):
    """Every round of an answer; returns how many looked up."""
    tokens, looked_up = request.prompt + answer.tokens[:1], 0
    for i, round in enumerate(answer.rounds):
        found = slow_look_up(tokens, LOOKUP)
        assert round.looked_up == bool(found)
        if found:
            assert [token.id for token in round.drafted] == found
            assert [token.parent for token in round.drafted] == list(range(-1, len(found) - 1))
            assert {token.confidence for token in round.drafted} == {1.0}
        assert answer.lookup_lengths[i] == len(found)
        assert answer.draft_lengths[i] == (0 if found else len(round.drafted))
        tokens += round.tokens
        looked_up += bool(found)
    assert tokens == request.prompt + answer.tokens
    if request.sampling is None:
        plain = generate_plain(tiny_target(), [request.prompt], request.max_new_tokens, eos_token_ids=())
        assert answer.tokens == plain.tokens[0]
    return looked_up


def check_all(engine, requests):
    ids = [engine.add(request) for request in requests]
    answers = run(engine)[0]
    hits = sum(check(request, answers[id]) for id, request in zip(ids, requests, strict=True))
    rounds = sum(len(answers[id].rounds) for id in ids)
    assert 0.1 < hits / rounds < 0.9  # the cases must be worth checking
    return [answers[id] for id in ids]


@pytest.mark.long
def test_requests_in_slots_that_are_refilled():
    together = check_all(engine_of(3), requests())
    alone = engine_of(1)
    for request, answer in list(zip(requests(), together, strict=True))[:3]:
        id = alone.add(request)
        other = run(alone)[0][id]
        assert (other.tokens, other.accept_lengths) == (answer.tokens, answer.accept_lengths)
        assert other.lookup_lengths == answer.lookup_lengths


@pytest.mark.long
def test_a_conversation_whose_beginning_a_slot_holds():
    engine = engine_of(1)
    prompt, hits, rounds = [*range(20), *range(6)], 0, 0
    for turn in range(3):
        request = Request(prompt, 30, eos_token_ids=(), drafts=True)
        id = engine.add(request)
        answer = run(engine)[0][id]
        hits, rounds = hits + check(request, answer), rounds + len(answer.rounds)
        assert (answer.reused_tokens > 0) == (turn > 0)
        prompt = prompt + answer.tokens + [40, 41, 42, 43, 44]
    assert 0.1 < hits / rounds < 0.9


@pytest.mark.long
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_long_prompt_in_pieces_beside_a_short_one(extra):
    engine = engine_of(2, long_target())
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 2 * PIECE + extra).tolist()
    short, long = Request([1, 2, 3], 90, drafts=True), Request(prompt, 40, drafts=True)
    ids = [engine.add(short)]
    engine.step()
    ids.append(engine.add(long))
    answers = run(engine)[0]
    for request, id in zip((short, long), ids, strict=True):
        greedy = dataclasses.replace(request, sampling=SamplingConfig())  # plain decoding has another context
        assert check(greedy, answers[id]) > 5


@pytest.mark.long
def test_caches_that_grow_and_shrink():
    engine = engine_of(2, long_target())
    first = Request([1, 2, 3], 1100, sampling=SamplingConfig(1.2, seed=1), drafts=True)
    id = engine.add(first)
    answers, seen, second = {}, set(), None
    while engine.busy:
        for event in engine.step():
            if hasattr(event, "answer"):
                answers[event.id] = event.answer
        seen.add(engine._capacity)
        if second is None and engine._capacity > 512:
            second = engine.add(Request([1, 2, 3] * 9, 300, sampling=SamplingConfig(1.2, seed=2), drafts=True))
    assert {512, 768, 1024} <= seen
    assert check(first, answers[id]) > 20
    assert check(Request([1, 2, 3] * 9, 300, SAMPLING[1]), answers[second]) > 20
    # What a slot holds outlives the shrinking.
    held = [1, 2, 3] * 9 + answers[second].tokens[:60]
    request = Request(held, 30, sampling=SamplingConfig(0.5, seed=1), drafts=True)
    later = engine.add(request)
    answer = run(engine)[0][later]
    assert engine._capacity < 512
    check(request, answer)


@pytest.mark.long
def test_padded_groups_of_an_accelerator(monkeypatch):
    monkeypatch.setattr(engine_module, "choose_backend", lambda mesh, devices: DenseBackend())
    engine = engine_of(4)
    engine.shapes = dataclasses.replace(engine.shapes, accelerator=True)
    check_all(engine, requests())


@pytest.mark.long
def test_without_an_adapter_rounds_look_up_or_are_plain():
    engine = Engine(tiny_target(), None, EngineConfig(3), DRAFT)
    for answer in check_all(engine, requests()):
        assert not any(answer.draft_lengths)
        for accepted, found in zip(answer.accept_lengths, answer.lookup_lengths, strict=True):
            assert found or accepted == 1
