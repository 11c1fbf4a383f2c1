"""Predicted speeds against sums done by hand, and decode.json from being written to being used."""

import json

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, InputError, load_adapter
from kangaroo_jax.bench.acceptance import Chains
from kangaroo_jax.bench.tune import Costs, predict
from kangaroo_jax.checkpoint.adapter import read_draft_settings, save_adapter, write_draft_settings
from tests.decode.models import tiny_adapter, tiny_target


def test_prediction_by_hand():
    # Rounds: 2 drafts commit 2 tokens, then 1 draft commits 1. On CPU, 2 drafts take the verification of 3 positions,
    # 1 draft that of 2: 3 tokens in 5 + 4 seconds, which plain decoding needs 3 * 2 seconds for.
    chains = Chains(np.asarray([[0.9, 0.2], [0.9, 0.9], [0.1, 0.1]], np.float32), np.asarray([1, 2, 0]))
    costs = Costs(plain_step=2.0, draft_step=1.0, rounds={1: 4.0, 2: 5.0})
    assert predict([chains], costs, 2, 0.5) == pytest.approx(6 / 9)
    assert predict([chains, chains], costs, 2, 0.5) == pytest.approx(6 / 9)
    # Without the early exit: two rounds of 2 drafts.
    assert predict([chains], costs, 2, 0.0) == pytest.approx(6 / 10)


def test_a_shorter_draft_in_the_same_width_costs_that_many_draft_steps_less():
    costs = Costs(plain_step=1.0, draft_step=0.5, rounds={1: 3.0, 2: 4.0, 4: 6.0, 6: 8.0})
    assert [costs.round(drafted, 6) for drafted in range(1, 7)] == [3.0, 4.0, 5.5, 6.0, 7.5, 8.0]


def test_written_settings_are_those_an_adapter_is_loaded_with(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(folder, tiny_adapter(2).model, exit_layer=2, target=tiny_target())
    assert load_adapter(folder, tiny_target()).draft == DraftConfig()
    write_draft_settings(folder, DraftConfig(None, 9, 0.25))
    assert load_adapter(folder, tiny_target()).draft == DraftConfig(None, 9, 0.25)


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
    ],
)
def test_wrong_settings_are_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "decode.json").write_text(content)
    with pytest.raises(InputError, match=r"decode\.json: ") as error:
        read_draft_settings(tmp_path)
    assert "\n" not in str(error.value)
