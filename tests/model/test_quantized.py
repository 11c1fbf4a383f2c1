"""int8 weights: products and rows against numpy, and what rounding does to a matrix."""

import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.model import ops
from kangaroo_jax.model.ops import dot, rows
from kangaroo_jax.model.quantized import QuantizedArray, input_axis, quantize_rows

PRODUCTS = ("direct", "blocks", "pairs")


def random_weight(shape, axis, product, num_scales=1):
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, shape).astype(np.int8)
    dtype = np.float32 if num_scales == 1 else np.float16
    scales = rng.uniform(0.5, 2, [num_scales if i == axis else size for i, size in enumerate(shape)]).astype(dtype)
    exact = values * np.repeat(scales.astype(np.float64), shape[axis] // num_scales, axis)
    return QuantizedArray(jnp.asarray(values), jnp.asarray(scales), product), exact


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize(
    ("spec", "shape", "axis", "num_scales"),
    [
        ("...k,kn->...n", (23, 10), 0, 1),
        ("...h,hgi->...gi", (23, 2, 5), 0, 1),
        ("...d,vd->...v", (23, 10), 1, 1),
        ("...k,kn->...n", (42, 10), 0, 14),  # of 3 inputs each: 6 of 7 rows at a time
        ("...h,hgi->...gi", (40, 2, 5), 0, 5),  # of 8, more than 7 rows
        ("...d,vd->...v", (23, 10), 1, 2),
    ],
)
def test_a_product_is_that_of_numpy_with_the_dequantized_weight(spec, shape, axis, num_scales, product, monkeypatch):
    monkeypatch.setattr(ops, "_BLOCK", 70)  # 7 rows of 23: three blocks and a rest
    monkeypatch.setattr(ops, "_FEW_ROWS", 6)
    weight, exact = random_weight(shape, axis, product, num_scales)
    assert weight.in_blocks == (num_scales > 1)
    for num_rows in (1, 6, 7) if product == "blocks" else (1,):
        x = np.random.default_rng(1).normal(size=(1, num_rows, shape[axis])).astype(np.float32)
        expected = np.einsum(spec, x.astype(np.float64), exact)
        found = dot(spec, jnp.asarray(x), weight)
        assert (found.shape, found.dtype) == (expected.shape, jnp.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_a_bfloat16_product_is_rounded_once():
    weight, exact = random_weight((64, 10), 0, "direct")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 64)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ exact
    found = dot("...k,kn->...n", x, weight)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-3)
    kept = dot("...k,kn->...n", x, weight, accumulate=jnp.float32)
    np.testing.assert_allclose(kept, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("num_scales", [1, 5])
@pytest.mark.parametrize("product", PRODUCTS)
def test_rows_of_a_table_are_the_dequantized_ones(product, num_scales):
    table, exact = random_weight((23, 10), 1, product, num_scales)
    for index in (np.array([[22]]), np.array([[0, 5, 5], [22, 1, 7]])):
        found = rows(table, jnp.asarray(index), jnp.float32)
        np.testing.assert_allclose(found, exact[index], rtol=1e-6)
    taken = table[jnp.asarray([3, 1])]  # a draft vocabulary's
    np.testing.assert_allclose(taken.as_array(), exact[[3, 1]], rtol=1e-6)


def test_a_matrix_is_rounded_to_the_nearest_of_255_values_per_row(monkeypatch):
    monkeypatch.setattr("kangaroo_jax.model.quantized._BAND", 40)  # a few rows at a time
    matrix = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32) * np.logspace(-3, 3, 9)[:, None]
    matrix[4] = 0
    matrix[5] = 1e-45  # its 127th part is no float32
    matrix[6, 3] = np.nan
    values, scales = quantize_rows(matrix)
    assert (values.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (9, 1))
    good = [0, 1, 2, 3, 7, 8]
    error = np.abs(values[good] * scales[good].astype(np.float64) - matrix[good])
    assert (error <= 0.5001 * scales[good]).all()
    assert (np.abs(values[good]).max(axis=1) == 127).all()
    assert not values[4:6].any()
    assert (scales[4:6] == 1).all()
    assert np.isnan(values[6] * scales[6]).all()


def test_matrices_alone_are_in_int8():
    assert input_axis("layers.0.self_attn.qkv_proj", 4) == input_axis("layers.0.mlp.down_proj", 2) == 0
    assert input_axis("embed_tokens", 2) == input_axis("lm_head", 2) == 1
    for path, ndim in (("norm.weight", 1), ("layers.0.self_attn.qkv_bias", 3), ("layers.0.gate", 2)):
        assert input_axis(path, ndim) is None
