"""Trees against plain decoding, and each round against a slow reference that runs every path as its own sequence."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax import DraftConfig, InputError, SamplingConfig, TreeConfig, generate, generate_plain
from kangaroo_jax.decode.prefill import Admission, prefill
from kangaroo_jax.decode.rounds import RoundShape, run_rounds
from kangaroo_jax.decode.sampling import Sampling
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.drafts.kangaroo import DraftVocabulary
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target
from tests.decode.test_lossless import full_forward

TOKEN = st.integers(0, VOCABULARY - 1)
# exit layer, gamma, K, budget: narrow and wide, budgets that cut and that do not, one level, one path.
SHAPES = [(1, 4, 3, 7), (2, 6, 4, 20), (3, 1, 5, 3), (3, 3, 1, 3)]


@pytest.mark.long
@pytest.mark.parametrize(("exit_layer", "gamma", "topk", "budget"), SHAPES)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(
    prompt=st.lists(TOKEN, min_size=1, max_size=40),
    threshold=st.sampled_from([0.0, 0.01, 0.05, 0.2, 0.5, 1.0]),
    eos=st.sets(TOKEN, max_size=3),
    max_new_tokens=st.integers(1, 60),
)
def test_tokens_equal_plain_decoding(exit_layer, gamma, topk, budget, prompt, threshold, eos, max_new_tokens):
    target, adapter = tiny_target(), tiny_adapter(exit_layer)
    eos = [*sorted(eos), -1, -1, -1][:3]  # one shape: -1 is no token
    draft = DraftConfig(exit_layer, gamma, threshold, TreeConfig(topk, budget))
    out = generate(target, adapter, [prompt], max_new_tokens, draft, eos_token_ids=eos)
    assert out.tokens == generate_plain(target, [prompt], max_new_tokens, eos_token_ids=eos).tokens
    accept, levels = out.accept_lengths[0], out.draft_lengths[0]
    assert 1 + sum(accept) == len(out.tokens[0])
    assert all(1 <= a <= k + 1 and 1 <= k <= gamma for a, k in zip(accept, levels, strict=True))


def reference(target, adapter, prompt, max_new_tokens, draft, length=128, drafts=None):
    """Trees by their definition, every path a whole sequence: tokens, accept lengths, levels. The paths that each round
    drafted, with their probabilities, are appended to `drafts`."""

    @functools.cache
    def logits(tokens, depth=1):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        ours, drafts = full_forward(draft.exit_layer, length)(target.model, adapter.model, padded, depth)
        return np.asarray(ours[len(tokens) - 1]), np.asarray(drafts[len(tokens) - 1])

    def tree(tokens):
        pool, frontier, levels = {}, {(): np.float32(1)}, 0
        for _ in range(draft.max_draft_len):
            candidates = {}
            for path, score in frontier.items():
                row = logits(tokens + path, len(path) + 1)[1]
                probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
                for token in np.argsort(-probs)[: draft.tree.topk].tolist():
                    candidates[*path, token] = score * probs[token]
            best = sorted(candidates, key=lambda path: -candidates[path])[: draft.tree.topk]
            pool |= candidates
            frontier = {path: candidates[path] for path in best}
            levels += 1
            if candidates[best[0]] < draft.threshold:
                break
        return {path: pool[path] for path in sorted(pool, key=lambda path: -pool[path])[: draft.tree.budget]}, levels

    tokens = (*prompt, int(logits(tuple(prompt))[0].argmax()))
    accept_lengths, all_levels = [], []
    while (room := max_new_tokens - (len(tokens) - len(prompt))) > 0:
        nodes, levels = tree(tokens)
        if drafts is not None:
            drafts.append(nodes)
        path = ()
        while path == () or path in nodes:
            path = (*path, int(logits(tokens + path)[0].argmax()))
        tokens += path[:room]
        accept_lengths.append(min(len(path), room))
        all_levels.append(levels)
    return list(tokens[len(prompt) :]), accept_lengths, all_levels


@pytest.mark.parametrize(
    ("exit_layer", "gamma", "topk", "budget", "threshold", "adapter_layers", "kind"),
    [
        (1, 4, 3, 7, 0.0, 1, "kangaroo"),
        *(
            pytest.param(*x, marks=pytest.mark.long)
            for x in (
                (2, 6, 4, 20, 0.05, 1, "kangaroo"),
                (3, 3, 1, 3, 0.2, 1, "kangaroo"),
                (2, 4, 3, 7, 0.0, 2, "kangaroo"),
                (2, 4, 3, 7, 0.0, 1, "memory"),
            )
        ),
    ],
)
def test_rounds_equal_the_definition(exit_layer, gamma, topk, budget, threshold, adapter_layers, kind):
    target, adapter = tiny_target(), tiny_adapter(exit_layer, num_layers=adapter_layers, kind=kind)
    draft = DraftConfig(exit_layer, gamma, threshold, TreeConfig(topk, budget))
    rng = np.random.default_rng(exit_layer)
    seen = set()
    for _ in range(3):
        prompt = rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist()
        out = generate(target, adapter, [prompt], 30, draft)
        expected = reference(target, adapter, prompt, 30, draft)
        assert (out.tokens[0], out.accept_lengths[0], out.draft_lengths[0]) == expected
        seen |= set(out.accept_lengths[0])
    assert len(seen) > 1  # drafts both accepted and refused


@pytest.mark.long
def test_a_tree_of_width_one_is_the_single_sequence():
    target, adapter = tiny_target(), tiny_adapter(3)
    single = DraftConfig(3, 3, 0.0)
    tree = dataclasses.replace(single, tree=TreeConfig(1, 3))
    for prompt in ([1, 2, 3], list(range(30)), [7]):
        one, other = (generate(target, adapter, [prompt], 50, draft) for draft in (single, tree))
        assert one.tokens == other.tokens
        assert one.accept_lengths == other.accept_lengths
        assert one.draft_lengths == other.draft_lengths


# One shape for the tests below, so that they share compiled programs.
PROMPTS = [[1, 2, 3], list(range(30))]
TREE = DraftConfig(2, 3, 0.1, TreeConfig(3, 9))


@pytest.mark.long
def test_a_tree_is_accepted_further():
    target, adapter = tiny_target(), tiny_adapter(2)
    tree = generate(target, adapter, PROMPTS, 50, dataclasses.replace(TREE, threshold=0.0))
    single = generate(target, adapter, PROMPTS, 50, DraftConfig(2, 3, 0.0))
    assert tree.mean_accept_length > 1.05 * single.mean_accept_length


@pytest.mark.long
def test_neighbours_change_nothing():
    target, adapter = tiny_target(), tiny_adapter(2)
    draft = dataclasses.replace(TREE, threshold=0.2)
    tokens = generate_plain(target, PROMPTS, 50).tokens
    end = next(token for token in tokens[1][30:] if token not in tokens[0] + tokens[1][:30])
    together = generate(target, adapter, PROMPTS, 50, draft, eos_token_ids=[end])
    assert len({len(sequence) for sequence in together.tokens}) > 1  # one ends early
    # A sequence that goes on where the other has stopped drafting, and the other way round.
    pairs = list(zip(*together.draft_lengths, strict=False))
    assert any(a < b for a, b in pairs)
    assert any(a > b for a, b in pairs)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(target, adapter, [prompt], 50, draft, eos_token_ids=[end])
        assert together.tokens[i] == alone.tokens[0]
        assert together.accept_lengths[i] == alone.accept_lengths[0]
        assert together.draft_lengths[i] == alone.draft_lengths[0]


@pytest.mark.long
@pytest.mark.parametrize("backend", [CpuBackend(), DenseBackend()], ids=["cpu", "dense"])
def test_caches_hold_what_prefill_of_the_committed_tokens_would_leave(backend):
    model, adapter = tiny_target().model, tiny_adapter(2).model
    prompts = [[1, 2, 3], list(range(20, 31))]
    admission = Admission(np.full(2, 60, np.int32), np.full((2, 4), -1, np.int32), Sampling.greedy(2))

    def start(sequences):
        lengths = np.asarray([len(tokens) for tokens in sequences], np.int32)
        rows = np.asarray([[*tokens, *[0] * (64 - len(tokens))] for tokens in sequences], np.int32)
        return prefill(
            model, adapter, rows, lengths, admission, exit_layer=2, capacity=128, backend=backend, sampled=False
        )

    shape = RoundShape(2, 5, TreeConfig(4, 12), (13,))
    rounds = jax.jit(functools.partial(run_rounds, shape=shape, sampled=False, tokens=12))
    state, chunk = rounds(model, adapter, start(prompts), np.ones(2, bool), np.float32(0.02), 0, 12)
    assert (chunk.accept_lengths.max(1) > 1).all()  # something was moved
    committed = [
        [*prompt, int(first), *chunk.tokens[i, : chunk.num_tokens[i] - 1].tolist()]
        for i, (prompt, first) in enumerate(zip(prompts, start(prompts).token, strict=True))
    ]
    expected = start(committed)
    for ours, theirs in (
        (state.shallow, expected.shallow),
        (state.deep, expected.deep),
        (state.draft.cache, expected.draft.cache),
    ):
        np.testing.assert_array_equal(ours.length, theirs.length)
        for i, length in enumerate(ours.length.tolist()):
            a, b = (cache.row(i).resized(length) for cache in (ours, theirs))
            for x, y in zip(a.keys + a.values, b.keys + b.values, strict=True):
                np.testing.assert_allclose(x, y, atol=2e-4)
    np.testing.assert_allclose(state.draft.last, expected.draft.last, atol=2e-4)


@pytest.mark.long
def test_sampled_text_is_that_of_plain_decoding_with_the_same_seed():
    # Trees hold no random numbers, so every token is drawn as plain decoding draws it.
    target, adapter = tiny_target(), tiny_adapter(2)
    sampling = SamplingConfig(0.8, 0.95, seed=4)
    out = generate(target, adapter, PROMPTS, 50, dataclasses.replace(TREE, threshold=0.02), sampling)
    assert out.tokens == generate_plain(target, PROMPTS, 50, sampling).tokens
    assert out.mean_accept_length > 1.2


# --- The draft vocabulary.


def with_draft_vocabulary(adapter, target, token_ids):
    model = nnx.clone(adapter.model)
    model.draft_vocabulary = DraftVocabulary(target.model, jax.numpy.asarray(token_ids))
    return dataclasses.replace(adapter, model=model)


@pytest.mark.long
@pytest.mark.parametrize("tree", [None, TREE.tree], ids=["single", "tree"])
def test_a_draft_vocabulary_changes_drafts_and_not_tokens(tree):
    target, whole = tiny_target(), tiny_adapter(2)
    draft = DraftConfig(2, 3, 0.0, tree)
    plain = generate_plain(target, PROMPTS, 50)
    # In an order of its own, so that a token taken for its place in the list would show.
    used = sorted({token for sequence in plain.tokens for token in sequence}, key=lambda token: token * 29 % 48)
    unused = [token for token in range(48) if token not in used]
    some = (used + unused)[:24]
    results = []
    for token_ids in (some, [token for token in range(48) if token not in some]):
        out = generate(target, with_draft_vocabulary(whole, target, token_ids), PROMPTS, 50, draft)
        assert out.tokens == plain.tokens
        results.append(out.mean_accept_length)
    usual = generate(target, whole, PROMPTS, 50, draft).mean_accept_length
    assert 0.9 * usual < results[0]
    assert results[1] < 0.9 * results[0]


# --- Bad input.


def test_a_budget_that_cannot_hold_a_path_is_named():
    with pytest.raises(InputError, match="tree_budget must be at least max_draft_len"):
        DraftConfig(2, 6, 0.4, TreeConfig(10, 5))


def test_more_children_than_tokens_are_named():
    with pytest.raises(InputError, match="tree_topk must be at most the 48 tokens"):
        generate(tiny_target(), tiny_adapter(2), [[1]], 4, DraftConfig(2, 2, 0.4, TreeConfig(49, 60)))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2.5, 8), (True, 8)])
def test_impossible_shapes_are_named(shape):
    with pytest.raises(InputError, match="tree_"):
        TreeConfig(*shape)
