"""The training objective against NumPy in float64: the definitions written out, with whole logits.

Expected acceptance is also compared with its meaning: the chance that speculative sampling accepts a draft, summed
over all drafts (Leviathan et al. 2023, section 3.1).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.target import TargetModel
from kangaroo_jax.train.objective import adapter_loss, distillation

BATCH, TIME, VOCABULARY, HIDDEN = 3, 13, 41, 16


@pytest.fixture(scope="module")
def target():
    config = ModelConfig(
        model_type="llama",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=32,
    )

    @jax.jit
    def made():
        model = TargetModel(config, rngs=nnx.Rngs(0))
        return jax.tree.map(lambda x: x * 20 if x.ndim > 1 else x, model)  # far from uniform logits

    return made()


@pytest.fixture(scope="module")
def hidden():
    rng = np.random.default_rng(0)
    teacher, draft = rng.normal(size=(2, BATCH, TIME, HIDDEN)).astype(np.float32)
    mask = (rng.random((BATCH, TIME)) < 0.7).astype(np.float32)
    return teacher, draft, mask


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def reference(target, teacher, draft, mask, drafted=range(VOCABULARY)):
    """Means of loss and metrics, and the gradients of cross entropy and of total variation for the draft's hidden
    states. `drafted`: the tokens that drafts are made of."""
    drafted = list(drafted)
    head = np.asarray(target.lm_head[...], np.float64)
    teacher_logits, draft_logits = teacher.astype(np.float64) @ head.T, draft.astype(np.float64) @ head[drafted].T
    p, q = softmax(teacher_logits)[..., drafted], softmax(draft_logits)
    loss = -(p * np.log(q)).sum(-1)
    acceptance = np.zeros(mask.shape)
    for i in range(len(drafted)):  # a draft of the token comes with chance q and is accepted with min(1, p / q)
        acceptance += q[..., i] * np.minimum(1.0, p[..., i] / q[..., i])
    agreement = teacher_logits.argmax(-1) == np.asarray(drafted)[draft_logits.argmax(-1)]
    means = [(x * mask).sum() / mask.sum() for x in (loss, acceptance, agreement)]
    # Of min(p, q), the tokens with q below p have a gradient: 1 for q, and q's softmax below it.
    below = (q < p).astype(np.float64)
    variation = -q * (below - (q * below).sum(-1, keepdims=True))
    entropy = p.sum(-1, keepdims=True) * q - p
    gradients = [x @ head[drafted] * mask[..., None] / mask.sum() for x in (entropy, variation)]
    return dict(zip(("loss", "expected_acceptance", "top1_agreement"), means, strict=True)), *gradients


@pytest.mark.parametrize("drafted", [None, [40, 3, 0, *range(10, 30)]], ids=["all tokens", "a draft vocabulary"])
@pytest.mark.parametrize(
    ("loss", "chunk"),
    [("cross_entropy", 1), ("cross_entropy", 4), ("cross_entropy", TIME), ("total_variation", 4), ("both", 64)],
)
def test_chunked_values_and_gradient_equal_the_whole_reference(target, hidden, loss, chunk, drafted):
    teacher, draft, mask = hidden
    vocabulary = None if drafted is None else DraftVocabulary(target, jnp.asarray(drafted))
    expected, of_entropy, of_variation = reference(target, teacher, draft, mask, drafted or range(VOCABULARY))
    assert 0.05 < expected["expected_acceptance"] < 0.95  # else the comparison would say little
    share = {"cross_entropy": (1, 0), "total_variation": (0, 1), "both": (1, 1)}[loss]
    expected_value = share[0] * expected["loss"] + share[1] * (1 - expected["expected_acceptance"])
    expected_gradient = share[0] * of_entropy + share[1] * of_variation

    def objective(draft):
        return distillation(target, teacher, draft, mask, vocabulary, chunk=chunk, loss=loss)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(jnp.asarray(draft))
    np.testing.assert_allclose(float(value), expected_value, rtol=2e-6)
    assert float(metrics["positions"]) == mask.sum()
    for name, value in expected.items():
        np.testing.assert_allclose(float(metrics[name]), value, rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6 * np.abs(expected_gradient).max())


def test_equal_hidden_states_are_always_accepted(target, hidden):
    teacher, _, mask = hidden
    _, metrics = distillation(target, teacher, teacher, mask, chunk=5)
    assert float(metrics["expected_acceptance"]) == pytest.approx(1, abs=1e-6)
    assert float(metrics["top1_agreement"]) == 1


def test_what_the_target_gives_to_tokens_that_cannot_be_drafted_is_never_covered(target, hidden):
    teacher, _, mask = hidden
    drafted = [5, 17, 2]
    _, metrics = distillation(target, teacher, teacher, mask, DraftVocabulary(target, jnp.asarray(drafted)), chunk=5)
    p = softmax(teacher.astype(np.float64) @ np.asarray(target.lm_head[...], np.float64).T)
    covered = (p[..., drafted].sum(-1) * mask).sum() / mask.sum()
    assert 0.02 < covered < 0.5
    # The draft is the target's distribution on the three, which is above its probabilities, as they lack the rest.
    assert float(metrics["expected_acceptance"]) == pytest.approx(covered, rel=1e-5)
    assert float(metrics["top1_agreement"]) == pytest.approx((np.isin(p.argmax(-1), drafted) * mask).sum() / mask.sum())


def test_an_empty_mask_is_a_zero_loss_not_nan(target, hidden):
    teacher, draft, mask = hidden
    loss, metrics = distillation(target, teacher, draft, np.zeros_like(mask), chunk=5)
    assert float(loss) == 0
    assert float(metrics["positions"]) == 0


def test_whole_logits_never_exist(target, hidden):
    teacher, draft, mask = hidden
    program = str(jax.make_jaxpr(jax.grad(lambda x: distillation(target, teacher, x, mask, chunk=4)[0]))(draft))
    assert f"f32[{BATCH},4,{VOCABULARY}]" in program
    for time in (TIME, 16):  # as given, and padded to a whole number of chunks
        assert f"f32[{BATCH},{time},{VOCABULARY}]" not in program
    assert f"f32[4,{BATCH},4,{VOCABULARY}]" not in program  # all chunks, kept for the backward pass


def batch_of_one_example_a_row():
    """Random tokens, all of which count: tokens, loss mask, segment ids and positions."""
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (BATCH, TIME))
    return tokens, np.ones((BATCH, TIME), np.float32), np.ones_like(tokens), np.tile(np.arange(TIME), (BATCH, 1))


def test_gradient_flows_to_the_adapter_alone(target):
    adapter = jax.jit(lambda: Adapter(target.config, rngs=nnx.Rngs(1)))()
    batch = batch_of_one_example_a_row()

    def objective(models):
        return adapter_loss(*models, *batch, exit_layer=1, chunk=8)[0]

    of_adapter, of_target = jax.jit(jax.grad(objective))((adapter, target))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(of_adapter))
    assert all(np.abs(x).max() == 0 for x in jax.tree.leaves(of_target))


def test_float32_masters_train_a_bfloat16_target(target):
    lower = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), target)
    adapter = nnx.eval_shape(lambda: Adapter(target.config, rngs=nnx.Rngs(1)))
    batch = batch_of_one_example_a_row()

    def objective(adapter, lower):
        return adapter_loss(adapter, lower, *batch, exit_layer=1, chunk=8)[0]

    gradient = jax.eval_shape(jax.grad(objective), adapter, lower)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
