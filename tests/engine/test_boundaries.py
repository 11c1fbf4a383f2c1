"""Answers that end exactly at, and just before and after, what the caches hold: each way of drafting gives plain
decoding's tokens there too.

Truth: one plain run, long enough that none of its own limits is near.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import (
    DraftConfig,
    Engine,
    EngineConfig,
    Finished,
    LookupConfig,
    Request,
    TreeConfig,
    generate,
    generate_many,
    generate_plain,
)
from kangaroo_jax.model.drafts.kangaroo import DraftVocabulary
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

CAPACITY = 128  # of the smallest caches, in positions
# Most tokens that a round adds to a sequence's caches: what lies between an answer's end and the caches' end.
DRAFTS = {
    "sequence": (DraftConfig(2, 4, 0.0), 5),
    "tree of one level": (DraftConfig(2, 1, 0.0, TreeConfig(10, 32)), 11),
    "tree of two levels": (DraftConfig(2, 2, 0.0, TreeConfig(4, 32)), 21),
    "tree of three levels": (DraftConfig(2, 3, 0.0, TreeConfig(3, 32)), 22),
    # x_n, what is looked up, and the place behind it where such a sequence idles while others take draft steps.
    "look-up": (DraftConfig(2, 4, 0.0, lookup=LookupConfig(20, 1, 3)), 22),
}
_RANDOM = np.random.default_rng(0)
PROMPTS = [_RANDOM.integers(0, VOCABULARY, 41).tolist() for _ in range(4)]


def kinds(*quick):
    return [pytest.param(kind, marks=[] if kind in quick else [pytest.mark.long]) for kind in DRAFTS]


@functools.cache
def plain():
    return generate_plain(tiny_target(), PROMPTS, 160).tokens


def limits(reserve):
    """Maximum new tokens, so that a round at the answer's end fills the caches exactly, and one fewer and more; and as
    many more as would go in if no kind of draft took more room than a sequence's."""
    extras = sorted({-1, 0, 1, reserve - DRAFTS["sequence"][1]})
    return [CAPACITY - reserve - len(PROMPTS[0]) + extra for extra in extras]


@pytest.mark.parametrize("kind", kinds("tree of two levels"))
def test_answers_that_end_at_the_caches_end(kind):
    draft, reserve = DRAFTS[kind]
    for limit in limits(reserve):
        out = generate(tiny_target(), tiny_adapter(2), PROMPTS, limit, draft)
        assert out.tokens == [tokens[:limit] for tokens in plain()], limit


@pytest.mark.parametrize("kind", kinds("sequence"))
def test_slots_that_are_refilled_end_at_the_caches_end(kind):
    draft, reserve = DRAFTS[kind]
    for longest in limits(reserve):
        # Neighbours and successors end earlier, at other places of the same caches.
        most = [longest - i % 3 for i in range(len(PROMPTS))]
        requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, most, strict=True)]
        for answer in generate_many(tiny_target(), tiny_adapter(2), requests, 3, draft=draft):
            assert answer.tokens == plain()[answer.id][: most[answer.id]], (longest, answer.id)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sequence", "tree of two levels"])
def test_drafts_from_a_vocabulary_end_at_the_caches_end(kind):
    target, adapter = tiny_target(), tiny_adapter(2)
    model = nnx.clone(adapter.model)
    model.draft_vocabulary = DraftVocabulary(target.model, jnp.arange(0, VOCABULARY, 2))
    some = dataclasses.replace(adapter, model=model)
    draft, reserve = DRAFTS[kind]
    for limit in limits(reserve):
        out = generate(target, some, PROMPTS, limit, draft)
        assert out.tokens == [tokens[:limit] for tokens in plain()], limit


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sequence", "tree of two levels"])
def test_a_second_turn_ends_at_the_caches_end(kind):
    """A slot that holds the beginning of the prompt: the rest is prefilled behind it."""
    draft, reserve = DRAFTS[kind]
    for limit in limits(reserve):
        engine = Engine(tiny_target(), tiny_adapter(2), EngineConfig(2), draft)
        for start, end in ((0, 20), (20, limit)):
            prompt = PROMPTS[0] + plain()[0][:start]
            id = engine.add(Request(prompt, end - start, eos_token_ids=(), stream=False))
            answers = {}
            while engine.busy:
                answers |= {event.id: event.answer for event in engine.step() if isinstance(event, Finished)}
        assert answers[id].reused_tokens > 0
        assert answers[id].tokens == plain()[0][20:limit], limit


def test_a_budget_beyond_what_one_level_holds_is_no_error():
    draft = DraftConfig(2, 1, 0.4, TreeConfig(12, 140))
    out = generate(tiny_target(), tiny_adapter(2), [PROMPTS[0]], 40, draft)
    assert out.tokens[0] == plain()[0][:40]
