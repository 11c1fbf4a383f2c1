"""The ways of drafting that the batch command compares."""

from __future__ import annotations

from kangaroo_jax.bench.batch_speed import ways_of_drafting
from kangaroo_jax.config import DecideConfig, DraftConfig, LookupConfig, TreeConfig


def test_sequences_that_decide_do_so_at_every_batch_size():
    written = DraftConfig(None, 5, 0.3, lookup=LookupConfig(), decide=DecideConfig(acceptance=0.4, from_slots=4))
    ways = ways_of_drafting(written)
    assert list(ways) == ["fixed", "deciding"]
    assert all(
        (draft.max_draft_len, draft.threshold, draft.lookup) == (5, 0.3, LookupConfig()) for draft in ways.values()
    )
    assert ways["fixed"].at(8).decide is None
    assert ways["deciding"].at(1).decide == DecideConfig(acceptance=0.4)


def test_of_a_tree_nothing_decides():
    tree = DraftConfig(tree=TreeConfig())
    assert ways_of_drafting(tree) == {"fixed": tree}
