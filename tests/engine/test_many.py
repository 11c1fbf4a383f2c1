"""Prompts through slots that are refilled: each answer is what its prompt gives alone, and plainly.

Truth for tokens: plain decoding alone, without EOS and to the longest limit, cut by the definition of each. Truth for
rounds: `generate` alone.
"""

import functools

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, InputError, Request, SamplingConfig, generate, generate_many, generate_plain
from tests.decode.models import VOCABULARY, lettered_target, tiny_adapter, tiny_target

MOST = 60
SHAPES = [(1, 2, 2, 30), (4, 1, 3, 30), (2, 3, 5, 30)]
_RANDOM = np.random.default_rng(0)
PROMPTS = [tuple(_RANDOM.integers(0, VOCABULARY, _RANDOM.integers(1, 50)).tolist()) for _ in range(64)]


@functools.cache
def plain_tokens(prompt):
    return generate_plain(tiny_target(), [prompt], MOST, eos_token_ids=[-1, -1, -1]).tokens[0]


def cut(tokens, most, eos):
    tokens = tokens[:most]
    return tokens[: 1 + min((i for i, token in enumerate(tokens) if token in eos), default=most)]


def by_index(answers):
    answers = sorted(answers, key=lambda answer: answer.id)
    assert [answer.id for answer in answers] == list(range(len(answers)))
    return answers


@pytest.mark.long
@pytest.mark.parametrize(("max_draft_len", "exit_layer", "batch_size", "mixes"), SHAPES)
def test_mixes_equal_each_alone_and_plain_decoding(max_draft_len, exit_layer, batch_size, mixes):
    target, adapter = tiny_target(), tiny_adapter(exit_layer)
    rng = np.random.default_rng(max_draft_len)
    reasons = set()
    for mix in range(mixes):
        draft = DraftConfig(exit_layer, max_draft_len, float(rng.choice([0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0])))
        eos = [*rng.choice(VOCABULARY, rng.integers(0, 3), replace=False).tolist(), -1, -1, -1][:3]
        count = int(rng.integers(batch_size, 3 * batch_size))
        requests = [Request(PROMPTS[rng.integers(len(PROMPTS))], int(rng.integers(1, MOST + 1))) for _ in range(count)]
        answers = by_index(generate_many(target, adapter, requests, batch_size, draft=draft, eos_token_ids=eos))
        assert len(answers) == count
        for request, answer in zip(requests, answers, strict=True):
            assert answer.tokens == cut(plain_tokens(request.prompt), request.max_new_tokens, eos)
            assert answer.finish_reason == ("eos" if answer.tokens[-1] in eos else "length")
            reasons.add(answer.finish_reason)
        for i in {0, count - 1, mix % count}:  # the last one was put into a slot that others had used
            request, answer = requests[i], answers[i]
            alone = generate(target, adapter, [request.prompt], request.max_new_tokens, draft, eos_token_ids=eos)
            assert answer.tokens == alone.tokens[0]
            assert answer.accept_lengths == alone.accept_lengths[0]
            assert answer.draft_lengths == alone.draft_lengths[0]
    assert reasons == {"eos", "length"}


def test_a_slot_is_refilled_while_its_neighbour_goes_on():
    requests = [Request(PROMPTS[0], MOST), *(Request(prompt, 3) for prompt in PROMPTS[1:8])]
    answers = list(generate_many(tiny_target(), tiny_adapter(1), requests, 3, draft=DraftConfig(1, 4, 0.1)))
    assert [answer.id for answer in answers][-1] == 0
    assert by_index(answers)[5].tokens == plain_tokens(PROMPTS[5])[:3]


def test_fewer_prompts_than_slots_and_none():
    target, adapter, draft = tiny_target(), tiny_adapter(1), DraftConfig(1, 4, 0.1)
    requests = [Request(prompt, 40) for prompt in PROMPTS[:3]]
    answers = by_index(generate_many(target, adapter, requests, 100, draft=draft))
    assert [answer.tokens for answer in answers] == [plain_tokens(prompt)[:40] for prompt in PROMPTS[:3]]
    assert list(generate_many(target, adapter, [], 3, draft=draft)) == []


def test_stop_strings_free_a_slot():
    target, draft = lettered_target(), DraftConfig(1, 4, 0.1)
    prompts = ["abc", "hello", "Q", "xyz", "kangaroo"]
    whole = [generate_plain(target, [prompt], MOST, eos_token_ids=[-1, -1, -1]).texts[0] for prompt in prompts]
    stop = whole[1][20:23]
    for adapter in (tiny_adapter(1), None):
        answers = by_index(generate_many(target, adapter, prompts, 3, MOST, draft, stop=[stop]))
        for text, answer in zip(whole, answers, strict=True):
            at = text.find(stop)
            assert answer.text == (text if at < 0 else text[:at])
            assert len(answer.tokens) == (MOST if at < 0 else at + 3) == 1 + sum(answer.accept_lengths)
            assert answer.finish_reason == ("length" if at < 0 else "stop")
    assert any(stop in text for text in whole)
    assert not all(stop in text for text in whole)


@pytest.mark.long
def test_a_seed_and_a_prompt_give_the_same_text_in_every_slot():
    target, adapter, draft = tiny_target(), tiny_adapter(2), DraftConfig(2, 1, 0.1)
    sampling = SamplingConfig(temperature=1.0, seed=5)
    rng = np.random.default_rng(0)
    # Prompts of two padded lengths, so that short ones come after long ones in the same slot, and the other way round.
    prompts = [rng.integers(0, VOCABULARY, length).tolist() for length in (3, 100, 20, 1, 90, 64, 65, 7)]
    requests = [Request(prompt, 20 + i, seed=None if i % 2 else i) for i, prompt in enumerate(prompts)]
    runs = [
        by_index(generate_many(target, adapter, some, 2, draft=draft, sampling=sampling))
        for some in (requests, requests[::-1])
    ]
    assert [answer.tokens for answer in runs[0]] == [answer.tokens for answer in runs[1]][::-1]
    seeds = [5 if request.seed is None else request.seed for request in requests]
    settings = SamplingConfig(temperature=1.0, seed=seeds[:2])  # prefilled together, in slots never used before
    out = generate(target, adapter, prompts[:2], 27, draft, settings)
    for request, answer, tokens in zip(requests, runs[0], out.tokens, strict=False):
        assert answer.tokens == tokens[: request.max_new_tokens]
    again = [Request(prompts[1], 20, seed=seed) for seed in (0, 1, 0)]
    texts = [
        answer.tokens for answer in by_index(generate_many(target, adapter, again, 2, draft=draft, sampling=sampling))
    ]
    assert texts[0] == texts[2] != texts[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
        ({"requests": [[1], []]}, "request 1 is empty"),
        ({"requests": [Request([1] * 500, 13)]}, "request 0 has 500 tokens.*lower max_new_tokens to 12"),
        ({"requests": [Request([1], 0)]}, "max_new_tokens must be at least 1"),
        ({"requests": [Request([1], 5, seed=-1)]}, "seed must be an integer from 0"),
        ({"sampling": SamplingConfig(1.0, seed=[1, 2])}, "one per request, found 2 for 1"),
        ({"requests": ["abc"]}, "no tokenizer"),
        ({"draft": DraftConfig(3)}, "trained for exit layer 1, but exit_layer=3"),
    ],
)
def test_bad_input_is_named_before_anything_is_decoded(kwargs, message):
    arguments = {"requests": [[1]], **kwargs}
    with pytest.raises(InputError, match=message) as caught:
        generate_many(tiny_target(), tiny_adapter(1), **arguments)
    assert "\n" not in str(caught.value)
