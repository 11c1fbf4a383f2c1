"""Training the draft model that remembers."""

import re
import shutil

import numpy as np
import pytest

from kangaroo_jax import generate, generate_plain
from kangaroo_jax.checkpoint.adapter import load_adapter
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.drafts.kangaroo import Adapter
from kangaroo_jax.model.drafts.memory import MemoryAdapter
from kangaroo_jax.train.loop import train
from tests.reports import Said

from .runs import assert_same, configured


@pytest.mark.long
def test_a_run_is_measured_by_depth_goes_on_as_if_never_stopped_and_decodes(settings, target, tmp_path, run):
    output, said = tmp_path / "run", Said()
    memory = {"output": str(output), "adapter.kind": "memory", "steps": 4, "save_every": 2}
    result = train(configured(settings, **memory), report=said)
    for name, shown in (("expected_acceptance", "expected acceptance"), ("top1_agreement", "top-1 agreement")):
        by_depth = [result[f"{name}_depth_{depth}"] for depth in range(1, MemoryAdapter.depths + 1)]
        assert result[name] == pytest.approx(np.mean(by_depth))
        lines = re.findall(rf"{shown} at depth 1 to {MemoryAdapter.depths}: ([\d. ]+)", said.text)
        assert len(set(lines[0].split())) == 1  # before the first step, nothing is added at any depth
        assert lines[-1].split() == [f"{value:.4f}" for value in by_depth]
    assert len({result[f"loss_depth_{depth}"] for depth in range(1, MemoryAdapter.depths + 1)}) == MemoryAdapter.depths

    shutil.move(output / "4", tmp_path / "never stopped")
    with pytest.raises(InputError, match=r"expected adapter\.kind kangaroo, found memory"):
        train(configured(settings, **memory | {"adapter.kind": "kangaroo"}))
    assert train(configured(settings, **memory)) == result
    assert_same(tmp_path / "never stopped", output / "4")

    adapter = load_adapter(output, target)
    assert type(adapter.model) is MemoryAdapter
    assert np.abs(adapter.model.memory.memory_proj[...]).max() > 0
    out = generate(target, adapter, ["def f("], 16)
    assert out.tokens == generate_plain(target, ["def f("], 16).tokens
    assert type(load_adapter(run[0], target).model) is Adapter
