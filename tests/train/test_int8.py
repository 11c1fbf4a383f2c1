"""Training with a target in int8: objective and gradient against those of its dequantized weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax.checkpoint.adapter import adapter_from_parameters
from kangaroo_jax.checkpoint.target import load_target
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.model.ops import as_arrays
from kangaroo_jax.train.objective import adapter_loss
from kangaroo_jax.train.step import initial_parameters

TARGET = pathlib.Path(__file__).parents[1] / "fixtures" / "golden" / "tiny-gqa"


@pytest.mark.long
def test_loss_and_gradient_are_those_with_the_dequantized_weights():
    in_int8 = load_target(TARGET, "float32", weights="int8").model
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 250, (2, 16)), jnp.int32)
    batch = tokens, jnp.ones(tokens.shape), jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(16), tokens.shape)

    @jax.jit
    def loss_and_gradient(model):
        def loss(parameters):
            adapter = adapter_from_parameters(model.config, parameters)
            return adapter_loss(adapter, model, *batch, exit_layer=2, chunk=8)[0]

        return jax.value_and_grad(loss)(initial_parameters(model, 2, "layer", 0, AdapterConfig("kangaroo")))

    (loss, gradient), (expected, exact) = loss_and_gradient(in_int8), loss_and_gradient(as_arrays(in_int8))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert gradient.keys() == exact.keys()
    for path, found in gradient.items():
        scale = np.abs(exact[path]).max()
        assert scale > 0, path
        np.testing.assert_allclose(found, exact[path], atol=1e-4 * scale, err_msg=path)
