"""Recorded acceptance against `generate`: the rounds predicted for any settings must be those that it runs."""

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, LookupConfig, TreeConfig, generate
from kangaroo_jax.bench.acceptance import (
    NOT_IN_TREE,
    Chains,
    Found,
    Trees,
    path_of,
    places_of,
    record,
    record_found,
    record_trees,
)
from tests.bench.models import CONFIG, EXIT_LAYER, small_adapter, small_target
from tests.decode.models import tiny_adapter, tiny_target

PROMPT = [int(x) for x in np.random.default_rng(3).integers(0, CONFIG.vocab_size, 9)]


@pytest.fixture(scope="module")
def chains():
    return record(small_target(), small_adapter(), PROMPT, max_new_tokens=60, max_draft_len=7)


LONG = [(1, 0.0), (5, 0.9), (7, 0.0), (7, 0.7)]


@pytest.mark.parametrize(
    ("gamma", "eta"), [(3, 0.0), (3, 0.5), (3, 1.0), *(pytest.param(*x, marks=pytest.mark.long) for x in LONG)]
)
def test_rounds_are_those_of_generate(chains, gamma, eta):
    out = generate(small_target(), small_adapter(), [PROMPT], 60, DraftConfig(EXIT_LAYER, gamma, eta), eos_token_ids=())
    drafted, committed = (list(lengths) for lengths in zip(*chains.rounds(gamma, eta), strict=True))
    assert committed == out.accept_lengths[0]
    assert drafted == out.draft_lengths[0]


@pytest.mark.long
def test_rounds_of_a_draft_model_that_takes_deep_states_are_those_of_generate():
    target, adapter = tiny_target(), tiny_adapter(2, kind="memory")
    prompt, seen = [7, 40, 3, 3, 21], set()
    chains = record(target, adapter, prompt, max_new_tokens=60, max_draft_len=5)
    for gamma, eta in ((3, 0.0), (5, 0.0), (5, 0.3)):
        out = generate(target, adapter, [prompt], 60, DraftConfig(2, gamma, eta), eos_token_ids=())
        drafted, committed = (list(lengths) for lengths in zip(*chains.rounds(gamma, eta), strict=True))
        assert committed == out.accept_lengths[0]
        assert drafted == out.draft_lengths[0]
        seen |= set(committed)
    assert len(seen) > 2


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


# --- Look-ups.

NGRAMS = [(1, 1), (1, 4), (2, 4), (3, 4)]


@pytest.fixture(scope="module")
def found():
    lookups = [LookupConfig(12, *ngrams) for ngrams in NGRAMS]
    return record_found(small_target(), PROMPT, 60, lookups)


@pytest.mark.parametrize(
    ("most", "ngrams"), [(5, (1, 4)), *(pytest.param(k, x, marks=pytest.mark.long) for k in (2, 12) for x in NGRAMS)]
)
def test_rounds_with_look_ups_are_those_of_generate(chains, found, most, ngrams):
    draft = DraftConfig(EXIT_LAYER, 3, 0.5, lookup=LookupConfig(most, *ngrams))
    out = generate(small_target(), small_adapter(), [PROMPT], 60, draft, eos_token_ids=())
    rounds = chains.rounds(3, 0.5, found[LookupConfig(12, *ngrams)], most)
    drafted, committed = (list(lengths) for lengths in zip(*rounds, strict=True))
    assert committed == out.accept_lengths[0]
    assert drafted == out.draft_lengths[0]
    assert [most * (steps == 0) for steps in drafted] == out.lookup_lengths[0]


def test_look_ups_of_the_model_are_found_at_some_places_and_right_at_some(found):
    # Else the test above could not tell one setting from another.
    agrees = found[LookupConfig(12, 1, 4)]
    assert 0 < agrees.found.sum() < len(agrees.found)
    assert len(set(agrees.agrees[agrees.found])) > 2


def test_rounds_with_look_ups_by_hand():
    # The first position looks up two tokens, of which one is right; the third drafts; the last is the answer's end.
    chains = Chains(np.asarray([[0.9, 0.9]] * 5, np.float32), np.asarray([2, 2, 1, 0, 0]))
    looked_up = Found(np.asarray([True, True, False, False, True]), np.asarray([1, 2, 0, 0, 3]))
    assert chains.rounds(2, 0.5, looked_up, 2) == [(0, 2), (2, 2), (0, 1)]
    assert chains.rounds(2, 0.5, looked_up, 1) == [(0, 2), (2, 2), (0, 1)]
    assert chains.rounds(2, 0.5) == [(2, 3), (2, 1), (2, 1)]


# --- Trees.


def trees_of(topk):
    recorded = record_trees(small_target(), small_adapter(), PROMPT, max_new_tokens=60, max_draft_len=4, topks=(topk,))
    return recorded[topk]


@pytest.fixture(scope="module")
def trees():
    return trees_of(2)


ETAS = (0.0, 0.05, 0.3, 1.0)


def check_tree_rounds(trees, topk, budget, gamma):
    for eta in ETAS:
        draft = DraftConfig(EXIT_LAYER, gamma, eta, TreeConfig(topk, budget))
        out = generate(small_target(), small_adapter(), [PROMPT], 60, draft, eos_token_ids=())
        levels, committed = (list(column) for column in zip(*trees.rounds(gamma, eta, budget), strict=True))
        assert committed == out.accept_lengths[0], eta
        assert levels == out.draft_lengths[0], eta


@pytest.mark.long
def test_tree_rounds_are_those_of_generate(trees):
    check_tree_rounds(trees, topk=2, budget=5, gamma=3)  # a budget that cuts


@pytest.mark.long
def test_rounds_of_other_trees_are_those_of_generate(trees):
    check_tree_rounds(trees, topk=2, budget=10, gamma=3)  # a budget that does not cut
    check_tree_rounds(trees_of(4), topk=4, budget=7, gamma=4)


def test_the_model_is_one_on_which_trees_differ(trees):
    rounds = [trees.rounds(gamma, eta, budget) for gamma, budget in ((3, 5), (3, 10), (4, 7)) for eta in ETAS]
    assert len({tuple(r) for r in rounds}) > 4
    # The budget alone, and eta alone.
    assert trees.rounds(4, 0.0, 5) != trees.rounds(4, 0.0, 60)
    assert trees.rounds(4, 0.0, 5) != trees.rounds(4, 0.3, 5)


def test_paths_and_places_by_hand():
    # K = 2. The first level has two candidates; the second's are followers of the frontier's tokens, in its order.
    tokens = np.asarray([[[5, 7, 0, 0], [8, 9, 8, 4]]])
    scores = np.asarray([[[0.6, 0.3, -1, -1], [0.3, 0.1, 0.2, 0.05]]], np.float32)
    frontier, turned = np.asarray([[[0, 1], [0, 2]]]), np.asarray([[[1, 0], [0, 2]]])
    following = np.asarray([[7, 8]])
    assert path_of(following, tokens, scores, frontier).tolist() == [[1, 2]]
    assert path_of(following, tokens, scores, turned).tolist() == [[1, 0]]
    assert path_of(np.asarray([[0, 8]]), tokens, scores, frontier).tolist() == [[-1, -1]]
    assert path_of(np.asarray([[5, 4]]), tokens, scores, frontier).tolist() == [[0, -1]]
    # 7 comes after 5, and before the 8 that scores the same further down; 8 after both and that 8.
    assert places_of(np.asarray([[1, 2]]), scores).tolist() == [[[1, 1], [NOT_IN_TREE, 3]]]
    assert places_of(np.asarray([[1, 0]]), scores).tolist() == [[[1, 1], [NOT_IN_TREE, 2]]]
    assert places_of(np.asarray([[0, -1]]), scores).tolist() == [[[0, 0], [NOT_IN_TREE, NOT_IN_TREE]]]


def test_tree_rounds_by_hand():
    # Three positions left. At the first, the target's tokens are second of the first level, and fourth of both.
    no, two = [[NOT_IN_TREE] * 2] * 2, [[1, 1], [NOT_IN_TREE, 3]]
    trees = Trees(np.asarray([[0.6, 0.3], [0.9, 0.8], [0.9, 0.8]], np.float32), np.asarray([two, no, no]))
    assert trees.rounds(2, 0.0, 4) == [(2, 3)]
    assert trees.rounds(2, 0.0, 3) == [(2, 2), (2, 1)]
    assert trees.rounds(2, 0.0, 1) == [(2, 1), (2, 1), (2, 1)]
    assert trees.rounds(2, 0.5, 4) == [(2, 3)]  # the unsure level is drafted still
    assert trees.rounds(2, 0.7, 4) == [(1, 2), (2, 1)]
    assert trees.rounds(1, 0.0, 4) == [(1, 2), (1, 1)]
