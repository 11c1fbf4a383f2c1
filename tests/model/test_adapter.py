"""The adapter, compared with a slow float64 reference in numpy: one loop per head and query, no cache, no fusion.

The reference is written from the paper's section 3.1 and the layout that the Hugging Face names have.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.checkpoint.mapping import parameter_rule
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.cache import KVCache
from kangaroo_jax.model.config import ModelConfig, RopeScaling
from kangaroo_jax.model.drafts.kangaroo import Adapter, adapter_apply
from kangaroo_jax.model.naming import parameter_paths

LENGTH = 11
CONFIGS = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2},
    "head_dim, linear": {"head_dim": 6, "rope_scaling": RopeScaling("linear", 3.0)},
    "biases": {"qkv_bias": True, "o_bias": True, "num_key_value_heads": 1},
}


def make_adapter(**settings: object) -> Adapter:
    config = ModelConfig(
        **{
            "model_type": "llama",
            "vocab_size": 11,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "max_position_embeddings": 32,
            "rms_norm_eps": 1e-2,
            "rope_theta": 100.0,
        }
        | settings
    )
    rng = np.random.default_rng(2)
    abstract = nnx.eval_shape(lambda: Adapter(config, rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(x.ndim == 1, 0.4, x.shape), jnp.float32), abstract)


def reference(adapter: Adapter, hidden: np.ndarray) -> np.ndarray:
    """The adapter's output for one sequence [time, hidden]."""
    config = adapter.config
    weights = {}
    for path, leaf in zip(parameter_paths(adapter), jax.tree.leaves(adapter), strict=True):
        rule = parameter_rule(path, leaf.shape)
        weights |= dict(zip(rule.names, rule.split(np.asarray(leaf, np.float64)), strict=True))

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean() + config.rms_norm_eps) * weight

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        out = weights[f"layers.0.self_attn.{name}_proj.weight"] @ x
        return out + weights.get(f"layers.0.self_attn.{name}_proj.bias", 0.0)

    def rotated(x: np.ndarray, position: int) -> np.ndarray:
        half = config.head_dim // 2
        factor = 1.0 if config.rope_scaling is None else config.rope_scaling.factor
        out = np.empty_like(x)
        for i in range(half):
            angle = position / factor * config.rope_theta ** (-2 * i / config.head_dim)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    normed = [norm(x, weights["layers.0.input_layernorm.weight"]) for x in hidden]
    queries, keys, values = ([linear(x, name).reshape(-1, config.head_dim) for x in normed] for name in "qkv")
    out = []
    for t in range(len(hidden)):
        heads = []
        for head in range(config.num_attention_heads):
            kv = head * config.num_key_value_heads // config.num_attention_heads
            query = rotated(queries[t][head], t)
            scores = np.array([query @ rotated(keys[s][kv], s) for s in range(t + 1)]) / np.sqrt(config.head_dim)
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            heads.append(sum(share * values[s][kv] for s, share in enumerate(shares)))
        mixed = hidden[t] + linear(np.concatenate(heads), "o")
        out.append(norm(mixed, weights["norm.weight"]))
    return np.array(out)


@pytest.fixture(scope="module", params=CONFIGS)
def adapter(request: pytest.FixtureRequest) -> Adapter:
    return make_adapter(**CONFIGS[request.param])


@pytest.fixture(scope="module")
def hidden() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((2, LENGTH, 16)).astype(np.float32)


@functools.partial(jax.jit)
def step(adapter: Adapter, hidden: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
    positions = cache.length[:, None] + jnp.arange(hidden.shape[1])
    return adapter_apply(adapter, hidden, positions, cache)


def assert_close(found: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_without_a_cache(adapter: Adapter, hidden: np.ndarray) -> None:
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, LENGTH))
    found, cache = jax.jit(adapter_apply)(adapter, hidden, positions)
    assert cache is None
    assert_close(found, np.stack([reference(adapter, x) for x in hidden]))


@pytest.mark.parametrize("blocks", [[LENGTH], [4, 1, 2, 1, 3]])
def test_blocks_through_the_cache(adapter: Adapter, hidden: np.ndarray, blocks: list[int]) -> None:
    cache = KVCache.empty(adapter.config, 1, 2, 16, jnp.float32, CpuBackend())
    found, done = [], 0
    for width in blocks:
        out, cache = step(adapter, hidden[:, done : done + width], cache)
        found.append(out)
        done += width
    assert cache.length.tolist() == [LENGTH, LENGTH]
    assert_close(jnp.concatenate(found, axis=1), np.stack([reference(adapter, x) for x in hidden]))


def test_ragged_rollback(adapter: Adapter, hidden: np.ndarray) -> None:
    """Both sequences write 6 entries, the last ones wrong; they go on from 3 and 5."""
    wrong = hidden[:, :6].copy()
    wrong[0, 3:] += 1.0
    wrong[1, 5:] -= 1.0
    _, cache = step(adapter, wrong, KVCache.empty(adapter.config, 1, 2, 16, jnp.float32, CpuBackend()))
    starts = [3, 5]
    cache = cache.replace(length=jnp.asarray(starts, jnp.int32))
    out, _ = step(adapter, np.stack([x[s : s + 4] for x, s in zip(hidden, starts, strict=True)]), cache)
    for i, start in enumerate(starts):
        assert_close(out[i], reference(adapter, hidden[i])[start : start + 4])
