"""Records of drafts, and an answer's text cut into spans by them.

Truth: slow references that draft without a cache; the answer's own tokens and text.
"""

import dataclasses

import numpy as np
import pytest

from kangaroo_jax import (
    DraftConfig,
    Engine,
    EngineConfig,
    Finished,
    LookupConfig,
    Request,
    SamplingConfig,
    TextDelta,
    TreeConfig,
)
from kangaroo_jax.engine.draft_spans import DraftSpans, Kind, answer_spans, rejected_path
from kangaroo_jax.engine.requests import DraftedToken, Round
from tests.decode import test_lossless, test_tree
from tests.decode.models import LETTERS, VOCABULARY, lettered_target, tiny_adapter, tiny_target
from tests.tokens import sentencepiece_tokenizer

SEQUENCE = DraftConfig(2, 4, 0.1)
TREE = DraftConfig(2, 3, 0.1, TreeConfig(3, 9))
LONG_TREE = pytest.param(TREE, marks=pytest.mark.long)
KINDS = pytest.mark.parametrize("draft", [SEQUENCE, LONG_TREE], ids=["sequence", "tree"])


def run(draft, *requests, target=None):
    """Each request's answer and deltas."""
    engine = Engine(target or lettered_target(), tiny_adapter(2), EngineConfig(len(requests)), draft)
    ids = [engine.add(request) for request in requests]
    answers, deltas = {}, {id: [] for id in ids}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                answers[event.id] = event.answer
            else:
                deltas[event.id].append(event)
    return [(answers[id], deltas[id]) for id in ids]


def path_to(drafted, i):
    return () if i < 0 else (*path_to(drafted, drafted[i].parent), drafted[i].id)


def check(answer, deltas, prompt, tokenizer):
    """What holds for any answer with drafts: its spans."""
    spans = answer_spans(tokenizer, prompt, answer)
    written = [span for span in spans if span.kind is not Kind.REJECTED]
    assert [token for span in written for token in span.tokens] == answer.tokens
    assert "".join(span.text for span in written) == answer.text
    assert [len(round.tokens) for round in answer.rounds] == answer.accept_lengths
    assert [token for round in answer.rounds for token in round.tokens] == answer.tokens[1:]
    for i, round in enumerate(answer.rounds):
        own = [span for span in spans if span.round == i]
        kind = Kind.LOOKED_UP if round.looked_up else Kind.ACCEPTED
        accepted = [token for span in own if span.kind is kind for token in span.tokens]
        assert accepted == round.tokens[: round.accepted]
        assert [token.id for token in round.drafted if token.accepted][: round.accepted] == accepted
        rejected = [span.tokens for span in own if span.kind is Kind.REJECTED]
        expected = tuple(token.id for token in rejected_path(round.drafted))
        # An answer that ended among the accepted drafts came to none that were rejected.
        assert rejected == ([expected] if expected and len(round.tokens) > round.accepted else [])
    streamed = DraftSpans(tokenizer, prompt)
    came = [span for delta in deltas for span in streamed.feed(delta)] + streamed.finish(answer)
    assert came == spans
    return spans


def test_drafts_equal_the_references():
    rng, target = np.random.default_rng(2), tiny_target()
    rejected = 0
    for _ in range(3):
        prompt, drafts = rng.integers(0, VOCABULARY, 12).tolist(), []
        expected = test_lossless.reference(target, tiny_adapter(2), prompt, 30, SEQUENCE, drafts=drafts)
        [(answer, _)] = run(SEQUENCE, Request(prompt, 30, drafts=True), target=target)
        assert answer.tokens == expected[0]
        assert [[token.id for token in round.drafted] for round in answer.rounds] == drafts
        for round in answer.rounds:
            assert [token.parent for token in round.drafted] == list(range(-1, len(round.drafted) - 1))
            assert all(token.confidence >= SEQUENCE.threshold for token in round.drafted[:-1])
            rejected += len(rejected_path(round.drafted))
    assert rejected > 10


@pytest.mark.long
def test_trees_equal_the_references():
    rng, target = np.random.default_rng(3), tiny_target()
    prompt, drafts = rng.integers(0, VOCABULARY, 12).tolist(), []
    expected = test_tree.reference(target, tiny_adapter(2), prompt, 30, TREE, drafts=drafts)
    [(answer, _)] = run(TREE, Request(prompt, 30, drafts=True), target=target)
    assert answer.tokens == expected[0]
    assert len(answer.rounds) == len(drafts)
    for round, nodes in zip(answer.rounds, drafts, strict=True):
        paths = {path_to(round.drafted, i): token for i, token in enumerate(round.drafted)}
        assert paths.keys() == nodes.keys()
        for path, token in paths.items():
            assert token.confidence == pytest.approx(nodes[path], rel=1e-3)
            assert token.accepted or path != tuple(round.tokens[: len(path)])


@KINDS
def test_spans_add_up_to_the_answer_however_it_ends(draft):
    """By EOS, a stop string or the limit, at many places within rounds."""
    target, prompt = lettered_target(), "abcabc"
    ids = [LETTERS.index(letter) for letter in prompt]
    [(free, deltas)] = run(draft, Request(prompt, 40, drafts=True))
    assert {span.kind for span in check(free, deltas, ids, target.tokenizer)} == set(Kind) - {Kind.LOOKED_UP}
    cut = 0
    for place in range(3, 30, 2):
        requests = [
            Request(prompt, place, drafts=True),
            Request(prompt, 40, eos_token_ids=[free.tokens[place]], drafts=True),
            Request(prompt, 40, stop=[free.text[place : place + 2]], drafts=True),
        ]
        for request in requests:
            [(answer, deltas)] = run(draft, request)
            check(answer, deltas, ids, target.tokenizer)
            assert free.tokens[: len(answer.tokens)] == answer.tokens
            cut += any(len(round.tokens) == round.accepted for round in answer.rounds)
    assert cut > 5


@pytest.mark.long
@KINDS
def test_drafts_of_one_request_change_nothing_and_are_its_own(draft):
    prompts = ["abc", "xyzzy"]
    alone = [run(draft, Request(prompt, 40))[0][0] for prompt in prompts]
    (plain, deltas), (recorded, _) = run(draft, Request(prompts[0], 40), Request(prompts[1], 40, drafts=True))
    assert [plain.tokens, recorded.tokens] == [answer.tokens for answer in alone]
    assert plain.rounds is None
    assert not any(delta.rounds for delta in deltas)
    [(again, _)] = run(draft, Request(prompts[1], 40, drafts=True))
    assert [without_confidence(round) for round in recorded.rounds] == list(map(without_confidence, again.rounds))


def without_confidence(round):
    """A batch of another size rounds it differently."""
    return round.tokens, [(token.id, token.parent, token.accepted) for token in round.drafted]


@pytest.mark.long
@KINDS
def test_accepted_samples_are_the_drafted_ones(draft):
    request = Request("abc", 60, SamplingConfig(1.2, seed=5), drafts=True)
    [(answer, deltas)] = run(draft, request)
    spans = check(answer, deltas, [0, 1, 2], lettered_target().tokenizer)
    assert {span.kind for span in spans} == set(Kind) - {Kind.LOOKED_UP}


@pytest.mark.long
def test_looked_up_drafts_are_told_from_the_adapters():
    draft = dataclasses.replace(SEQUENCE, lookup=LookupConfig(5, 2, 3))
    [(answer, deltas)] = run(draft, Request("abc", 60, drafts=True))
    spans = check(answer, deltas, [0, 1, 2], lettered_target().tokenizer)
    assert {span.kind for span in spans} == set(Kind)


def test_a_character_of_several_tokens_is_with_its_last():
    """Split over drafts, the target's tokens and deltas, and cut by the answer's end."""
    tokenizer = sentencepiece_tokenizer()
    smile = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "🙂".encode()]
    x, y = tokenizer.encode("x", add_special_tokens=False), tokenizer.encode("y", add_special_tokens=False)
    end = tokenizer.eos_token_id

    def drafted(tokens, accepted):
        return [DraftedToken(token, i - 1, 0.5, i < accepted) for i, token in enumerate(tokens)]

    rounds = [
        Round(smile[:3], drafted([*smile[:2], *y], 2)),
        Round([smile[3], *y], drafted([smile[3], end], 1)),
        Round(smile[:2], drafted(smile[:2], 2)),
    ]
    tokens = [*x, *smile, *y, *smile[:2]]
    deltas = [
        TextDelta(0, "x", x),
        TextDelta(0, "", smile[:3], rounds[:1]),
        TextDelta(0, "🙂 y\ufffd\ufffd", [smile[3], *y, *smile[:2]], rounds[1:]),
    ]
    [(answer, _)] = run(SEQUENCE, Request("a", 1, drafts=True))
    answer = dataclasses.replace(
        answer, tokens=tokens, text="x🙂 y\ufffd\ufffd", rounds=rounds, accept_lengths=[3, 2, 2]
    )
    spans = check(answer, deltas, [tokenizer.bos_token_id], tokenizer)
    assert [(span.kind, span.text) for span in spans] == [
        (Kind.TARGET, "x"),
        (Kind.ACCEPTED, ""),
        (Kind.ACCEPTED, ""),
        (Kind.REJECTED, "\ufffd\ufffd y"),
        (Kind.TARGET, ""),
        (Kind.ACCEPTED, "🙂"),
        (Kind.REJECTED, "</s>"),
        (Kind.TARGET, " y"),
        (Kind.ACCEPTED, ""),
        (Kind.ACCEPTED, "\ufffd\ufffd"),
    ]
