"""What commands say of the costs by which sequences decide."""

import pytest

from kangaroo_jax.bench import machine
from kangaroo_jax.cli.models import draft_of
from kangaroo_jax.config import DecideConfig, DraftConfig, RoundCosts

COSTS = tuple(RoundCosts(size, 0.1, ((1, 1.0), (7, 1.5)), 0.1) for size in (1, 8))


@pytest.mark.parametrize(
    ("costs", "place", "slots", "said"),
    [
        ((), "", 1, "costs of rounds are predicted"),
        (COSTS, "another machine", 8, "costs of batch 8 on another machine, for batch 8 on "),
        (COSTS, machine.name(), 7, "costs of batch 8 on "),
        (COSTS, machine.name(), 8, None),
    ],
)
def test_costs_of_another_batch_or_machine_are_said_with_what_measures_them(costs, place, slots, said, capsys):
    draft = DraftConfig(None, 6, 0.6, decide=DecideConfig(costs, 0.7, place))
    assert draft_of(draft, slots, "int8", "some model", None).decide is not None
    err = capsys.readouterr().err
    if said is None:
        assert err == ""
        return
    assert err.startswith("note: ") and said in err and err.count("\n") == 1
    assert f"bench tune --model='some model' --weights=int8 --batch_sizes={slots}` measures them" in err
