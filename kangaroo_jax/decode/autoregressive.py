"""Plain decoding, the baseline: made of the same pieces, so a comparison compares the method and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import SamplingConfig
from kangaroo_jax.decode.host_loop import Generation, Method, run
from kangaroo_jax.decode.state import DecodeState, Draft
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.model.target import TargetModel, shallow_apply

# Where plain decoding splits the layers; the result does not depend on it.
PLAIN_EXIT_LAYER = 1


def generate_plain(
    target: Target,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Greedy decoding or sampling, one token per pass. Arguments, result and errors as for `generate`."""
    return run(
        target,
        PLAIN,
        prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        stop=stop,
        on_text=on_text,
    )


def plain_round(
    target: TargetModel,
    adapter: None,
    state: DecodeState,
    eos_token_ids: Int[Array, " eos"],
    threshold: Float[Array, ""],
) -> DecodeState:
    """A round with nothing drafted: shallow layers, deep layers, one token."""
    del adapter, threshold
    start = state.shallow.length
    hidden, shallow = shallow_apply(
        target, state.token[:, None], start[:, None], state.shallow, exit_layer=PLAIN_EXIT_LAYER
    )
    batch = start.shape[0]
    nothing = Draft(
        tokens=jnp.zeros((batch, 0), jnp.int32),
        confidence=jnp.zeros((batch, 0)),
        length=jnp.zeros((batch,), jnp.int32),
        hidden=hidden,
        shallow=shallow,
        adapter=None,
        probs=None if state.sampler is None else jnp.zeros((batch, 0, target.config.vocab_size)),
    )
    verdict, deep = verify(target, state.deep, nothing, state.sampler, exit_layer=PLAIN_EXIT_LAYER, widths=(1,))
    return commit(state, nothing, deep, verdict, eos_token_ids)


PLAIN = Method(None, plain_round, PLAIN_EXIT_LAYER, overhang=1, slots=1, threshold=0.0)
