"""What storing a target's weights otherwise changes in its output: loss of a text, and greedy tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kangaroo_jax import generate_plain
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

_ROWS = 4  # of a pass: logits of all of a row's tokens exist at once


@dataclasses.dataclass(frozen=True)
class Quality:
    """Of a target with some weights.

    Attributes:
      num_bytes: of its weights, on one device.
      loss: nats per token of the text.
      answers: greedy tokens after each prompt.
      changed: the share of the reference's tokens that are not this target's choice after the same tokens; 0 for the
        reference itself, up to how passes of different width round.
      same: how many answers are the reference's.
    """

    num_bytes: int
    loss: float
    answers: Int[np.ndarray, "prompts new"]
    changed: float
    same: int


def windows(target: Target, text: str, length: int, count: int) -> Int[np.ndarray, "count length"]:
    """Pieces of a text, as far from each other as it allows.

    Raises:
      InputError: for a text of fewer tokens, or a target without a tokenizer.
    """
    if target.tokenizer is None:
        raise InputError(f"{target.name}: has no tokenizer; give a checkpoint with one")
    tokens = np.asarray(target.tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    if len(tokens) < count * length:
        raise InputError(f"the text has {len(tokens)} tokens; expected {count} x {length}, or more: give more files")
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def measure(
    target: Target,
    text: Int[np.ndarray, "rows length"],
    prompts: Int[np.ndarray, "prompts time"],
    max_new_tokens: int,
    reference: Int[np.ndarray, "prompts new"] | None = None,
) -> Quality:
    """Quality of `target`.

    Args:
      target: loaded with the weights in question.
      text: whose loss is measured.
      prompts: to answer greedily.
      max_new_tokens: of each answer; EOS does not end them.
      reference: answers of the target that this one is compared with; None where this is it.
    """
    answers = np.asarray(generate_plain(target, prompts.tolist(), max_new_tokens, eos_token_ids=[]).tokens)
    reference = answers if reference is None else reference
    loss = np.mean([_pass(target.model, rows)[0] for rows in np.array_split(text, -(-len(text) // _ROWS))])
    asked = np.concatenate([prompts, reference], axis=1)
    choices = [_pass(target.model, rows)[1] for rows in np.array_split(asked, -(-len(asked) // _ROWS))]
    choices = np.concatenate(choices)[:, prompts.shape[1] - 1 : -1]
    return Quality(
        sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(target.model)),
        float(loss),
        answers,
        float(np.mean(choices != reference)),
        int(np.sum(np.all(answers == reference, axis=1))),
    )


@jax.jit
def _pass(model: TargetModel, rows: Int[Array, "rows length"]) -> tuple[Float[Array, ""], Int[Array, "rows length"]]:
    """The mean loss of rows' tokens after the first, and the most probable token after each."""
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden, _ = shallow_apply(model, rows, positions, exit_layer=1)
    hidden, _ = deep_apply(model, hidden, positions, exit_layer=1)
    logits = lm_head(model, hidden)
    of_next = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), rows[:, 1:, None], axis=-1)
    return -jnp.mean(of_next), jnp.argmax(logits, axis=-1)
