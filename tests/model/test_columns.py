"""Weights stored as columns of outputs: the same numbers, products and tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import DraftConfig, generate, generate_plain, processor
from kangaroo_jax.checkpoint.target import load_target, save_target
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.model import columns
from kangaroo_jax.model.columns import ColumnArray, columns_where_faster
from kangaroo_jax.model.ops import as_arrays, dot, rows
from kangaroo_jax.train.step import initial_parameters
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

EXIT_LAYER = 2


@pytest.fixture
def avx2(monkeypatch):
    """A processor whose first cache crowds at every width, and whose second one holds nothing."""
    monkeypatch.setattr(processor, "vectors_are_avx2", lambda: True)
    monkeypatch.setattr(columns, "_LARGE", 0)
    monkeypatch.setattr(columns, "_CROWDED", 1)


@pytest.mark.parametrize(
    ("path", "spec", "shape"),
    [
        ("layers.0.mlp.down_proj", "...k,kn->...n", (24, 32)),
        ("layers.0.mlp.gate_up_proj", "...h,hgi->...gi", (24, 2, 40)),
        ("embed_tokens", "...d,vd->...v", (50, 24)),
    ],
)
def test_products_and_values_are_those_of_the_array(path, spec, shape, avx2):
    rng = np.random.default_rng(0)
    array = rng.normal(size=shape).astype(np.float32)
    weight = columns_where_faster(path, jnp.asarray(array))
    assert isinstance(weight, ColumnArray)
    np.testing.assert_array_equal(weight.as_array(), array)
    assert weight.columns.shape[1] * weight.dtype.itemsize // 64 % 2 == 1
    for leading in ((1,), (2,), (1, 5), (2, 33)):
        x = rng.normal(size=(*leading, 24)).astype(np.float32)
        found = jax.jit(lambda x, weight: dot(spec, x, weight))(x, weight)
        np.testing.assert_allclose(found, np.einsum(spec, x.astype(np.float64), array), atol=1e-4)


def test_rows_of_a_table_are_the_arrays(avx2):
    array = np.random.default_rng(0).normal(size=(50, 24)).astype(np.float32)
    table = columns_where_faster("embed_tokens", jnp.asarray(array))
    for index in (np.array([[49]]), np.array([[0, 5, 5], [49, 1, 7]])):
        np.testing.assert_array_equal(rows(table, jnp.asarray(index), jnp.float32), array[index])
    np.testing.assert_array_equal(table[jnp.asarray([3, 1])], array[[3, 1]])  # a draft vocabulary's


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("layers.0.mlp.gate_up_proj", (576, 2, 1536), 3088),  # 192 cache lines become 193
        ("layers.0.self_attn.qkv_proj", (576, 3, 5, 64), None),  # 60, no multiple of 16
        ("layers.0.mlp.gate_up_proj", (32, 2, 1536), None),  # stays in the cache
        ("lm_head", (4100, 256), 4112),  # a table: whatever its width
        ("norm.weight", (1 << 20,), None),
    ],
)
def test_large_weights_whose_rows_would_share_places_of_the_cache_are_columns(path, shape, expected, monkeypatch):
    array = jnp.zeros(shape, jnp.float32)
    monkeypatch.setattr(processor, "vectors_are_avx2", lambda: True)
    found = columns_where_faster(path, array)
    assert (found.columns.shape[1] if isinstance(found, ColumnArray) else None) == expected
    monkeypatch.setattr(processor, "vectors_are_avx2", lambda: False)
    assert columns_where_faster(path, array) is array


@pytest.fixture
def folder(tmp_path):
    save_target(tiny_target().model, tmp_path / "tiny", np.float32)
    return tmp_path / "tiny"


def columns_of(tree) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, ColumnArray))
    return sum(isinstance(x, ColumnArray) for x in leaves)


def test_tokens_are_those_of_the_target_in_arrays(folder, avx2):
    target = load_target(folder, "float32")
    # Four matrices in each layer, the embedding, and a head if it is another.
    heads = 1 if target.config.tie_word_embeddings else 2
    assert columns_of(target.model) == 4 * target.config.num_hidden_layers + heads
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCABULARY, size).tolist() for size in (1, 7, 30)]
    expected = generate_plain(tiny_target(), prompts, 30, eos_token_ids=[]).tokens
    assert generate_plain(target, prompts, 30, eos_token_ids=[]).tokens == expected
    out = generate(target, tiny_adapter(EXIT_LAYER), prompts, 30, DraftConfig(EXIT_LAYER, 4, 0.1), eos_token_ids=[])
    assert out.tokens == expected


def test_a_loaded_target_is_saved_and_trained_from_as_arrays(folder, avx2, tmp_path):
    model = load_target(folder, "float32").model
    save_target(model, tmp_path / "saved", np.float32)
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    found, expected = (
        initial_parameters(x, EXIT_LAYER, "layer", 0, AdapterConfig("kangaroo")) for x in (model, as_arrays(model))
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(x, expected[path]) for path, x in found.items())
