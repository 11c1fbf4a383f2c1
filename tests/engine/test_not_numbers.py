"""Logits that are not numbers: an answer ends where it has no next token, and nobody else notices.

The targets have one token whose embedding is NaN, as its activations would be where float16 overflows. Truth: the
tokens of the same target without that, up to the first such token that is committed.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kangaroo_jax import (
    DraftConfig,
    Engine,
    EngineConfig,
    MachineError,
    Request,
    SamplingConfig,
    TextDelta,
    TreeConfig,
    generate,
    generate_many,
    generate_plain,
)
from kangaroo_jax.decode.pick import NO_TOKEN, pick_token, pick_verified
from kangaroo_jax.decode.sampling import DRAFT, TARGET, Sampling
from kangaroo_jax.decode.state import Draft
from kangaroo_jax.engine import engine as engine_module
from kangaroo_jax.engine.shapes import MAX_EOS
from kangaroo_jax.model.attention.cpu import CpuBackend
from kangaroo_jax.model.attention.dense import DenseBackend
from tests.decode.models import LETTERS, VOCABULARY, lettered_target, tiny_adapter, tiny_target
from tests.engine.test_engine import run

NEW = 40
DRAFTS = {
    "plain": None,
    "sequence": DraftConfig(2, 4, 0.0),
    "tree": DraftConfig(2, 3, 0.0, TreeConfig(3, 9)),
}
_RANDOM = np.random.default_rng(1)
PROMPTS = [_RANDOM.integers(0, VOCABULARY, length).tolist() for length in (9, 30, 5, 17, 12)]


@functools.cache
def target_without(token):
    """The lettered target with NaN for a token's embedding."""
    target = lettered_target()
    model = jax.tree.map(lambda x: x, target.model)
    model.embed_tokens[...] = model.embed_tokens[...].at[token].set(jnp.nan)
    return dataclasses.replace(target, model=model)


def engine_of(target, kind, slots=1):
    adapter = None if DRAFTS[kind] is None else tiny_adapter(2)
    return Engine(target, adapter, EngineConfig(slots), DRAFTS[kind] or DraftConfig())


def request(prompt, sampled=False, **settings):
    sampling = SamplingConfig(0.9, 0.95, seed=4) if sampled else None
    return Request(prompt, settings.pop("max_new_tokens", NEW), sampling, eos_token_ids=(), **settings)


def answer_of(target, kind, wanted):
    engine = engine_of(target, kind)
    engine.add(wanted)
    return run(engine)[0][0]


@functools.cache
def truth(kind, place, sampled=False):
    """The answer to a prompt where every token is a number; greedily, plain decoding's."""
    return answer_of(lettered_target(), kind if sampled else "plain", request(PROMPTS[place], sampled)).tokens


@functools.cache
def late_token(kind, place, sampled=False):
    """A token whose first occurrence in prompt and answer is neither early nor late, and where that is."""
    tokens = truth(kind, place, sampled)
    return next((i, token) for i, token in enumerate(tokens) if i >= 6 and token not in PROMPTS[place] + tokens[:i])


# One of each quickly; what compiles more is long.
KINDS = [pytest.param(kind, marks=[] if kind == "sequence" else pytest.mark.long) for kind in DRAFTS]
BOTH = [CpuBackend(), pytest.param(DenseBackend(), marks=pytest.mark.long)]


@pytest.fixture(params=BOTH, ids=["cpu", "dense"])
def backend(request, monkeypatch):
    monkeypatch.setattr(engine_module, "choose_backend", lambda mesh, devices: request.param)


@pytest.mark.parametrize("sampled", [False, pytest.param(True, marks=pytest.mark.long)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_ends_where_it_has_no_next_token(kind, sampled):
    for place in range(2):
        i, token = late_token(kind, place, sampled)
        answer = answer_of(target_without(token), kind, request(PROMPTS[place], sampled, drafts=True))
        assert answer.tokens == truth(kind, place, sampled)[: i + 1]
        assert answer.text == "".join(LETTERS[token] for token in answer.tokens)
        assert answer.finish_reason == "error"
        assert re.fullmatch(rf"the model's logits .* float32 at token {i + 2} of the answer; .*", answer.error)
        assert sum(answer.accept_lengths) == i
        assert [token for each in answer.rounds for token in each.tokens] == answer.tokens[1:]


@pytest.mark.long
@pytest.mark.parametrize("kind", DRAFTS)
def test_an_answer_that_ends_before_is_as_usual(kind):
    i, token = late_token(kind, 0)
    target, wanted = target_without(token), request(PROMPTS[0])
    before = truth(kind, 0)[: i + 1]
    for settings, reason in (({"max_new_tokens": i + 1}, "length"), ({"eos_token_ids": [token]}, "eos")):
        answer = answer_of(target, kind, dataclasses.replace(wanted, **settings))
        assert (answer.tokens, answer.finish_reason, answer.error) == (before, reason, None)
    full = [other for other in range(VOCABULARY) if other not in before][:MAX_EOS]  # no padding among the EOS ids
    answer = answer_of(target, kind, dataclasses.replace(wanted, eos_token_ids=full))
    assert (answer.tokens, answer.finish_reason) == (before, "error")


@pytest.mark.parametrize("kind", KINDS[1:])
def test_rejected_drafts_do_not_matter(kind, backend):
    """Their keys and values lie behind the sequence for a while, where 0 * NaN would be NaN."""
    seen = 0
    for place in range(len(PROMPTS)):
        expected = truth("plain", place)
        rounds = answer_of(lettered_target(), kind, request(PROMPTS[place], drafts=True)).rounds
        rejected = {token.id for each in rounds for token in each.drafted if not token.accepted}
        for token in sorted(rejected - {*expected, *PROMPTS[place]})[:2]:
            answer = answer_of(target_without(token), kind, request(PROMPTS[place], drafts=True))
            assert (answer.tokens, answer.error) == (expected, None)
            seen += token in {drafted.id for each in answer.rounds for drafted in each.drafted}
    assert seen >= 4


def test_padding_behind_a_prompt_does_not_matter(backend):
    places = [place for place in range(len(PROMPTS)) if 0 not in PROMPTS[place] + truth("plain", place)]
    assert places
    for place in places:
        answer = answer_of(target_without(0), "sequence", request(PROMPTS[place]))  # 0 is what prompts are padded with
        assert (answer.tokens, answer.error) == (truth("plain", place), None)


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_and_the_next_in_the_slot_are_as_alone(kind, backend):
    texts = [truth("plain", place)[:20] for place in range(len(PROMPTS))]
    whole = [prompt + text for prompt, text in zip(PROMPTS, texts, strict=True)]
    # A token that comes late in one answer, and not at all in two others.
    late, token = next(
        (place, token)
        for token in range(VOCABULARY)
        for place in range(len(PROMPTS))
        if token in texts[place][4:-1] and token not in PROMPTS[place] + texts[place][:4]
        if sum(token not in tokens for tokens in whole) >= 2
    )
    good = [place for place in range(len(PROMPTS)) if token not in whole[place]]
    wide = [*PROMPTS[late] * 20, token, *PROMPTS[late]][-100:]  # wider than what comes into its slot next
    bad = [
        (PROMPTS[late], texts[late][: texts[late].index(token) + 1]),
        (wide, []),
        ([*PROMPTS[late], token], []),
    ]
    engine, expected = engine_of(target_without(token), kind, slots=2), {}
    for prompt, tokens in bad:
        expected[engine.add(request(prompt, max_new_tokens=20))] = (tokens, "error")
        for place in good:
            expected[engine.add(request(PROMPTS[place], max_new_tokens=20))] = (texts[place], "length")
    answers, _, deltas = run(engine)
    assert {id: (answer.tokens, answer.finish_reason) for id, answer in answers.items()} == expected
    assert {id: tokens for id, (tokens, _) in expected.items() if tokens} == deltas


@pytest.mark.long
def test_what_a_failed_answer_leaves_does_not_begin_another_prompt():
    i, token = late_token("plain", 1)
    engine = engine_of(target_without(token), "sequence")
    engine.add(request([*PROMPTS[1], *truth("plain", 1)]))  # fails at once
    assert run(engine)[0][0].tokens == []
    engine.add(request(PROMPTS[1], max_new_tokens=i))
    (answer,) = run(engine)[0].values()
    assert (answer.tokens, answer.reused_tokens) == (truth("plain", 1)[:i], 0)
    # A prompt that goes on from what its slot holds, and fails; then one that would again.
    for more, tokens in (([token], []), ([], truth("plain", 1)[:i])):
        engine.add(request([*PROMPTS[1], *more], max_new_tokens=i))
        (answer,) = run(engine)[0].values()
        assert (answer.tokens, answer.reused_tokens) == (tokens, len(PROMPTS[1]) if more else 0)


@pytest.mark.long
def test_a_stop_string_before_it_ends_the_answer():
    i, token = late_token("plain", 0)
    stop = "".join(LETTERS[token] for token in truth("plain", 0)[i - 2 : i])
    answer = answer_of(target_without(token), "sequence", request(PROMPTS[0], stop=[stop]))
    assert (answer.finish_reason, answer.error) == ("stop", None)


def test_without_a_first_token_there_is_no_delta():
    engine = engine_of(target_without(7), "sequence")
    engine.add(request([7, 8]))
    events = [event for _ in range(3) for event in engine.step()]
    assert not any(isinstance(event, TextDelta) for event in events)
    assert (events[0].answer.text, events[0].answer.tokens) == ("", [])
    assert "at token 1 of the answer" in events[0].answer.error


@pytest.mark.long
def test_generate_raises_one_line_that_names_the_prompt():
    target, adapter = target_without(7), tiny_adapter(2)
    calls = [
        (lambda prompts: generate(target, adapter, prompts, 4, DRAFTS["sequence"]), "prompt 1: the model's"),
        (lambda prompts: generate_plain(target, prompts, 4), "prompt 1: the model's"),
        (lambda prompts: list(generate_many(target, None, prompts, 1, 4)), "request 1: the model's"),
    ]
    for call, message in calls:
        with pytest.raises(MachineError, match=message) as error:
            call([[1, 2], [7, 8]])
        assert "\n" not in str(error.value)
    with pytest.raises(MachineError, match=r"^the model's logits are not numbers in float32 at token 1"):
        generate_plain(target, [[7]], 4)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float16", "in float16 at token 1 of the answer; try --dtype=float32 or bfloat16"),
        ("float32", "in float32 at token 1 of the answer; the weights may be damaged"),
    ],
)
def test_the_message_names_the_type_of_numbers(dtype, advice):
    model = jax.tree.map(lambda x: x.astype(dtype), tiny_target().model)
    model.norm.weight[...] *= jnp.inf
    with pytest.raises(MachineError, match=advice):
        generate_plain(dataclasses.replace(tiny_target(), model=model), [[1, 2]], 4)


@pytest.mark.parametrize("temperature", [None, 0.0, 0.8])
def test_which_logits_are_numbers(temperature):
    nan, inf = np.nan, np.inf
    rows = [[1, 3, 2], [1, nan, 2], [nan, nan, nan], [-inf, 5, -inf], [-inf, -inf, -inf], [5, nan, -inf], [1, 2, inf]]
    logits = jnp.asarray(rows, jnp.float32)
    sampling = None
    if temperature is not None:
        sampling = Sampling.create([SamplingConfig(temperature, top_k=1)] * len(rows), [[1]] * len(rows))
    positions = jnp.arange(len(rows))
    tokens, _ = pick_token(logits, sampling, positions, TARGET)
    assert tokens.tolist() == [1, NO_TOKEN, NO_TOKEN, 1, NO_TOKEN, NO_TOKEN, NO_TOKEN]
    drafted, _ = pick_token(logits, sampling, positions, DRAFT)
    assert all(0 <= token < 3 for token in drafted.tolist())


def test_compiled_the_first_of_the_largest_logits_is_taken_and_a_nan_anywhere_is_seen():
    """More logits than a vector holds, and no multiple of that; many are equal."""
    rows, size = 200, 67
    logits = np.random.default_rng(0).integers(-3, 3, (rows, size)).astype(np.float32)
    logits[:size][np.eye(size, dtype=bool)] = np.nan
    logits[size:100, 1:] = -np.inf
    pick = jax.jit(lambda logits: pick_token(logits, None, jnp.arange(rows), TARGET)[0])
    expected = [*[NO_TOKEN] * size, *np.argmax(logits[size:], axis=1).tolist()]
    assert pick(jnp.asarray(logits)).tolist() == expected


@pytest.mark.parametrize("temperature", [None, 0.0, 0.8])
def test_no_draft_is_accepted_where_logits_are_not_numbers(temperature):
    """Whatever it is: also the one that a maximum over NaN would be."""
    for drafted in range(4):
        logits = jnp.asarray(np.eye(4)[[1, 2, 3]] * 50, jnp.float32).at[1, drafted].set(jnp.nan)[None]
        sampling = None if temperature is None else Sampling.create([SamplingConfig(temperature)], [[1]])
        draft = Draft(
            tokens=jnp.asarray([[1, drafted]]),
            confidence=jnp.ones((1, 2)),
            length=jnp.asarray([2]),
            hidden=None,
            shallow=None,
            carry=None,
            probs=jax.nn.one_hot(jnp.asarray([[1, drafted]]), 4),
        )
        verdict = pick_verified(logits, draft, sampling, jnp.arange(3)[None])
        assert verdict.accepted.tolist() == [1]
        assert verdict.tokens[0, :2].tolist() == [1, NO_TOKEN]
