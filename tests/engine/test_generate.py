"""The public calls: limits, EOS, stop strings, streaming and bad input.

Truth: the definition of each limit applied by hand to an unlimited run's tokens.
"""

import dataclasses

import numpy as np
import pytest

from kangaroo_jax import DraftConfig, InputError, TreeConfig, generate, generate_plain
from kangaroo_jax.checkpoint.target import Target
from tests.decode.models import LAYERS, LETTERS, VOCABULARY, lettered_target, tiny_adapter, tiny_target

DRAFT = DraftConfig(2, 4, 0.1)


@pytest.fixture(scope="module")
def lettered():
    return lettered_target()


def both(target, prompts, **kwargs):
    ours = generate(target, tiny_adapter(2), prompts, draft=DRAFT, **kwargs)
    plain = generate_plain(target, prompts, **kwargs)
    return ours, plain


@pytest.mark.parametrize("count", [1, 2, 3, 31, 32, 33, 34, 60])
def test_max_new_tokens_is_exact(count):
    whole = generate_plain(tiny_target(), [[1, 2, 3]], 60).tokens[0]
    for out in both(tiny_target(), [[1, 2, 3]], max_new_tokens=count):
        assert out.tokens[0] == whole[:count]


@pytest.mark.parametrize("place", [0, 1, 5, 20])
def test_eos_ends_the_tokens_and_is_their_last(place):
    whole = generate_plain(tiny_target(), [[9, 2]], 60).tokens[0]
    eos = whole[place]
    expected = whole[: whole.index(eos) + 1]
    for out in both(tiny_target(), [[9, 2]], max_new_tokens=60, eos_token_ids=[eos, 999]):
        assert out.tokens[0] == expected


def test_the_targets_own_eos_is_the_default():
    whole = generate_plain(tiny_target(), [[9, 2]], 40).tokens[0]
    bare = tiny_target()
    target = Target(bare.model, None, bare.name, bare.fingerprint, (whole[3],))
    for out in both(target, [[9, 2]], max_new_tokens=40):
        assert out.tokens[0] == whole[: whole.index(whole[3]) + 1]
    for out in both(target, [[9, 2]], max_new_tokens=40, eos_token_ids=[]):
        assert out.tokens[0] == whole


@pytest.mark.parametrize("place", [0, 3, 17, 30, 50])
def test_stop_string_cuts_text_before_it_and_tokens_after_it(lettered, place):
    whole = generate_plain(lettered, ["abc"], 60)
    text = whole.texts[0]
    assert len(text) == 60
    stop = text[place : place + 3]
    at = text.index(stop)
    for out in both(lettered, ["abc"], max_new_tokens=60, stop=[stop, "not there"]):
        assert out.texts[0] == text[:at]
        assert out.tokens[0] == whole.tokens[0][: at + 3]
        assert 1 + sum(out.accept_lengths[0]) == len(out.tokens[0])


def test_streamed_pieces_add_up_to_the_text(lettered):
    text = generate_plain(lettered, ["abc"], 60).texts[0]
    for stop in ((), (text[40:43],)):
        pieces = []
        out = generate(
            lettered,
            tiny_adapter(2),
            ["abc", "hello"],
            60,
            DRAFT,
            stop=stop,
            on_text=lambda i, piece, pieces=pieces: pieces.append((i, piece)),
        )
        for i in range(2):
            assert "".join(piece for j, piece in pieces if i == j) == out.texts[i]
    assert len(pieces) > 2


@pytest.mark.long
def test_a_stop_string_ends_one_sequence_of_a_batch_and_not_its_neighbours(lettered):
    prompts = ["abc", "hello", "Q"]
    whole = generate_plain(lettered, prompts, 60)
    stop = whole.texts[1][35:38]
    alone = [generate_plain(lettered, [prompt], 60, stop=[stop]) for prompt in prompts]
    assert len(alone[1].tokens[0]) < 60 == max(len(out.tokens[0]) for out in alone)
    for out in both(lettered, prompts, max_new_tokens=60, stop=[stop]):
        assert out.tokens == [one.tokens[0] for one in alone]
        assert out.texts == [one.texts[0] for one in alone]


def test_text_prompts_are_tokenised(lettered):
    out = generate(lettered, tiny_adapter(2), ["abc"], 20, DRAFT)
    assert out.tokens == generate(lettered, tiny_adapter(2), [[0, 1, 2]], 20, DRAFT).tokens
    assert out.texts[0] == "".join(LETTERS[token] for token in out.tokens[0])


@pytest.mark.parametrize(
    ("prompts", "kwargs", "message"),
    [
        ([], {}, "prompts is empty"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([""], {}, "no tokenizer|empty"),
        (["abc"], {}, "no tokenizer"),
        ([[VOCABULARY]], {}, f"token id {VOCABULARY} is outside the vocabulary of {VOCABULARY}"),
        ([[-1]], {}, "token id -1 is outside"),
        ([[1] * 512], {}, "prompt 0 has 512 tokens, but the context is 512"),
        ([[1] * 500], {"max_new_tokens": 13}, "513 exceed the context of 512.*lower max_new_tokens to 12"),
        ([[1] * 20], {"max_length": 30, "max_new_tokens": 11}, "31 exceed the context of 30"),
        ([[1] * 500], {"max_length": 1000, "max_new_tokens": 13}, "513 exceed the context of 512"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ([[1]], {"stop": ["x"]}, "no tokenizer"),
        ([1, 2], {}, "prompt 0 must be a string, a list of token ids or a list of messages, found 1"),
        ([[1]], {"eos_token_ids": [2**31]}, "eos_token_ids must be token ids"),
    ],
)
def test_bad_prompts_are_named_in_one_line(prompts, kwargs, message):
    for call in (
        lambda: generate(tiny_target(), tiny_adapter(2), prompts, draft=DRAFT, **kwargs),
        lambda: generate_plain(tiny_target(), prompts, **kwargs),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_context_filled_to_the_last_token_is_allowed():
    prompt = [1] * 500
    for out in both(tiny_target(), [prompt], max_new_tokens=12):
        assert len(out.tokens[0]) == 12


@pytest.mark.parametrize(
    ("prompts", "kwargs"),
    [
        (5, {}),
        (None, {}),
        ([None], {}),
        ([b"abc"], {}),
        ([["a"]], {}),
        ([[1.9]], {}),
        ([[True]], {}),
        ([[float("nan")]], {}),
        ([[[1]]], {}),
        (np.zeros((2, 3)), {}),
        ([[1]], {"max_new_tokens": "8"}),
        ([[1]], {"max_new_tokens": None}),
        ([[1]], {"max_new_tokens": 2.5}),
        ([[1]], {"max_length": "9"}),
        ([[1]], {"max_length": 9.5}),
        ([[1]], {"eos_token_ids": 5}),
        ([[1]], {"eos_token_ids": "x"}),
        ([[1]], {"eos_token_ids": [1.5]}),
        ([[1]], {"stop": 5}),
        ([[1]], {"draft": None}),
        ([[1]], {"draft": {"max_draft_len": 3}}),
        ([[1]], {"sampling": 0.7}),
        ([[1]], {"on_text": "print"}),
        ([[1]], {"draft": DraftConfig(2, 512)}),
        ([[1]], {"draft": DraftConfig(2, 2, 0.0, TreeConfig(4, 512))}),
    ],
    ids=str,
)
def test_values_of_a_wrong_kind_are_one_line_before_anything_is_compiled(prompts, kwargs):
    with pytest.raises(InputError) as caught:
        generate(lettered_target(), tiny_adapter(2), prompts, **kwargs)
    assert "found" in str(caught.value)


def test_token_ids_may_be_numpys():
    given = np.asarray([[1, 2, 3]])
    assert generate_plain(tiny_target(), given, 4).tokens == generate_plain(tiny_target(), [[1, 2, 3]], 4).tokens


def test_bad_text_is_named_in_one_line(lettered):
    with pytest.raises(InputError, match="prompt 0 is not valid Unicode text"):
        generate_plain(lettered, ["a\ud800"])
    for stop in ("abc", [""]):
        with pytest.raises(InputError, match="stop must be a list of strings"):
            generate_plain(lettered, ["a"], stop=stop)


def test_an_adapter_of_another_target_is_refused():
    adapter = dataclasses.replace(tiny_adapter(2), target_fingerprint="another")
    with pytest.raises(InputError, match="loaded for another target"):
        generate(tiny_target(), adapter, [[1]])


@pytest.mark.parametrize(
    ("trained", "asked", "message"),
    [
        (2, 3, "trained for exit layer 2, but exit_layer=3"),
        (None, None, "does not record its exit layer"),
        (None, LAYERS, f"exit_layer: expected 1 to {LAYERS - 1}"),
    ],
)
def test_a_wrong_exit_layer_is_refused(trained, asked, message):
    with pytest.raises(InputError, match=message):
        generate(tiny_target(), tiny_adapter(trained), [[1]], draft=DraftConfig(asked))


def test_exit_layer_defaults_to_the_adapters():
    out = generate(tiny_target(), tiny_adapter(2), [[1, 2]], 30, DraftConfig(None, 4, 0.1))
    assert out.accept_lengths == generate(tiny_target(), tiny_adapter(2), [[1, 2]], 30, DRAFT).accept_lengths
