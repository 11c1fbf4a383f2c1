"""The order and number of timed calls, and the settings that `bench tree` compares."""

import types

from kangaroo_jax import DraftConfig, TreeConfig
from kangaroo_jax.bench.interleaved import time_interleaved
from kangaroo_jax.bench.tree_speed import settings_to_compare, single_sequence


def test_calls_take_turns_and_the_first_run_is_not_timed():
    order = []
    # Seconds of each run, the untimed first included.
    seconds = {("a", 1): [99, 3, 1, 2], ("b", 1): [99, 6, 4, 5], ("a", 2): [99, 7, 9, 8], ("b", 2): [99, 10, 12, 11]}

    def call(name):
        def run(value):
            order.append(name)
            return types.SimpleNamespace(name=name, seconds=seconds[name, value].pop(0))

        return run

    timings = time_interleaved([call("a"), call("b")], [1, 2], 3, lambda output: output.seconds)
    assert order == ["a", "b"] * 8
    assert timings.seconds.tolist() == [[2, 8], [5, 11]]
    assert [[output.seconds for output in found] for found in timings.outputs] == [[99, 99], [99, 99]]


def test_a_tree_is_compared_with_a_single_sequence_at_the_papers_threshold():
    tree = DraftConfig(None, 5, 0.1, TreeConfig(3, 12))
    assert single_sequence(tree, None) == DraftConfig(None, 5, 0.6)
    assert single_sequence(DraftConfig(None, 5, 0.3), 7) == DraftConfig(None, 7, 0.3)


def test_settings_are_single_sequences_then_every_tree():
    single = DraftConfig(None, 4, 0.3)
    assert settings_to_compare(single, [2, 3], [8], [0.1, 0.3]) == [
        single,
        DraftConfig(None, 4, 0.1),
        *(DraftConfig(None, 4, eta, TreeConfig(topk, 8)) for topk in (2, 3) for eta in (0.1, 0.3)),
    ]
    assert settings_to_compare(single, [], [], [0.3]) == [single]
