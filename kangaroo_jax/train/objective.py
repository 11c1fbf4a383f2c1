"""The training objective: the adapter learns the target's next-token distribution (paper, section 3.1).

Teacher and draft model are compared at the same position, so there are no shifted labels. Logits exist for one chunk
of positions at a time. The forward pass computes the gradient for a chunk's hidden states together with its logits, so
the backward pass does not compute the logits again.

With a draft vocabulary, the draft's distribution is over its tokens alone, and the teacher's over all. What the teacher
gives to the others is neither renormalised away nor covered: cross entropy and expected acceptance are sums over the
draft vocabulary of terms with the teacher's own probabilities, so a position counts by how much of it can be drafted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from kangaroo_jax.model.drafts.kangaroo import Adapter, DraftVocabulary
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, logits, shallow_apply

Sums = dict[str, Float[Array, ""]]

# The loss at a position, from the other values of `chunk_sums` there. TrainConfig.loss names one.
LOSSES = {
    "cross_entropy": lambda values: values["loss"],
    "total_variation": lambda values: 1 - values["expected_acceptance"],
    "both": lambda values: values["loss"] + 1 - values["expected_acceptance"],
}


def chunk_sums(
    target: TargetModel,
    vocabulary: DraftVocabulary | None,
    teacher: Float[Array, "batch time hidden"],
    draft: Float[Array, "batch time hidden"],
    mask: Float[Array, "batch time"],
    loss: str,
) -> tuple[Sums, Float[Array, "batch time hidden"]]:
    """Sums over the positions of one chunk, each weighted by `mask`, and the objective's gradient for `draft`.

    Args:
      target: the target; its LM head makes both sets of logits.
      vocabulary: tokens that drafts are made of, and the head's rows for them; None for all.
      teacher: the target's normed hidden states.
      draft: the adapter's output.
      mask: weight of each position in the loss; 0 leaves it out.
      loss: a name in `LOSSES`.

    Returns:
      The sums: `loss` (cross entropy between the two softmaxes, nats; without the tokens that cannot be drafted),
      `expected_acceptance` (sum over the tokens that can be drafted of min(p_target, p_draft): the probability that
      speculative sampling accepts the draft, Leviathan et al. 2023), `top1_agreement` (1 where both have the same
      likeliest token), `positions` (the mask itself), `objective` (the loss of that name). And the gradient of the
      summed objective.
    """
    teacher_logits = lm_head(target, teacher)
    p, likeliest = jax.nn.softmax(teacher_logits), teacher_logits.argmax(-1)
    if vocabulary is None:
        head, token_ids = functools.partial(lm_head, target), None
    else:
        head = functools.partial(logits, target.config, weight=vocabulary.weight[...])
        token_ids = vocabulary.token_ids[...]
        p = p[..., token_ids]
    draft_logits, pull_back = jax.vjp(head, draft)

    def objective(draft_logits: Array) -> tuple[Array, Sums]:
        drafted = draft_logits.argmax(-1)
        drafted = drafted if token_ids is None else token_ids[drafted]
        values = {
            "loss": optax.losses.softmax_cross_entropy(draft_logits, p),
            "expected_acceptance": jnp.minimum(p, jax.nn.softmax(draft_logits)).sum(-1),
            "top1_agreement": (likeliest == drafted).astype(jnp.float32),
            "positions": jnp.ones_like(mask),
        }
        values["objective"] = LOSSES[loss](values)
        sums = {name: jnp.sum(value * mask) for name, value in values.items()}
        return sums["objective"], sums

    gradient, sums = jax.grad(objective, has_aux=True)(draft_logits)
    return sums, pull_back(gradient)[0]


def distillation(
    target: TargetModel,
    teacher: Float[Array, "batch time hidden"],
    draft: Float[Array, "batch time hidden"],
    mask: Float[Array, "batch time"],
    vocabulary: DraftVocabulary | None = None,
    *,
    chunk: int,
    loss: str = "cross_entropy",
) -> tuple[Float[Array, ""], Sums]:
    """Mean loss and metrics over the masked positions, `chunk` positions of each sequence at a time. Only the loss has
    a gradient, and only for `draft`.

    Arguments as for `chunk_sums`. `chunk` need not divide the sequence length and affects memory only: at most
    [batch, chunk, vocabulary] logits of teacher and draft each exist at once.

    Returns:
      The mean of the loss of that name; and the means of `loss` (always the cross entropy), `expected_acceptance` and
      `top1_agreement`, with `positions`, the sum of the weights.
    """
    sums = _sums(min(chunk, draft.shape[1]), loss, target, vocabulary, teacher, draft, mask.astype(jnp.float32))
    positions = sums.pop("positions")
    means = {name: value / jnp.maximum(positions, 1) for name, value in sums.items()}
    return means.pop("objective"), means | {"positions": positions}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sums(
    chunk: int,
    loss: str,
    target: TargetModel,
    vocabulary: DraftVocabulary | None,
    teacher: Array,
    draft: Array,
    mask: Array,
) -> Sums:
    """`chunk_sums` over all positions."""

    def without_gradient(*inputs: Array) -> tuple[Sums, None]:
        return chunk_sums(target, vocabulary, *inputs, loss)[0], None

    return _over_chunks(chunk, without_gradient, teacher, draft, mask)[0]


def _sums_forward(
    chunk: int,
    loss: str,
    target: TargetModel,
    vocabulary: DraftVocabulary | None,
    teacher: Array,
    draft: Array,
    mask: Array,
) -> tuple[Sums, Float[Array, "batch time hidden"]]:
    def with_gradient(*inputs: Array) -> tuple[Sums, Array]:
        return chunk_sums(target, vocabulary, *inputs, loss)

    sums, gradients = _over_chunks(chunk, with_gradient, teacher, draft, mask)
    batch, time, hidden = draft.shape
    return sums, jnp.moveaxis(gradients, 0, 1).reshape(batch, -1, hidden)[:, :time]


def _sums_backward(chunk: int, loss: str, gradient: Array, cotangents: Sums) -> tuple[None, None, None, Array, None]:
    return None, None, None, (gradient * cotangents["objective"]).astype(gradient.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def _over_chunks(
    chunk: int, function: Callable[[Array, Array, Array], tuple[Sums, Any]], *inputs: Shaped[Array, "batch time ..."]
) -> tuple[Sums, Any]:
    """Calls `function` on one chunk of the inputs after the other; adds up its sums and stacks its other results."""
    batch, time = inputs[0].shape[:2]
    count = -(-time // chunk)

    def split(x: Array) -> Array:  # [batch, time, ...] -> [count, batch, chunk, ...]; the padding has mask 0
        x = jnp.pad(x, [(0, 0), (0, count * chunk - time)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, chunk, *x.shape[2:]), 1, 0)

    def add(sums: Sums, chunk_inputs: tuple[Array, ...]) -> tuple[Sums, Any]:
        of_chunk, other = function(*chunk_inputs)
        return jax.tree.map(jnp.add, sums, of_chunk), other

    zeros = dict.fromkeys(("loss", "expected_acceptance", "top1_agreement", "positions", "objective"), jnp.float32(0))
    # Chunks along time, not along the batch: the batch axis is sharded.
    return jax.lax.scan(add, zeros, tuple(map(split, inputs)))


def segment_mask(segment_ids: Int[Array, "batch time"]) -> Bool[Array, "batch time time"]:
    """Causal attention within segments: a query sees the positions of its own segment up to its own."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same & jnp.tril(jnp.ones(same.shape[1:], bool))


def adapter_loss(
    adapter: Adapter,
    target: TargetModel,
    tokens: Int[Array, "batch time"],
    loss_mask: Float[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    teacher: Float[Array, "batch time hidden"] | None = None,
    drafted: Int[Array, " drafted"] | None = None,
    depths: Int[Array, "batch time"] | None = None,
    *,
    exit_layer: int,
    chunk: int,
    loss: str = "cross_entropy",
) -> tuple[Float[Array, ""], Sums]:
    """The training objective, with the frozen target as teacher.

    Args:
      adapter: the only argument to differentiate. Its weights may be float32 master weights; they are cast to the
        target's dtype here.
      target: the frozen target.
      tokens: token ids, several examples packed into a row.
      loss_mask: weight of each position.
      segment_ids: which example of its row each position belongs to; examples do not see each other.
      positions: of each token in its example.
      teacher: the target's normed hidden states where `loss_mask` is not 0, anything finite elsewhere; None to compute
        them here with the deep layers. A draft model that takes them as inputs needs them at all tokens.
      drafted: the tokens of the draft vocabulary; None for all tokens.
      depths: which token of a draft each position's output predicts, from 1; None where the draft model does not
        depend on it.
      exit_layer: number of shallow layers, static.
      chunk: positions of each sequence whose logits exist at once, static.
      loss: a name in `LOSSES`, static.

    Returns:
      As for `distillation`.
    """
    example = tokens, segment_ids, positions, teacher
    adapter, target, mask, shallow, teacher = _in_target_dtype(adapter, target, *example, exit_layer=exit_layer)
    draft = adapter.at_depths(shallow, teacher, positions, mask, depths)
    vocabulary = None if drafted is None else DraftVocabulary(target, drafted)
    return distillation(target, teacher, draft, loss_mask, vocabulary, chunk=chunk, loss=loss)


def metrics_by_depth(
    adapter: Adapter,
    target: TargetModel,
    tokens: Int[Array, "batch time"],
    loss_mask: Float[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    teacher: Float[Array, "batch time hidden"] | None = None,
    drafted: Int[Array, " drafted"] | None = None,
    *,
    num_depths: int,
    exit_layer: int,
    chunk: int,
) -> dict[str, Float[Array, " depths"]]:
    """The metrics of `distillation` with every position at depth 1, at depth 2, ... at `num_depths`, static. Other
    arguments as for `adapter_loss`. Only as deep as a position is in its example: there the depth is its position."""
    example = tokens, segment_ids, positions, teacher
    adapter, target, mask, shallow, teacher = _in_target_dtype(adapter, target, *example, exit_layer=exit_layer)
    vocabulary = None if drafted is None else DraftVocabulary(target, drafted)

    def at(depth: Int[Array, ""]) -> Sums:
        draft = adapter.at_depths(shallow, teacher, positions, mask, jnp.full_like(positions, depth))
        return distillation(target, teacher, draft, loss_mask, vocabulary, chunk=chunk)[1]

    return jax.lax.map(at, jnp.arange(1, num_depths + 1))


def _in_target_dtype(
    adapter: Adapter,
    target: TargetModel,
    tokens: Int[Array, "batch time"],
    segment_ids: Int[Array, "batch time"],
    positions: Int[Array, "batch time"],
    teacher: Float[Array, "batch time hidden"] | None,
    *,
    exit_layer: int,
) -> tuple[Adapter, TargetModel, Bool[Array, "batch time time"], Array, Array]:
    """Adapter and frozen target in one dtype, the mask of the examples, and the target's shallow and normed deep hidden
    states. Arguments as for `adapter_loss`."""
    target = jax.lax.stop_gradient(target)
    adapter = jax.tree.map(lambda x: x.astype(target.compute_dtype), adapter)
    mask = segment_mask(segment_ids)
    shallow, _ = shallow_apply(target, tokens, positions, exit_layer=exit_layer, mask=mask)
    if teacher is None:
        teacher, _ = deep_apply(target, shallow, positions, exit_layer=exit_layer, mask=mask)
    return adapter, target, mask, shallow, teacher.astype(target.compute_dtype)
