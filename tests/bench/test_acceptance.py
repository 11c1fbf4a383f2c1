"""Recorded acceptance against `generate`: the rounds predicted for any settings must be those that it runs."""

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, generate
from kangaroo_jax.bench.acceptance import Chains, record
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

PROMPT = [int(x) for x in np.random.default_rng(3).integers(0, VOCABULARY, 9)]


@pytest.fixture(scope="module")
def chains():
    return record(tiny_target(), tiny_adapter(2), PROMPT, max_new_tokens=60, max_draft_len=7)


@pytest.mark.parametrize(("gamma", "eta"), [(1, 0.0), (3, 0.5), (5, 0.9), (7, 0.0), (7, 0.7), (7, 1.0)])
def test_rounds_are_those_of_generate(chains, gamma, eta):
    out = generate(tiny_target(), tiny_adapter(2), [PROMPT], 60, DraftConfig(2, gamma, eta), eos_token_ids=())
    drafted, committed = (list(lengths) for lengths in zip(*chains.rounds(gamma, eta), strict=True))
    assert committed == out.accept_lengths[0]
    assert drafted == out.draft_lengths[0]


def test_the_model_is_one_on_which_settings_differ(chains):
    # Else the test above could not tell one setting from another.
    assert len({tuple(chains.rounds(gamma, 0.0)) for gamma in (1, 3, 7)}) == 3
    assert chains.rounds(7, 0.0) != chains.rounds(7, 0.9)


def test_rounds_by_hand():
    # Three positions left; the second draft of the first chain is unsure, and one of its drafts is right.
    chains = Chains(np.asarray([[0.9, 0.2, 0.9], [0.9] * 3, [0.1] * 3], np.float32), np.asarray([1, 3, 0]))
    assert chains.rounds(3, 0.5) == [(2, 2), (1, 1)]
    assert chains.rounds(3, 0.0) == [(3, 2), (3, 1)]
    assert chains.rounds(1, 0.5) == [(1, 2), (1, 1)]
