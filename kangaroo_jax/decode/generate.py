"""Kangaroo decoding: `generate`, and the round it is made of. `generate_plain` (autoregressive.py) is the baseline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Float, Int

from kangaroo_jax.checkpoint.adapter import TrainedAdapter, check_exit_layer
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, SamplingConfig, TreeConfig
from kangaroo_jax.decode.draft import draft as draft_tokens
from kangaroo_jax.decode.host_loop import Generation, Method, run
from kangaroo_jax.decode.state import DecodeState
from kangaroo_jax.decode.tree import draft_tree
from kangaroo_jax.decode.verify import commit, verify
from kangaroo_jax.errors import InputError
from kangaroo_jax.model.adapter import Adapter
from kangaroo_jax.model.target import TargetModel


def generate(
    target: Target,
    adapter: TrainedAdapter,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 - frozen
    eos_token_ids: Sequence[int] | None = None,
    max_length: int | None = None,
    stop: Sequence[str] = (),
    on_text: Callable[[int, str], None] | None = None,
) -> Generation:
    """Kangaroo decoding (paper, section 3): the tokens `generate_plain` gives, sooner.

    With a temperature, tokens from the distribution that `generate_plain` draws from: both draw each token from the
    target's distribution, with different random numbers, so their texts differ.

    Args:
      target: from `load_target`.
      adapter: from `load_adapter`.
      prompts: strings, or lists of token ids.
      max_new_tokens: exactly this many unless a sequence ends earlier.
      draft: exit layer, gamma, eta.
      sampling: temperature, top-p, top-k, seed; greedy by default.
      eos_token_ids: tokens that end a sequence, kept in its tokens; None means the target's own.
      max_length: most tokens of prompt and answer together; None means the target's max_position_embeddings.
      stop: strings that end a sequence; its text ends before the first of them, its tokens with the token that
        completed it.
      on_text: called with the prompt's index and the next piece of its text, once per chunk of tokens.

    Raises:
      InputError: for an empty or too long prompt, ids outside the vocabulary, an exit layer that is out of range or
        not the adapter's, seeds that are not one per prompt.
    """
    return run(
        target,
        kangaroo(target, adapter, draft),
        prompts,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        eos_token_ids=eos_token_ids,
        max_length=max_length,
        stop=stop,
        on_text=on_text,
    )


def kangaroo(target: Target, adapter: TrainedAdapter, draft: DraftConfig) -> Method:
    """Kangaroo as a way of decoding `target`.

    Raises:
      InputError: for an exit layer that is out of range or not the adapter's, or a tree wider than the vocabulary.
    """
    exit_layer = resolve_exit_layer(target, adapter, draft)
    slots = cache_slots(adapter.model, draft)
    one_round = functools.partial(
        kangaroo_round,
        exit_layer=exit_layer,
        max_draft_len=draft.max_draft_len,
        widths=verification_widths(draft),
        tree=draft.tree,
    )
    overhang = draft.max_draft_len + 1
    return Method(adapter.model, one_round, exit_layer, overhang=overhang, slots=slots, threshold=draft.threshold)


def cache_slots(adapter: Adapter, draft: DraftConfig) -> int:
    """The most slots of the caches that a round fills.

    Raises:
      InputError: for a tree with more children per node than there are tokens to draft.
    """
    if draft.tree is None:
        return draft.max_draft_len + 1
    vocabulary = adapter.draft_vocabulary
    size = adapter.config.vocab_size if vocabulary is None else len(vocabulary.token_ids[...])
    if draft.tree.topk > size:
        raise InputError(f"tree_topk must be at most the {size} tokens that can be drafted, found {draft.tree.topk}")
    # While a tree grows, each level but the last has its frontier in the caches; then the tokens to be verified.
    return max(1 + draft.tree.topk * (draft.max_draft_len - 1), verification_widths(draft)[-1])


def verification_widths(draft: DraftConfig) -> tuple[int, ...]:
    """How many tokens a verification pass may hold, ascending: x_n and the drafted tokens of a round."""
    gamma, tree = draft.max_draft_len, draft.tree
    if tree is None:
        full, fewer = gamma + 1, (2, 3, 5, 7, 9, 13)
    else:
        # What a tree of each depth holds.
        *fewer, full = sorted({1 + tree.drafted(levels) for levels in range(1, gamma + 1)})
    # Beside reading the weights, positions are free on accelerators; on CPU they are not.
    return (full,) if jax.default_backend() != "cpu" else (*(w for w in fewer if w < full), full)


def kangaroo_round(
    target: TargetModel,
    adapter: Adapter,
    state: DecodeState,
    eos_token_ids: Int[Array, " eos"],
    threshold: Float[Array, ""],
    *,
    exit_layer: int,
    max_draft_len: int,
    widths: tuple[int, ...],
    tree: TreeConfig | None = None,
) -> DecodeState:
    """One draft, one verification, one commit."""
    shape = {"exit_layer": exit_layer, "max_draft_len": max_draft_len}
    if tree is None:
        drafted = draft_tokens(target, adapter, state, threshold, **shape)
    else:
        drafted = draft_tree(target, adapter, state, threshold, **shape, tree=tree)
    verdict, deep = verify(target, state.deep, drafted, state.sampler, exit_layer=exit_layer, widths=widths)
    return commit(state, drafted, deep, verdict, eos_token_ids)


def resolve_exit_layer(target: Target, adapter: TrainedAdapter, draft: DraftConfig) -> int:
    """The exit layer to use, or `InputError` if it is not the adapter's or not within the target."""
    if adapter.target_fingerprint not in (None, target.fingerprint):
        raise InputError(f"{adapter.name}: loaded for another target than {target.name}; load it for this one")
    exit_layer = draft.exit_layer or adapter.exit_layer
    if exit_layer is None:
        raise InputError(f"{adapter.name}: does not record its exit layer; give exit_layer (the paper's 7B uses 2)")
    if adapter.exit_layer is not None and exit_layer != adapter.exit_layer:
        raise InputError(
            f"{adapter.name}: trained for exit layer {adapter.exit_layer}, but exit_layer={exit_layer} was given; "
            "leave exit_layer out, or train an adapter for it"
        )
    check_exit_layer(exit_layer, target.config)
    return exit_layer
