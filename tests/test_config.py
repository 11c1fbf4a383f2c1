"""Settings of drafting and sampling, compared with hand-written expectations."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest

from kangaroo_jax.cli.draft_overrides import DraftOverrides
from kangaroo_jax.config import DecideConfig, DraftConfig, LookupConfig, RoundCosts, SamplingConfig, TreeConfig
from kangaroo_jax.errors import InputError

NAN = float("nan")


def test_draft_defaults_are_the_paper_s() -> None:
    assert DraftConfig() == DraftConfig(exit_layer=None, max_draft_len=6, threshold=0.6)
    assert DraftConfig(exit_layer=1, max_draft_len=1, threshold=0) == DraftConfig(1, 1, 0.0)
    assert DraftConfig(threshold=1).threshold == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exit_layer": 0}, "exit_layer must be a positive integer, found 0"),
        ({"exit_layer": 2.0}, "exit_layer must be a positive integer, found 2.0"),
        ({"exit_layer": True}, "exit_layer must be a positive integer, found True"),
        ({"max_draft_len": 0}, "max_draft_len must be a positive integer, found 0"),
        ({"max_draft_len": "6"}, "max_draft_len must be a positive integer, found '6'"),
        ({"max_draft_len": None}, "max_draft_len must be a positive integer, found None"),
        ({"threshold": -0.1}, "threshold must be between 0 and 1, found -0.1"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1, found 1.5"),
        ({"threshold": NAN}, "threshold must be between 0 and 1, found nan"),
        ({"threshold": None}, "threshold must be between 0 and 1, found None"),
        ({"threshold": True}, "threshold must be between 0 and 1, found True"),
    ],
)
def test_wrong_draft_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        DraftConfig(**settings)
    assert str(caught.value) == message


SINGLE, TREE = DraftConfig(2, 6, 0.3), DraftConfig(2, 6, 0.1, TreeConfig(3, 12))


@pytest.mark.parametrize(
    ("given", "over_single", "over_tree"),
    [
        ({}, SINGLE, TREE),
        ({"tree": True}, DraftConfig(2, 6, 0.4, TreeConfig(10, 32)), TREE),
        ({"tree": False}, SINGLE, DraftConfig(2, 6, 0.6)),
        ({"tree": True, "threshold": 0.2, "tree_budget": 20}, (2, 6, 0.2, 10, 20), (2, 6, 0.2, 3, 20)),
        ({"tree": True, "max_draft_len": 4, "tree_topk": 5}, (2, 4, 0.4, 5, 32), (2, 4, 0.1, 5, 12)),
        ({"tree": False, "threshold": 0.0, "max_draft_len": 9}, DraftConfig(2, 9, 0.0), DraftConfig(2, 9, 0.0)),
        ({"max_draft_len": 2}, DraftConfig(2, 2, 0.3), (2, 2, 0.1, 3, 12)),
        ({"tree_topk": 5}, "tree_topk and --tree_budget change nothing without --tree", (2, 6, 0.1, 5, 12)),
        ({"max_draft_len": 13}, DraftConfig(2, 13, 0.3), "tree_budget must be at least max_draft_len (13)"),
        ({"tree": True, "tree_budget": 5}, *["tree_budget must be at least max_draft_len (6)"] * 2),
    ],
)
def test_what_is_given_goes_before_what_is_written(given, over_single, over_tree) -> None:
    for written, expected in ((SINGLE, over_single), (TREE, over_tree)):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=re.escape(expected)):
                DraftOverrides(**given).over(written)
        else:
            if isinstance(expected, tuple):
                expected = DraftConfig(*expected[:3], TreeConfig(*expected[3:]))
            assert DraftOverrides(**given).over(written) == expected


LOOKUP = DraftConfig(2, 6, 0.3, lookup=LookupConfig(8, 3, 5))
NO_LOOK_UPS = "--lookup_min_ngram and --lookup_max_ngram change nothing without --lookup_tokens; give it"


@pytest.mark.parametrize(
    ("given", "over_single", "over_lookup"),
    [
        ({}, None, (8, 3, 5)),
        ({"lookup_tokens": 0}, None, None),
        ({"lookup_tokens": 12}, (12, 3, 4), (12, 3, 5)),
        ({"lookup_tokens": 12, "lookup_min_ngram": 1, "lookup_max_ngram": 9}, (12, 1, 9), (12, 1, 9)),
        ({"lookup_min_ngram": 5}, NO_LOOK_UPS, (8, 5, 5)),
        ({"lookup_tokens": 4, "lookup_min_ngram": 5}, "lookup_max_ngram must be at least lookup_min_ngram", (4, 5, 5)),
        ({"lookup_max_ngram": 2}, NO_LOOK_UPS, "lookup_max_ngram must be at least lookup_min_ngram (3), found 2"),
        ({"tree": True, "lookup_tokens": 0}, None, None),
        ({"tree": True}, None, None),
    ],
)
def test_look_ups_that_are_given_go_before_what_is_written(given, over_single, over_lookup) -> None:
    for written, expected in ((SINGLE, over_single), (LOOKUP, over_lookup)):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=re.escape(expected)):
                DraftOverrides(**given).over(written)
        else:
            draft = DraftOverrides(**given).over(written)
            assert draft.lookup == (expected and LookupConfig(*expected))
            assert (draft.max_draft_len, draft.tree is not None) == (6, bool(given.get("tree")))


def test_a_tree_and_look_ups_are_refused_wherever_they_come_from() -> None:
    message = "trees and look-ups exclude each other; leave one out (--notree, or --lookup_tokens=0)"
    for given, written in (({"tree": True, "lookup_tokens": 5}, LOOKUP), ({"lookup_tokens": 5}, TREE)):
        with pytest.raises(InputError, match=re.escape(message)):
            DraftOverrides(**given).over(written)
    with pytest.raises(InputError, match=re.escape(message)):
        DraftOverrides(tree=True, tree_budget=4, lookup_tokens=5)


DECIDES = DraftConfig(2, 6, 0.3, decide=DecideConfig((RoundCosts(1, 0.1, ((1, 1.0),), 0.1),), 0.8, "a machine"))


def test_sequences_decide_from_so_many_slots_on_and_at_any_where_it_is_asked_for() -> None:
    some = dataclasses.replace(DECIDES, decide=dataclasses.replace(DECIDES.decide, from_slots=4))
    assert [some.at(slots).decide is None for slots in (1, 3, 4, 16)] == [True, True, False, False]
    assert DECIDES.at(1) == DECIDES
    assert DraftOverrides(decide=True).over(some).at(1).decide == DECIDES.decide


@pytest.mark.parametrize(
    ("given", "over_single", "over_deciding"),
    [
        ({}, None, DECIDES.decide),
        ({"decide": True}, DecideConfig(), DECIDES.decide),
        ({"decide": False}, None, None),
        ({"max_draft_len": 4, "lookup_tokens": 5}, None, DECIDES.decide),
        ({"threshold": 0.5}, None, None),  # means nothing where a sequence decides
        ({"tree": True}, None, None),
    ],
)
def test_a_given_rule_goes_before_deciding_how_far_to_draft(given, over_single, over_deciding) -> None:
    assert DraftOverrides(**given).over(SINGLE).decide == over_single
    assert DraftOverrides(**given).over(DECIDES).decide == over_deciding
    with pytest.raises(InputError, match="trees and deciding how far to draft exclude each other"):
        DraftOverrides(decide=True).over(TREE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"decide": True, "threshold": 0.5}, "--threshold changes nothing with --decide; leave one out"),
        ({"decide": True, "tree": True}, "trees and deciding how far to draft exclude each other"),
        ({"lookup_tokens": -1}, "lookup_tokens must be a positive integer, found -1"),
        ({"lookup_min_ngram": 0}, "lookup_min_ngram must be a positive integer, found 0"),
        ({"lookup_max_ngram": 0}, "lookup_max_ngram must be a positive integer, found 0"),
        ({"lookup_min_ngram": 4, "lookup_max_ngram": 3}, "lookup_max_ngram must be at least lookup_min_ngram (4)"),
        ({"lookup_tokens": 4, "lookup_max_ngram": 33}, "lookup_max_ngram must be at most 32, found 33"),
        ({"lookup_tokens": 0, "lookup_min_ngram": 4}, "change nothing with --lookup_tokens=0; leave them out"),
        ({"tree": False, "tree_topk": 3}, "change nothing with --notree"),
        ({"tree_topk": 0}, "tree_topk must be a positive integer, found 0"),
        ({"tree": True, "tree_budget": -1}, "tree_budget must be a positive integer, found -1"),
        ({"tree": True, "tree_budget": 4, "max_draft_len": 5}, "tree_budget must be at least max_draft_len (5)"),
        ({"threshold": 1.5}, "threshold must be between 0 and 1, found 1.5"),
    ],
)
def test_what_cannot_be_given_is_named_before_anything_is_read(given, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        DraftOverrides(**given)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ((1, 1e307, ((1, 1.0),), 0.1), "draft_step must be a number of plain steps, 0 to 1000000.0, found 1e+307"),
        ((1, 0.1, ((1, 1e307),), 0.1), "the cost of verifying 1 must be a number of plain steps, above 0 and at most"),
        ((10**400, 0.1, ((1, 1.0),), 0.1), "batch_size must be at most 1048576, found 1000"),
    ],
)
def test_costs_that_no_machine_has_are_named(costs, message) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        RoundCosts(*costs)


def test_how_settings_are_named_in_reports() -> None:
    assert str(SINGLE) == "gamma 6, eta 0.3"
    assert str(TREE) == "gamma 6, eta 0.1, trees of K 3 and budget 12"
    assert str(LOOKUP) == "gamma 6, eta 0.3, look-ups of 8 tokens by 3 to 5"


def test_sampling_defaults_are_greedy() -> None:
    assert SamplingConfig() == SamplingConfig(temperature=0.0, top_p=1.0, top_k=0, seed=0)
    assert SamplingConfig(1, 1, 5, 2**32 - 1) == SamplingConfig(1.0, 1.0, 5, 2**32 - 1)
    assert hash(SamplingConfig(seed=[1, 2])) == hash(SamplingConfig(seed=(1, 2)))
    assert SamplingConfig(seed=range(3)).seed == (0, 1, 2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingConfig().temperature = 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number, 0 or above, found -0.1"),
        ({"temperature": NAN}, "temperature must be a finite number, 0 or above, found nan"),
        ({"temperature": math.inf}, "temperature must be a finite number, 0 or above, found inf"),
        ({"temperature": None}, "temperature must be a finite number, 0 or above, found None"),
        ({"temperature": True}, "temperature must be a finite number, 0 or above, found True"),
        ({"top_p": 0}, "top_p must be above 0 and at most 1, found 0"),
        ({"top_p": 1.01}, "top_p must be above 0 and at most 1, found 1.01"),
        ({"top_p": NAN}, "top_p must be above 0 and at most 1, found nan"),
        ({"top_p": "0.9"}, "top_p must be above 0 and at most 1, found '0.9'"),
        ({"top_k": -1}, "top_k must be an integer, 0 or above, found -1"),
        ({"top_k": 2.0}, "top_k must be an integer, 0 or above, found 2.0"),
        ({"top_k": True}, "top_k must be an integer, 0 or above, found True"),
        ({"seed": -1}, "seed must be an integer from 0 to 2**32 - 1, found -1"),
        ({"seed": 2**32}, f"seed must be an integer from 0 to 2**32 - 1, found {2**32}"),
        ({"seed": 0.5}, "seed must be an integer from 0 to 2**32 - 1, found 0.5"),
        ({"seed": "7"}, "seed must be an integer from 0 to 2**32 - 1, found '7'"),
        ({"seed": [1, None]}, "seed must be an integer from 0 to 2**32 - 1, found None"),
    ],
)
def test_wrong_sampling_setting_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        SamplingConfig(**settings)
    assert str(caught.value) == message
