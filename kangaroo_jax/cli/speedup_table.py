"""The speed-up that costs of parts imply, as a table."""

from __future__ import annotations

import numpy as np

from kangaroo_jax.engine.part_costs import PartTimes


def print_speedups(times: PartTimes, max_draft_len: int) -> None:
    """Prints the speed-up over plain decoding by mean accept length: with all of a round's drafts always made, and with
    drafting that ends at the first token that the target rejects, which is the most that eta can do."""
    lengths = np.arange(2, 2 * max_draft_len + 3) / 2
    print(f"{'mean accept length':24}" + "".join(f"{length:7.1f}" for length in lengths))
    rows = {
        f"{max_draft_len} drafts in each round": [max_draft_len] * len(lengths),
        "drafts up to a rejected": np.minimum(lengths, max_draft_len).tolist(),
    }
    for name, drafts in rows.items():
        speeds = (length / times.round_cost(count) for length, count in zip(lengths, drafts, strict=True))
        print(f"{name:24}" + "".join(f"{speed:7.2f}" for speed in speeds))
