"""Predicted speeds against sums done by hand, and decode.json from being written to being used."""

import dataclasses
import json

import numpy as np
import pytest

from kangaroo_jax import DecideConfig, DraftConfig, InputError, LookupConfig, TreeConfig, load_adapter
from kangaroo_jax.bench import parts, tuning
from kangaroo_jax.bench.acceptance import NOT_IN_TREE, Chains, Found, Trees
from kangaroo_jax.bench.tuning import (
    Costs,
    Effort,
    Recording,
    TunedSetting,
    Tuning,
    best_of,
    measure_costs,
    predict,
    settings_of_trees,
)
from kangaroo_jax.checkpoint.adapter import read_draft_settings, save_adapter, write_draft_settings
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.decode import rounds
from tests.bench.models import EXIT_LAYER, small_adapter, small_target


@pytest.fixture(autouse=True)
def _all_widths(monkeypatch):
    monkeypatch.setattr(rounds, "_MAX_WIDTHS", 16)  # as users have them: costs are sums over them


def test_prediction_by_hand():
    # Rounds: 2 drafts commit 2 tokens, then 1 draft commits 1. On CPU, 2 drafts take the verification of 3 positions,
    # 1 draft that of 2: 3 tokens in 5 + 4 seconds, which plain decoding needs 3 * 2 seconds for.
    chains = Chains(np.asarray([[0.9, 0.2], [0.9, 0.9], [0.1, 0.1]], np.float32), np.asarray([1, 2, 0]))
    costs = Costs(plain_step=2.0, draft_step=1.0, rounds={1: 4.0, 2: 5.0})
    recording = Recording(chains, {})
    assert predict([recording], costs, DraftConfig(None, 2, 0.5)) == pytest.approx(6 / 9)
    assert predict([recording, recording], costs, DraftConfig(None, 2, 0.5)) == pytest.approx(6 / 9)
    # Without the early exit: two rounds of 2 drafts.
    assert predict([recording], costs, DraftConfig(None, 2, 0.0)) == pytest.approx(6 / 10)


def test_a_shorter_draft_in_the_same_width_costs_that_many_draft_steps_less():
    costs = Costs(plain_step=1.0, draft_step=0.5, rounds={1: 3.0, 2: 4.0, 4: 6.0, 6: 8.0})
    assert [costs.round(drafted, DraftConfig(None, 6)) for drafted in range(1, 7)] == [3.0, 4.0, 5.5, 6.0, 7.5, 8.0]


def test_prediction_of_look_ups_by_hand():
    # A look-up of 4 takes 7 seconds in the verification of 5 positions. Two of its tokens are right, then a draft of 2
    # commits 2: 5 tokens in 7 + 5 seconds, which plain decoding needs 5 * 2 seconds for.
    chains = Chains(np.full((5, 2), 0.9, np.float32), np.asarray([0, 0, 0, 1, 0]))
    found = {(2, 4): Found(np.arange(5) == 0, np.asarray([2, 0, 0, 0, 0]))}
    costs = Costs(2.0, 1.0, {1: 4.0, 2: 5.0, 4: 9.0, 12: 20.0}, lookup_rounds={4: 7.0})
    draft = DraftConfig(None, 2, 0.5, lookup=LookupConfig(4, 2, 4))
    assert Recording(chains, {}, found).rounds(draft) == [(0, 3), (2, 2)]
    assert predict([Recording(chains, {}, found)], costs, draft) == pytest.approx(10 / 12)
    # Where drafts may be longer, so may verifications be; this machine has one of 5 positions all the same.
    assert costs.round(0, dataclasses.replace(draft, max_draft_len=12)) == 7.0


def test_a_look_up_in_a_wider_verification_costs_what_that_takes_more(monkeypatch):
    monkeypatch.setattr(parts, "verification_widths", lambda *_: (2, 13))
    costs = Costs(2.0, 1.0, {1: 4.0, 4: 9.0, 12: 20.0}, lookup_rounds={4: 7.0})
    # Without draft steps, the verification of 5 takes 5 seconds and that of 13 takes 8.
    assert costs.round(0, DraftConfig(None, 12, lookup=LookupConfig(4, 2, 4))) == 10.0


def test_prediction_of_a_tree_by_hand():
    # A tree of K 2 holds 2 tokens of one level, 5 of two or more, which is all its budget. A round of 3 levels takes 10
    # seconds, so one of 2 levels takes a level less, and one of 1 two levels and 2.5 seconds of verification less.
    shape = TreeConfig(2, 5)
    costs = Costs(2.0, 0.5, {}, {2: 1.0}, {shape: 10.0}, {3: 2.0, 6: 4.5}, levels=3)
    draft = DraftConfig(None, 3, 0.5, shape)
    assert [costs.round(levels, draft) for levels in (1, 2, 3)] == [5.5, 9.0, 10.0]
    # Two rounds: 3 levels that commit 4 tokens, 1 level that commits 1.
    all_three = np.arange(9).reshape(3, 3) % 3 + 2
    places = np.stack([all_three, *[np.full((3, 3), NOT_IN_TREE)] * 4])
    best = np.asarray([[0.9, 0.8, 0.7], *[[0.1, 0.1, 0.1]] * 4], np.float32)
    recording = Recording(Chains(np.zeros((5, 1), np.float32), np.zeros(5, int)), {2: Trees(best, places)})
    assert recording.rounds(draft) == [(3, 4), (1, 1)]
    assert predict([recording], costs, draft) == pytest.approx(5 * 2 / 15.5)


@pytest.mark.parametrize(
    ("topks", "budgets"), [((2, 3, 4), (8, 12, 16)), ((4, 10), (16, 32, 64)), ((1, 2), (1, 4, 40))]
)
def test_costs_of_all_trees_follow_from_those_timed(monkeypatch, topks, budgets):
    """Where parts take seconds that add up, every round costs the sum of its parts."""
    monkeypatch.setattr(parts, "plain_step_seconds", lambda _: 7.0)
    monkeypatch.setattr(parts, "draft_seconds", lambda _, count: 1.0 + count)
    monkeypatch.setattr(parts, "growth_seconds", lambda _, topk, levels: 2.0 + topk * levels)
    verification = lambda tree, levels: 0.25 * (1 + tree.drafted(levels))  # noqa: E731
    monkeypatch.setattr(parts, "tree_verification_seconds", lambda _, tree, levels: verification(tree, levels))

    def round_seconds(_, count, tree=None):
        return 2.0 + count if tree is None else 5.0 + tree.topk * count + verification(tree, count)

    monkeypatch.setattr(parts, "round_seconds", round_seconds)
    trees = settings_of_trees(topks, budgets)
    costs = measure_costs(None, None, trees)
    for draft in trees:
        for levels in range(1, draft.max_draft_len + 1):
            assert costs.round(levels, draft) == pytest.approx(round_seconds(None, levels, draft.tree)), draft
    assert {draft.max_draft_len for draft in trees if draft.tree.budget == max(budgets)} == {1, 2, 4, 6, 8, 12}


def test_the_best_of_each_tree_is_measured_beside_single_sequences():
    one, other = TreeConfig(2, 8), TreeConfig(3, 8)
    speeds = {
        DraftConfig(None, 6, 0.1): 1.0,
        DraftConfig(None, 6, 0.2): 1.1,
        DraftConfig(None, 6, 0.3): 1.05,
        DraftConfig(None, 6, 0.1, one): 2.0,
        DraftConfig(None, 6, 0.2, one): 1.9,
        DraftConfig(None, 6, 0.1, other): 0.5,
    }
    assert [speeds[draft] for draft in best_of(speeds, 2)] == [1.1, 1.05, 2.0, 0.5]
    assert [speeds[draft] for draft in best_of(speeds, 1)] == [1.1, 2.0]
    # With look-ups, the best setting of each that is predicted to be faster.
    short, long, slow = LookupConfig(4, 2), LookupConfig(8, 2), LookupConfig(12, 2)
    speeds |= {DraftConfig(None, 6, eta, lookup=short): 1.2 + eta for eta in (0.1, 0.2)}
    speeds |= {DraftConfig(None, 6, 0.1, lookup=long): 1.5, DraftConfig(None, 6, 0.1, lookup=slow): 1.09}
    assert [speeds[draft] for draft in best_of(speeds, 1)] == [1.1, 1.5, 2.0]
    assert [speeds[draft] for draft in best_of(speeds, 3)] == [1.1, 1.05, 1.0, 1.5, 1.4, 2.0, 0.5]


def test_predictions_are_corrected_by_what_decoding_takes(monkeypatch):
    chains = Chains(np.full((20, 12), 0.9, np.float32), np.arange(20) % 7)
    nothing = Found(np.zeros(20, bool), np.zeros(20, int))
    recording = Recording(chains, {}, {(fewest, 4): nothing for fewest in (1, 2, 3, 4)})
    costs = Costs(3.0, 0.5, {count: 3.0 + count for count in (1, 2, 4, 6, 8, 12)})
    monkeypatch.setattr(tuning, "record_all", lambda *_: recording)
    monkeypatch.setattr(tuning, "measure_costs", lambda *_: costs)
    # Decoding takes twice as long as its rounds timed alone, and deciding is slower still.
    shares = {True: 0.4, False: 0.5}
    monkeypatch.setattr(
        tuning,
        "_measure",
        lambda *inputs: [predict([recording], costs, draft) * shares[draft.decide is not None] for draft in inputs[3]],
    )
    found = tuning.tune(small_target(), small_adapter(), EXIT_LAYER, [[1, 2, 3]], [], Effort(confirm=3))
    assert (found.deciding, found.beside) == pytest.approx((0.8 * found.fastest.measured, found.fastest.measured))
    assert found.draft("here").decide.from_slots == 2
    shares[True] = 0.5
    again = tuning.tune(small_target(), small_adapter(), EXIT_LAYER, [[1, 2, 3]], [], Effort(confirm=3))
    assert again.draft("here") == dataclasses.replace(again.decided, decide=again.draft("here").decide)
    assert again.draft("here").decide.from_slots == 1
    assert found.correction == pytest.approx(0.5)
    assert len(found.settings) == 3
    for setting in found.settings:
        assert setting.predicted == pytest.approx(setting.measured)
        assert setting.measured == predict([recording], costs, setting.draft) / 2
    assert found.fastest.measured == max(setting.measured for setting in found.settings)


def test_what_is_written_is_what_was_measured_to_be_fastest():
    predicted_best, other = DraftConfig(None, 6, 0.1), DraftConfig(None, 4, 0.6)
    settings = [TunedSetting(predicted_best, 2.0, 3.0, 1.3, 1.2), TunedSetting(other, 2.0, 2.0, 1.25, 1.3)]
    costs = (RoundCosts(1, 0.1, ((1, 1.0), (5, 1.2)), 0.1),)
    decided = dataclasses.replace(predicted_best, decide=DecideConfig())

    def written(deciding: float) -> DraftConfig:
        return Tuning(predicted_best, 1.0, settings, {}, costs, 0.7, decided, deciding, 1.2).draft("here")

    slower, faster = DecideConfig(costs, 0.7, "here", 2), DecideConfig(costs, 0.7, "here", 1)
    # Faster than the setting that it was measured beside, and not than the fastest.
    assert written(1.25) == dataclasses.replace(other, decide=slower)
    assert written(1.35) == dataclasses.replace(predicted_best, decide=faster)
    tree = DraftConfig(None, 4, 0.1, TreeConfig(2, 8))
    settings.append(TunedSetting(tree, 3.0, 4.0, 1.4, 1.5))
    assert written(1.35) == tree


def test_written_settings_are_those_an_adapter_is_loaded_with(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, small_adapter().model, exit_layer=EXIT_LAYER, target=small_target())
    assert load_adapter(folder, small_target()).draft == DraftConfig()
    write_draft_settings(folder, DraftConfig(None, 9, 0.25))
    assert load_adapter(folder, small_target()).draft == DraftConfig(None, 9, 0.25)
    tree = DraftConfig(None, 5, 0.1, TreeConfig(3, 12))
    write_draft_settings(folder, tree)
    assert load_adapter(folder, small_target()).draft == tree
    write_draft_settings(folder, tree, "a machine")
    assert json.loads((folder / "decode.json").read_text())["machine"] == "a machine"
    assert load_adapter(folder, small_target()).draft == tree
    lookup = DraftConfig(None, 5, 0.1, lookup=LookupConfig(7, 1, 3))
    write_draft_settings(folder, lookup)
    assert load_adapter(folder, small_target()).draft == lookup
    costs = (RoundCosts(1, 0.1, ((1, 1.0), (3, 1.5)), 0.2), RoundCosts(8, 0.3, ((1, 1.0),), 0.2))
    for from_slots in (1, 4):
        decides = dataclasses.replace(lookup, decide=DecideConfig(costs, 0.8, "a machine", from_slots))
        write_draft_settings(folder, decides)
        assert load_adapter(folder, small_target()).draft == decides
    write_draft_settings(folder, DraftConfig(None, 9, 0.25))
    assert load_adapter(folder, small_target()).draft == DraftConfig(None, 9, 0.25)


def _with_costs(costs, acceptance=0.8, machine="a machine", **more):
    return json.dumps(
        {"max_draft_len": 6, "threshold": 0.5, "costs": costs, "acceptance": acceptance, "machine": machine} | more
    )


_COSTS = {"draft_step": 0.1, "shallow": 0.1, "verification": {"1": 1.0, "2": 1.2}}


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        "{}",
        json.dumps({"max_draft_len": 6}),
        json.dumps({"max_draft_len": 0, "threshold": 0.5}),
        json.dumps({"max_draft_len": 6, "threshold": 1.5}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "surplus": 1}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree_topk": 3}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree_budget": 12}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree_topk": 0, "tree_budget": 12}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree_topk": 3, "tree_budget": None}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree_topk": 3, "tree_budget": 5}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "tree": {"topk": 3, "budget": 12}}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "lookup_tokens": 3}),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "lookup": None}),
        json.dumps(
            {"max_draft_len": 6, "threshold": 0.5, "lookup_tokens": 3, "lookup_min_ngram": 3, "lookup_max_ngram": 2}
        ),
        json.dumps({"max_draft_len": 6, "threshold": 0.5, "costs": {"1": _COSTS}}),
        _with_costs([_COSTS]),
        _with_costs({"one": _COSTS}),
        _with_costs({"0": _COSTS}),
        _with_costs({"1": _COSTS | {"surplus": 1}}),
        _with_costs({"1": _COSTS | {"draft_step": -1}}),
        _with_costs({"1": _COSTS | {"draft_step": "dear"}}),
        _with_costs({"1": _COSTS | {"verification": {"2": 1.2}}}),
        _with_costs({"1": _COSTS | {"verification": {"1": 0}}}),
        _with_costs({"1": _COSTS}, acceptance=2),
        _with_costs({"1": _COSTS}, machine=None),
        _with_costs({"1": _COSTS}, tree_topk=3, tree_budget=12),
    ],
)
def test_wrong_settings_are_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "decode.json").write_text(content)
    with pytest.raises(InputError, match=r"decode\.json: ") as error:
        read_draft_settings(tmp_path)
    assert "\n" not in str(error.value)
