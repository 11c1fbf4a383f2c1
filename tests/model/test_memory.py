"""The draft model that remembers: what is trained is what drafts."""

import jax
import jax.numpy as jnp
import numpy as np

from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.drafts.kangaroo import draft_head
from kangaroo_jax.model.target import deep_apply, shallow_apply
from kangaroo_jax.train.objective import segment_mask
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

GAMMA, LENGTH, EXIT_LAYER = 4, 20, 2


def states(target, tokens, positions, mask=None):
    """Shallow and normed deep hidden states."""
    shallow, _ = shallow_apply(target, tokens, positions, exit_layer=EXIT_LAYER, mask=mask)
    return shallow, deep_apply(target, shallow, positions, exit_layer=EXIT_LAYER, mask=mask)[0]


@jax.jit
def drafted(target, adapter, shallow, deep, known):
    """Logits [gamma, vocabulary] of a round behind `known` tokens of a text, whose next ones are drafted."""

    def at(index):
        return jax.lax.dynamic_slice_in_dim(shallow, index, 1, axis=1)

    state = adapter.init(1, LENGTH, jnp.float32, CpuBackend())
    start = jnp.full((1,), known)
    # What is not known is not given.
    seen = jnp.where((jnp.arange(LENGTH) < known)[:, None], deep, jnp.nan)
    state = adapter.after_prefill(state, None, shallow, seen, jnp.zeros((1,), jnp.int32), start)
    carry, logits = adapter.begin(target, state, None, at(known), start)
    rows = [logits[0]]
    for i in range(1, GAMMA):
        carry, logits = adapter.step(target, carry, None, at(known + i), start + i)
        rows.append(logits[0, 0])
    return jnp.stack(rows)


def test_training_sees_at_each_depth_what_decoding_sees_after_as_many_drafts():
    target, adapter = tiny_target().model, tiny_adapter(EXIT_LAYER, kind="memory").model
    rng = np.random.default_rng(0)
    tokens, positions = rng.integers(0, VOCABULARY, (1, LENGTH)), jnp.arange(LENGTH)[None]
    shallow, deep = jax.jit(states)(target, tokens, positions)
    mask = segment_mask(jnp.ones((1, LENGTH), jnp.int32))

    @jax.jit
    def trained(depths):
        return draft_head(target, adapter, adapter.at_depths(shallow, deep, positions, mask, depths))[0]

    for known in range(1, LENGTH - GAMMA):
        found = drafted(target, adapter, shallow, deep, known)
        depths = rng.integers(1, GAMMA + 1, (1, LENGTH))  # what other positions draw changes nothing
        depths[0, known : known + GAMMA] = np.arange(1, GAMMA + 1)
        expected = trained(depths)[known : known + GAMMA]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)
        # It matters.
        assert np.abs(expected - trained(depths % GAMMA + 1)[known : known + GAMMA]).max() > 0.1


def test_packed_examples_do_not_see_each_others_deep_states():
    target, adapter = tiny_target().model, tiny_adapter(EXIT_LAYER, kind="memory").model
    rng = np.random.default_rng(1)
    lengths = (5, 1, 9)
    total, ends = sum(lengths), np.cumsum(lengths)
    packed = {
        "tokens": rng.integers(0, VOCABULARY, total),
        "positions": np.concatenate([np.arange(n) for n in lengths]),
        "segment_ids": np.repeat([1, 2, 3], lengths),
        "depths": rng.integers(1, 7, total),
    }

    @jax.jit
    def outputs(tokens, positions, segment_ids, depths):
        mask = segment_mask(segment_ids)
        return adapter.at_depths(*states(target, tokens, positions, mask), positions, mask, depths)[0]

    together = outputs(**{name: x[None] for name, x in packed.items()})
    for end, length in zip(ends, lengths, strict=True):
        alone = {name: np.pad(x[end - length : end], (0, total - length))[None] for name, x in packed.items()}
        np.testing.assert_allclose(together[end - length : end], outputs(**alone)[:length], rtol=2e-4, atol=2e-4)
