"""Trains the demo's target from scratch on the Python standard library and writes it in Hugging Face format.

The budget is wall-clock: the learning rate follows the share of it that has passed, so the same command makes the
best of any machine. The last fifth trains on sequences of the full context. Running it again starts from scratch.
`python -m kangaroo_jax.cli.demo_target` is the command.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kangaroo_jax.checkpoint.target import save_target
from kangaroo_jax.demo import corpus
from kangaroo_jax.model.config import ModelConfig
from kangaroo_jax.model.target import TargetModel, deep_apply, lm_head, shallow_apply

_VOCABULARY = 4096
_CONTEXT = 1024
_SHORT = 256
_FULL_CONTEXT_FROM = 0.8  # share of the budget after which sequences are _CONTEXT long
_END = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4096 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_END, eos_token=_END, model_max_length=_CONTEXT
    )


def _loss(target: TargetModel, tokens: jax.Array) -> jax.Array:
    """Mean next-token cross entropy over [batch, time + 1] tokens, in nats."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden, _ = shallow_apply(target, inputs, positions, exit_layer=1)
    hidden, _ = deep_apply(target, hidden, positions, exit_layer=1)
    return optax.softmax_cross_entropy_with_integer_labels(lm_head(target, hidden), labels).mean()


def _dimensions(params: dict[str, jax.Array]) -> dict[str, optax.contrib.MuonDimensionNumbers | None]:
    """Muon for the layers' matrices (input axis first, fused outputs after it), Adam for embedding and norms."""
    return {
        name: optax.contrib.MuonDimensionNumbers(0, tuple(range(1, x.ndim)))
        if x.ndim > 1 and "layers" in name
        else None
        for name, x in params.items()
    }


def train_target(
    output: pathlib.Path, minutes: float, layers: int, hidden: int, tokens_per_step: int, learning_rate: float
) -> None:
    """Trains a target and its tokenizer and writes both.

    Args:
      output: folder to write.
      minutes: wall-clock training budget, compilation included.
      layers: number of decoder layers.
      hidden: hidden size, a multiple of 128; the MLP is 2.5 times as wide.
      tokens_per_step: tokens in a batch.
      learning_rate: its peak.
    """
    start = time.monotonic()
    output.mkdir(parents=True, exist_ok=True)
    sources = corpus.standard_library(held_out=False)
    tokenizer = train_tokenizer(list(sources.values()))
    tokenizer.save_pretrained(output)
    end = tokenizer.eos_token_id
    stream, held_out = (
        np.concatenate([[*tokenizer.encode(text), end] for text in texts.values()]).astype(np.int32)
        for texts in (sources, corpus.standard_library(held_out=True))
    )
    logging.info("%d files, %d training tokens, %d held-out tokens", len(sources), len(stream), len(held_out))

    config = ModelConfig(
        model_type="llama",
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        head_dim=64,
        max_position_embeddings=_CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_ids=(end,),
    )
    paths, treedef = jax.tree_util.tree_flatten_with_path(TargetModel(config, rngs=nnx.Rngs(0)))
    params = {jax.tree_util.keystr(path): leaf for path, leaf in paths}
    logging.info("%.1fM parameters", sum(x.size for x in params.values()) / 1e6)

    def model_of(params: dict[str, jax.Array]) -> TargetModel:
        return jax.tree.unflatten(treedef, params.values())

    # The rate depends on the clock, so it is an argument of the step and the optimizer's own is 1.
    optimizer = optax.contrib.muon(
        1.0, weight_decay=0.1, consistent_rms=0.2, adam_b2=0.95, muon_weight_dimension_numbers=_dimensions(params)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens, learning_rate):
        loss, grads = jax.value_and_grad(lambda p: _loss(model_of(p), tokens))(params)
        updates, state = optimizer.update(grads, state, params)
        updates = jax.tree.map(lambda x: learning_rate * x, updates)
        return optax.apply_updates(params, updates), state, loss

    evaluate = jax.jit(lambda params, tokens: _loss(model_of(params), tokens))
    state = optimizer.init(params)
    rng = np.random.default_rng(0)
    losses, steps, tokens_seen, saved, budget = [], 0, 0, 0.0, minutes * 60

    def save(progress: float) -> None:
        count = (len(held_out) - 1) // _CONTEXT
        windows = held_out[: count * _CONTEXT + 1]
        windows = np.stack([windows[i * _CONTEXT : (i + 1) * _CONTEXT + 1] for i in range(count)])
        evaluation = [float(evaluate(params, windows[i : i + 8])) for i in range(0, min(count, 64) // 8 * 8, 8)]
        report = {
            "steps": steps,
            "tokens_seen": tokens_seen,
            "training_tokens": len(stream),
            "minutes": round((time.monotonic() - start) / 60, 1),
            "training_loss": round(float(np.mean(jax.device_get(losses[-50:]))), 4),
            "held_out_loss": round(float(np.mean(evaluation)), 4),
        }
        logging.info("saved at %.0f %%: %s", 100 * progress, json.dumps(report))
        save_target(model_of(params), output, jnp.bfloat16)
        (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")

    while (progress := (time.monotonic() - start) / budget) < 1:
        length = _SHORT if progress < _FULL_CONTEXT_FROM else _CONTEXT
        batch = tokens_per_step // length
        first = rng.integers(0, len(stream) - length - 1, batch)
        tokens = stream[first[:, None] + np.arange(length + 1)]
        # Linear warm-up over a hundred steps, then linear decay over the second 60 % of the budget.
        scale = min(1.0, (steps + 1) / 100, (1 - progress) / 0.6)
        params, state, loss = step(params, state, tokens, learning_rate * scale)
        losses.append(loss)
        steps, tokens_seen = steps + 1, tokens_seen + tokens.size
        if steps % 20 == 0:
            mean = float(np.mean(jax.device_get(losses[-20:])))  # waits for the steps in flight
            seconds = time.monotonic() - start
            logging.info("step %d loss %.4f %.0f tokens/s %.0f %%", steps, mean, tokens_seen / seconds, 100 * progress)
        if progress - saved > 0.15:
            saved = progress
            save(progress)
    save(1.0)
