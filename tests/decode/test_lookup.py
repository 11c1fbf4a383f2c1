"""Looked-up drafts.

Truth: a slow look-up in plain Python; plain decoding; the method's definition by complete forward passes.
"""

import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kangaroo_jax import DraftConfig, Engine, InputError, LookupConfig, TreeConfig, generate, generate_plain
from kangaroo_jax.decode.lookup import History, look_up
from kangaroo_jax.model.drafts.kangaroo import Adapter
from tests.decode import test_lossless
from tests.decode.models import VOCABULARY, tiny_adapter, tiny_target

CAPACITY = 24


def slow_look_up(text, config):
    """What may follow `text`: for each length of its end from the longest on, each earlier place from the last on."""
    for size in range(config.max_ngram, config.min_ngram - 1, -1):
        for end in range(len(text) - 1, size - 1, -1):  # exclusive, so that it is an earlier place
            if text[end - size : end] == text[len(text) - size :]:
                copied = list(text)
                for i in range(config.max_tokens):
                    copied.append(copied[end + i])
                return copied[len(text) :]
    return []


@functools.cache
def compiled(config):
    return jax.jit(lambda tokens, token, length: look_up(History(tokens), token, length, config))


@pytest.mark.parametrize("lookup", [(5, 1, 1), (3, 2, 4), (9, 1, 3), (1, 3, 3)])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=CAPACITY), min_size=4, max_size=4), left_over=st.integers(0, 2)
)
def test_look_up_equals_a_slow_search(lookup, texts, left_over):
    config = LookupConfig(*lookup)
    # What lies beyond a sequence would be found, were it looked at.
    tokens = np.full((4, CAPACITY), left_over, np.int32)
    texts = [[ord(letter) - ord("a") for letter in text] for text in texts]
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text) - 1] = text[:-1]
    lengths = np.asarray([len(text) - 1 for text in texts], np.int32)
    last = np.asarray([text[-1] for text in texts], np.int32)
    found, count = jax.device_get(compiled(config)(tokens, last, lengths))
    assert [row[:n].tolist() for row, n in zip(found, count, strict=True)] == [
        slow_look_up(text, config) for text in texts
    ]
    assert set(found.ravel()) <= {0, 1, 2}


def test_periodic_text_is_continued_beyond_its_own_end():
    history = History(jnp.asarray([[7, 1, 2, 3, 1, 2, 3, 1, 0, 0]], jnp.int32))
    found, count = look_up(history, jnp.asarray([2]), jnp.asarray([8]), LookupConfig(8, 2, 4))
    assert found.tolist() == [[3, 1, 2, 3, 1, 2, 3, 1]]
    assert count.tolist() == [8]


# --- Rounds.

LOOKUP = LookupConfig(5, 2, 3)
DRAFT = DraftConfig(2, 4, 0.1, lookup=LOOKUP)
FEW = st.integers(0, 4)  # tokens of a prompt that repeats itself


@pytest.mark.long
@pytest.mark.parametrize("with_adapter", [True, False])
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    prompt=st.lists(FEW, min_size=1, max_size=40),
    threshold=st.sampled_from([0.0, 0.2, 1.0]),
    eos=st.sets(st.integers(0, VOCABULARY - 1), max_size=3),
    max_new_tokens=st.integers(1, 60),
)
def test_tokens_equal_plain_decoding(with_adapter, prompt, threshold, eos, max_new_tokens):
    eos = [*sorted(eos), -1, -1, -1][:3]
    draft = dataclasses.replace(DRAFT, threshold=threshold)
    adapter = tiny_adapter(2) if with_adapter else None
    out = generate(tiny_target(), adapter, [prompt], max_new_tokens, draft, eos_token_ids=eos)
    plain = generate_plain(tiny_target(), [prompt], max_new_tokens, eos_token_ids=eos)
    assert out.tokens == plain.tokens
    assert 1 + sum(out.accept_lengths[0]) == len(out.tokens[0])
    most = DRAFT.max_draft_len if with_adapter else 0
    lengths = zip(out.accept_lengths[0], out.draft_lengths[0], out.lookup_lengths[0], strict=True)
    for accepted, drafted, looked_up in lengths:
        assert (
            (1 <= drafted <= most and not looked_up)
            if with_adapter and drafted
            else looked_up in (0, LOOKUP.max_tokens)
        )
        assert 1 <= accepted <= 1 + drafted + looked_up


@functools.cache
def prompts():
    """Random ones, which the text first has to repeat, and one that repeats itself from the start."""
    rng = np.random.default_rng(12)
    return [*(rng.integers(0, VOCABULARY, rng.integers(1, 30)).tolist() for _ in range(3)), [3, 4, 5, 6] * 5]


@pytest.mark.parametrize(
    ("adapter_layers", "kind"),
    [
        (1, "kangaroo"),
        pytest.param(2, "kangaroo", marks=pytest.mark.long),
        pytest.param(1, "memory", marks=pytest.mark.long),
    ],
)
def test_rounds_equal_the_definition_alone_and_in_a_batch(adapter_layers, kind):
    """Which rounds look up, what they find, and what the adapter drafts after them: it knows what was looked up."""
    target, adapter = tiny_target(), tiny_adapter(2, num_layers=adapter_layers, kind=kind)

    def find(tokens):
        return slow_look_up(tokens, LOOKUP)

    expected = [test_lossless.reference(target, adapter, prompt, 40, DRAFT, find=find) for prompt in prompts()]
    together = generate(target, adapter, prompts(), 40, DRAFT)
    for i, (tokens, accept_lengths, draft_lengths, _) in enumerate(expected):
        alone = generate(target, adapter, [prompts()[i]], 40, DRAFT)
        for out, row in ((alone, 0), (together, i)):
            assert out.tokens[row] == tokens
            assert out.accept_lengths[row] == accept_lengths
            steps = zip(out.draft_lengths[row], out.lookup_lengths[row], strict=True)
            assert [drafted + looked_up for drafted, looked_up in steps] == draft_lengths
    # The cases must be worth comparing: hits and misses in one round, hits that stand in full, in part and not at all,
    # and adapter's rounds that follow a full one.
    most = LOOKUP.max_tokens
    assert any({0, most} <= set(lengths) for lengths in zip(*together.lookup_lengths, strict=False))
    hits = [
        (accepted, drafted_next)
        for row in range(4)
        for accepted, looked_up, drafted_next in zip(
            together.accept_lengths[row], together.lookup_lengths[row], together.draft_lengths[row][1:], strict=False
        )
        if looked_up
    ]
    assert {1, most + 1} < {accepted for accepted, _ in hits}
    assert any(accepted == most + 1 and drafted_next for accepted, drafted_next in hits)


def test_a_round_takes_draft_steps_or_looks_up(monkeypatch):
    """What ran, counted on the device: of one sequence, never both in one round."""
    calls = collections.Counter()

    def counted(name):
        method = getattr(Adapter, name)

        def call(*args):
            jax.debug.callback(lambda: calls.update([name]))
            return method(*args)

        return call

    for name in ("begin", "observe"):
        monkeypatch.setattr(Adapter, name, counted(name))
    draft = DraftConfig(2, 3, 0.1, lookup=LookupConfig(4, 2, 3))  # settings of no other test, whose programs are kept
    out = generate(tiny_target(), tiny_adapter(2), [prompts()[0]], 60, draft)
    jax.effects_barrier()
    looked_up = sum(map(bool, out.lookup_lengths[0]))
    assert calls == {"observe": looked_up, "begin": len(out.accept_lengths[0]) - looked_up}
    assert looked_up > 3 and calls["begin"] > 3


def test_trees_and_look_ups_exclude_each_other():
    with pytest.raises(InputError, match="trees and look-ups exclude each other; leave one out") as caught:
        DraftConfig(tree=TreeConfig(), lookup=LookupConfig())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ((0,), "lookup_tokens must be a positive integer, found 0"),
        ((True,), "lookup_tokens must be a positive integer, found True"),
        ((5, 0), "lookup_min_ngram must be a positive integer, found 0"),
        ((5, 1, 2.0), "lookup_max_ngram must be a positive integer, found 2.0"),
        ((5, 3, 2), r"lookup_max_ngram must be at least lookup_min_ngram \(3\), found 2"),
        ((512,), r"lookup_tokens must be less than the target's context \(512\), found 512"),
        ((5, 1, 33), "lookup_max_ngram must be at most 32, found 33"),
    ],
)
def test_look_ups_that_cannot_be_are_named(lengths, message):
    with pytest.raises(InputError, match=message) as caught:
        Engine(tiny_target(), None, draft=DraftConfig(lookup=LookupConfig(*lengths)))
    assert "\n" not in str(caught.value)
