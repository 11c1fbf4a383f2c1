"""Kangaroo against plain decoding, and each round against the method's definition (paper, section 3).

The reference below knows no cache: it runs the whole sequence through the model for every token.
"""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax import DraftConfig, generate, generate_plain
from kangaroo_jax.decode import rounds
from kangaroo_jax.model.drafts.kangaroo import adapter_layers_apply
from kangaroo_jax.model.target import deep_apply, lm_head, shallow_apply
from tests.decode.models import LAYERS, VOCABULARY, tiny_adapter, tiny_target

# Every exit layer; each pair is a program to compile.
PAIRS = [(gamma, 1 + gamma % (LAYERS - 1)) for gamma in (1, 2, 3, 4, 6, 9, 12)]
QUICK = (6,)
TOKEN = st.integers(0, VOCABULARY - 1)


@pytest.mark.parametrize(
    ("max_draft_len", "exit_layer"),
    [pytest.param(*pair, marks=[] if pair[0] in QUICK else [pytest.mark.long]) for pair in PAIRS],
)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    prompt=st.lists(TOKEN, min_size=1, max_size=40),
    threshold=st.sampled_from([0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9, 1.0]),
    eos=st.sets(TOKEN, max_size=3),
    max_new_tokens=st.integers(1, 60),
)
def test_tokens_equal_plain_decoding(max_draft_len, exit_layer, prompt, threshold, eos, max_new_tokens):
    target, adapter = tiny_target(), tiny_adapter(exit_layer)
    eos = [*sorted(eos), -1, -1, -1][:3]  # one shape: -1 is no token
    draft = DraftConfig(exit_layer, max_draft_len, threshold)
    with mock.patch.object(rounds, "_MAX_WIDTHS", 2 if max_draft_len in QUICK else 16):
        out = generate(target, adapter, [prompt], max_new_tokens, draft, eos_token_ids=eos)
    plain = generate_plain(target, [prompt], max_new_tokens, eos_token_ids=eos)
    assert out.tokens == plain.tokens
    tokens = out.tokens[0]
    ended = tokens[-1] in eos
    assert len(tokens) == max_new_tokens or ended
    assert not set(tokens[:-1]) & set(eos)
    accept, drafted = out.accept_lengths[0], out.draft_lengths[0]
    assert 1 + sum(accept) == len(tokens)
    assert len(accept) == len(drafted)
    assert all(1 <= a <= k + 1 and 1 <= k <= max_draft_len for a, k in zip(accept, drafted, strict=True))


@functools.cache
def full_forward(exit_layer, length):
    """Logits of target and draft model at every position of a whole sequence, without caches. The draft model's are
    those of a round's `depth`th token."""

    @jax.jit
    def forward(target, adapter, tokens, depth=1):
        positions = jnp.arange(length)[None]
        hidden, _ = shallow_apply(target, tokens, positions, exit_layer=exit_layer)
        deep, _ = deep_apply(target, hidden, positions, exit_layer=exit_layer)
        mixed, _ = adapter_layers_apply(adapter, hidden, positions)
        if adapter.kind == "memory":
            newest = jnp.roll(deep, depth, axis=1)  # of the position before the round's first
            matrix = adapter.memory.memory_proj[...][:, jnp.minimum(depth, 4) - 1]
            mixed += adapter.memory.norm(newest) @ matrix
        if adapter.mlp is not None:
            gate, up = jnp.moveaxis(jnp.tensordot(adapter.mlp.norm(mixed), adapter.mlp.mlp.gate_up_proj[...], 1), 2, 0)
            mixed += jax.nn.silu(gate) * up @ adapter.mlp.mlp.down_proj[...]
        return lm_head(target, deep)[0], lm_head(target, adapter.norm(mixed))[0]

    return forward


def reference(target, adapter, prompt, max_new_tokens, draft, length=128, drafts=None, find=lambda tokens: []):
    """The method as the paper states it, by whole forward passes. What each round drafted is appended to `drafts`.
    What `find` finds is drafted in place of the adapter's tokens."""

    def logits(tokens, depth=1):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        ours, drafts = full_forward(draft.exit_layer, length)(target.model, adapter.model, padded, depth)
        return np.asarray(ours, np.float64), np.asarray(drafts, np.float64)

    tokens = [*prompt, int(logits(prompt)[0][len(prompt) - 1].argmax())]
    accept_lengths, draft_lengths, agreed = [], [], []
    while len(tokens) - len(prompt) < max_new_tokens:
        drafted = found = find(tokens)
        while not found and len(drafted) < draft.max_draft_len:
            row = logits(tokens + drafted, len(drafted) + 1)[1][len(tokens) + len(drafted) - 1]
            drafted = [*drafted, int(row.argmax())]
            if 1 / np.exp(row - row.max()).sum() < draft.threshold:
                break
        if drafts is not None:
            drafts.append(drafted)
        choices = logits(tokens + drafted)[0][len(tokens) - 1 :].argmax(-1).tolist()
        accepted = next((i for i, token in enumerate(drafted) if choices[i] != token), len(drafted))
        agreed += [i < accepted for i in range(len(drafted))]
        room = max_new_tokens - (len(tokens) - len(prompt))
        committed = choices[: accepted + 1][:room]
        tokens += committed
        accept_lengths.append(len(committed))
        draft_lengths.append(len(drafted))
    return tokens[len(prompt) :], accept_lengths, draft_lengths, agreed


@pytest.mark.parametrize(
    ("exit_layer", "max_draft_len", "threshold", "adapter_layers", "mlp_size", "kind"),
    [
        pytest.param(1, 4, 0.0, 1, 0, "kangaroo", marks=pytest.mark.long),
        (2, 6, 0.1, 1, 0, "kangaroo"),
        pytest.param(3, 3, 0.2, 2, 0, "kangaroo", marks=pytest.mark.long),
        pytest.param(3, 6, 0.3, 1, 24, "kangaroo", marks=pytest.mark.long),
        pytest.param(2, 5, 0.05, 1, 24, "memory", marks=pytest.mark.long),
        pytest.param(3, 8, 0.0, 2, 0, "memory", marks=pytest.mark.long),
    ],
)
def test_rounds_equal_the_definition(exit_layer, max_draft_len, threshold, adapter_layers, mlp_size, kind):
    target = tiny_target()
    adapter = tiny_adapter(exit_layer, num_layers=adapter_layers, mlp_size=mlp_size, kind=kind)
    draft = DraftConfig(exit_layer, max_draft_len, threshold)
    rng = np.random.default_rng(exit_layer)
    seen, agreed = set(), []
    for _ in range(6):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist()
        tokens, accept_lengths, draft_lengths, agrees = reference(target, adapter, prompt, 40, draft)
        out = generate(target, adapter, [prompt], 40, draft)
        assert out.tokens[0] == tokens
        assert out.accept_lengths[0] == accept_lengths
        assert out.draft_lengths[0] == draft_lengths
        seen |= set(accept_lengths)
        agreed += agrees
    # The cases must be worth comparing: drafts both accepted and refused.
    assert len(seen) > 1
    assert 0.1 < np.mean(agreed) < 0.98


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kangaroo", "memory"])
def test_a_batch_of_different_lengths_equals_each_alone(kind):
    target, adapter = tiny_target(), tiny_adapter(2, kind=kind)
    draft = DraftConfig(2, 4, 0.1)
    prompts = [[1, 2, 3], list(range(30)), [7], [5] * 17]
    together = generate(target, adapter, prompts, 50, draft, eos_token_ids=[11])
    for i, prompt in enumerate(prompts):
        alone = generate(target, adapter, [prompt], 50, draft, eos_token_ids=[11])
        assert together.tokens[i] == alone.tokens[0]
        assert together.accept_lengths[i] == alone.accept_lengths[0]
        assert together.draft_lengths[i] == alone.draft_lengths[0]
