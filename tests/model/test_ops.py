"""Products of weights against numpy's in float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import processor
from kangaroo_jax.engine.programs import compiler_options
from kangaroo_jax.model.ops import dot

_VOCAB, _HIDDEN = 300, 96


def head_program(rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, str]:
    """Logits by the compiled head, by numpy, and the program's text."""
    rng = np.random.default_rng(sum(rows))
    x = rng.standard_normal((*rows, _HIDDEN)).astype(np.float32)
    weight = rng.standard_normal((_VOCAB, _HIDDEN)).astype(np.float32)
    program = (
        jax.jit(lambda x, weight: dot("...d,vd->...v", x, weight, accumulate=jnp.float32))
        .lower(x, weight)
        .compile(compiler_options=compiler_options("cpu"))
    )
    return np.asarray(program(x, weight)), x.astype(np.float64) @ weight.T.astype(np.float64), program.as_text()


@pytest.mark.parametrize("rows", [(1,), (2,), (3,), (1, 7), (2, 5), (64,), (65,)])
@pytest.mark.parametrize("avx2", [False, True])
def test_logits_are_numpys_on_either_processor(rows: tuple[int, ...], avx2: bool, monkeypatch):
    monkeypatch.setattr(processor, "vectors_are_avx2", lambda: avx2)
    logits, expected, _ = head_program(rows)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize(("rows", "swapped"), [(1, False), (2, True), (5, True), (64, True), (65, False)])
def test_with_avx2_the_head_is_the_left_operand_of_few_rows(rows: int, swapped: bool, monkeypatch):
    monkeypatch.setattr(processor, "vectors_are_avx2", lambda: True)
    *_, text = head_program((rows,))
    assert "ynn" not in text
    products = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", text)
    assert products == [f"{_VOCAB},{max(rows, 3)}" if swapped else f"{rows},{_VOCAB}"]


@pytest.mark.parametrize(
    ("flags", "expected"), [("fpu avx avx2 fma", True), ("fpu avx avx2 avx512f avx512bw", False), ("fpu sse4_2", False)]
)
def test_avx2_is_told_by_the_processors_flags(flags: str, expected: bool, monkeypatch):
    monkeypatch.setattr(processor, "_fields", lambda: {"model name": "one", "flags": flags})
    assert processor.vectors_are_avx2() == expected
    assert processor.name() == "one"


def test_a_system_without_cpuinfo_has_a_name(monkeypatch):
    monkeypatch.setattr(processor, "_fields", dict)
    assert processor.name()
    assert not processor.vectors_are_avx2()
