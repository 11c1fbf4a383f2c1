"""`bench tune --machine`: predicted costs against counts by hand, the search against a slow one."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import DraftConfig, TreeConfig
from kangaroo_jax.bench import predicted_tuning
from kangaroo_jax.bench.acceptance import NOT_IN_TREE, Chains, Found, Trees
from kangaroo_jax.bench.predicted_tuning import There, predicted_costs, search
from kangaroo_jax.bench.tuning import Recording, settings_of_trees, single_sequences, with_lookups
from kangaroo_jax.checkpoint.adapter import TrainedAdapter, read_draft_settings
from kangaroo_jax.cli.bench.predicted_tune import print_tuning
from kangaroo_jax.engine.part_costs import PartCounts
from kangaroo_jax.errors import MachineError
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.preflight.machines import Limits, Machine
from kangaroo_jax.preflight.prediction import PartPredictor, RoundWork
from kangaroo_jax.program import Launched
from tests.bench.models import CONFIG, EXIT_LAYER, small_target

# Of four positions, products take as long as their weights; of more, longer.
LIMITS = Limits(200.0, {"float32": 400.0})


def here(limits=LIMITS, memory=2**30):
    return There(Machine("here", jax.devices(), memory, limits), "float32", 16, 8)


def adapter_with_all(folder="small adapter"):
    """With an MLP of width 16 and a draft vocabulary of 10 tokens."""
    model = Adapter(CONFIG, rngs=nnx.Rngs(1), mlp_size=16)
    model.draft_vocabulary = DraftVocabulary(small_target().model, jnp.arange(10))
    return TrainedAdapter(model, EXIT_LAYER, str(folder), target_fingerprint=None)


def test_predicted_costs_are_those_counted_by_hand():
    work = here().work(small_target(), adapter_with_all(), DraftConfig(EXIT_LAYER, 12), 1)
    shape, predictor = TreeConfig(5, 7), work.predictor(None)
    found = predicted_costs(predictor, {5: predictor}, [shape], "tpu")
    # Weights: of the matrices, and of the norms, which are read too. Caches of 128 positions.
    attention, mlp, head, cached = 32 * 64 + 32 * 32, 3 * 32 * 48, 100 * 32, 2 * 2 * 128 * 8
    layer, adapter = attention + mlp, attention + 3 * 32 * 16 + 10 * 32
    layer_read, adapter_read = 4 * (layer + 2 * 32 + cached), 4 * (adapter + 3 * 32 + cached + 10)  # 10 token ids
    # Two operations for each weight; two queries share each key, and their weights each value.
    layer_done, adapter_done = 2 * layer + 2 * 2 * cached, 2 * adapter + 2 * 2 * cached

    def seconds(read, operations, rows=1):
        return max(read / 200, rows * operations / 400)

    shallow = lambda rows: seconds(layer_read, layer_done, rows)  # noqa: E731
    step = lambda rows: seconds(layer_read + adapter_read, layer_done + adapter_done, rows)  # noqa: E731
    verified = lambda width: seconds(layer_read + 4 * head, layer_done + 2 * head, width)  # noqa: E731
    assert found.plain_step == seconds(2 * layer_read + 4 * head, 2 * layer_done + 2 * head)
    assert found.draft_step == step(1)
    assert verified(2) == verified(1) < verified(7)
    assert found.rounds == pytest.approx({n: n * step(1) + shallow(1) + verified(n + 1) for n in (1, 2, 4, 6, 8, 12)})
    # A look-up takes the last committed token and what was found through the shallow layers and the adapter, which has
    # no head to read then.
    own_read, own_done = adapter_read - 4 * (10 * 32 + 10), adapter_done - 2 * 10 * 32
    assert found.lookup_rounds == pytest.approx(
        {n: seconds(layer_read + own_read, layer_done + own_done, n + 1) + verified(n + 1) for n in (4, 8, 12)}
    )
    # A tree of K 5 and budget 7: its first level has 5 tokens, each later one drafts on from 5.
    assert found.tree_levels == {5: step(5)}
    assert step(5) > step(1)
    assert found.tree_verifications == pytest.approx({n: shallow(n - 1) + verified(n) for n in (6, 8)})
    assert found.tree_rounds[shape] == pytest.approx(step(1) + 5 * step(5) + shallow(7) + verified(8))
    for levels in (1, 2, 4):
        complete = step(1) + (levels - 1) * step(5) + shallow(7) + verified(8)
        assert found.round(levels, DraftConfig(None, 4, 0.5, shape)) == pytest.approx(complete)


def simulated(recording, draft, costs):
    """(tokens, seconds) of all rounds, one position after another, on a machine whose verification always holds all
    that a round may draft. `costs`: functions of the parts."""
    tree, position, tokens, seconds = draft.tree, 0, 0, 0.0
    count = len(recording.chains.agrees)
    while position < count:
        steps, lookup = 0, draft.lookup
        found = None if lookup is None else recording.found[lookup.min_ngram, lookup.max_ngram]
        if found is not None and found.found[position]:
            committed = min(1 + min(int(found.agrees[position]), lookup.max_tokens), count - position)
            tokens, position = tokens + committed, position + committed
            seconds += costs["looking up"](lookup.max_tokens)
            seconds += costs["verification"](1 + max(lookup.max_tokens, draft.max_draft_len))
            continue
        while steps < draft.max_draft_len:
            sure = (recording.chains.confidence if tree is None else recording.trees[tree.topk].best)[position, steps]
            steps += 1
            if sure < np.float32(draft.threshold):
                break
        accepted = 0
        if tree is None:
            accepted = min(steps, int(recording.chains.agrees[position]))
        else:
            places = recording.trees[tree.topk].places[position]
            while accepted < steps and places[accepted, steps - 1] < tree.budget:
                accepted += 1
        committed = min(accepted + 1, count - position)
        tokens, position = tokens + committed, position + committed
        seconds += costs["step"](1) + (steps - 1) * costs["step"](1 if tree is None else tree.topk)
        drafted = draft.max_draft_len if tree is None else tree.drafted(draft.max_draft_len)
        drafted = max(drafted, 0 if lookup is None else lookup.max_tokens)
        seconds += costs["shallow"](1 if tree is None else drafted) + costs["verification"](drafted + 1)
    return tokens, seconds


def test_the_search_finds_what_going_through_every_round_finds():
    random = np.random.default_rng(0)

    def recording():
        positions, gamma = 40, 12
        confidence = random.uniform(0.2, 1, (positions, gamma)).astype(np.float32)
        agrees = random.geometric(0.3, positions) - 1
        best = np.sort(random.uniform(0, 1, (positions, gamma)).astype(np.float32), axis=1)[:, ::-1]
        places = random.geometric(0.15, (positions, gamma, gamma))
        places[:, np.tril(np.ones((gamma, gamma), bool), -1)] = NOT_IN_TREE
        found = {
            (fewest, 4): Found(random.uniform(0, 1, positions) < 0.6 / fewest, random.geometric(0.15, positions) - 1)
            for fewest in (1, 2, 3, 4)
        }
        return Recording(Chains(confidence, np.minimum(agrees, gamma)), {2: Trees(best, places)}, found)

    # On a GPU: kernels, and a turn of the host in each draft step. With fewer tokens to draft from, a step is cheaper.
    limits = Limits(100.0, {"float32": 40.0}, share=0.5, launch=0.25, turn=0.5)
    launched = RoundWork(*(Launched(n) for n in (16, 2, 4, 14)))
    operations = PartCounts(100, 10, 12, 90, 5, 1)
    recordings = {10: [recording(), recording()], 100: [recording()]}
    predictors = {
        size: PartPredictor(limits, "float32", PartCounts(1000, 100, read, 900, 50, 40), operations, launched)
        for size, read in ((10, 150), (100, 200))
    }
    drafts = [*single_sequences(), *settings_of_trees([2], [4, 8])]
    shapes = [TreeConfig(2, 4), TreeConfig(2, 8)]
    costs = {size: predicted_costs(x, {2: x}, shapes, "gpu") for size, x in predictors.items()}
    found = search(recordings, costs, drafts, len(drafts), lookups=True)

    def slow(size, draft):
        read = predictors[size].num_bytes.draft_step
        parts = {
            "step": lambda rows: max(read / 50, rows * 12 / 40) + 4 * 0.25 + 0.5,
            "shallow": lambda rows: max(100 / 50, rows * 10 / 40) + 2 * 0.25,
            "looking up": lambda n: max((100 + 40) / 50, (n + 1) * (10 + 1) / 40) + 4 * 0.25 + 0.5,
            "verification": lambda width: max(900 / 50, width * 90 / 40) + 14 * 0.25,
        }
        tokens, seconds = np.sum([simulated(x, draft, parts) for x in recordings[size]], axis=0)
        return tokens * (1000 / 50 + 16 * 0.25) / seconds

    speeds = {(size, draft): slow(size, draft) for size, draft in itertools.product(recordings, drafts)}
    for setting in found:
        assert setting.predicted == pytest.approx(slow(setting.vocabulary, setting.draft))
    for size in recordings:
        of_size = [x for x in found if x.vocabulary == size]
        alone = [x for x in of_size if x.draft.tree is None and x.draft.lookup is None]
        assert {x.draft for x in alone} == {*single_sequences()}
        assert {x.draft.tree for x in of_size} == {None, *shapes}
        for single in (True, False):
            best = max(x.predicted for x in of_size if (x.draft.tree is None) == single and x.draft.lookup is None)
            assert best == pytest.approx(
                max(v for (n, draft), v in speeds.items() if n == size and (draft.tree is None) == single)
            )
        best_singles = sorted(alone, key=lambda x: -x.predicted)[:12]
        looking_up = {x: slow(size, x) for x in with_lookups([x.draft for x in best_singles])}
        faster = {x.lookup for x, speed in looking_up.items() if speed > best_singles[0].predicted}
        given = {x.draft.lookup: x for x in of_size if x.draft.lookup is not None}
        assert set(given) == faster
        assert faster
        for lookup, setting in given.items():
            assert setting.predicted == pytest.approx(max(v for x, v in looking_up.items() if x.lookup == lookup))


@pytest.mark.long
def test_nothing_is_written_unless_asked_and_what_is_says_for_which_machine(tmp_path, capsys, monkeypatch):
    limits = Limits(1e9, {"float32": 1e12})
    settings = (small_target(), adapter_with_all(tmp_path), [list(range(1, 17))])
    with pytest.raises(MachineError, match="machine here: decoding a batch of 1 does not fit"):
        print_tuning(here(limits, memory=1000), *settings, [], 2, [1], write=False)
    print_tuning(here(limits), *settings, [], 2, [1], write=False)
    assert not (tmp_path / "decode.json").exists()
    print_tuning(here(limits), *settings, [], 2, [1, 4], write=True)
    out = capsys.readouterr().out
    assert "\npredicted, not measured, for here (1 x cpu) in float32, context 16: seconds of a part = max(" in out
    assert "\nbatch 4, 10 tokens to draft: plain step " in out
    assert "\nbatch 4, 100 tokens to draft: plain step " in out
    decide = read_draft_settings(tmp_path).decide
    assert (decide.machine, [costs.batch_size for costs in decide.costs]) == ("here, predicted", [1, 4])
    assert f"wrote {tmp_path}/decode.json, for here, predicted\n" in out
    trees = [x for x in settings_of_trees([2], [4]) if (x.max_draft_len, x.threshold) == (4, 0.0)]
    monkeypatch.setattr(predicted_tuning, "single_sequences", lambda: [DraftConfig(None, 12, 0.0)])
    print_tuning(here(limits), *settings, trees, 1, [1], write=True)
    assert json.loads((tmp_path / "decode.json").read_text())["machine"] == "here, predicted"
    assert read_draft_settings(tmp_path) == DraftConfig(None, 4, 0.0, TreeConfig(2, 4))
