"""The engine: requests of different kinds in one running batch, added and aborted at random moments.

Truth: each request alone, in an engine of its own; greedy ones also by plain decoding, cut by the definition of EOS,
stop strings and limits.
"""

import copy
import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import (
    DraftConfig,
    Engine,
    EngineConfig,
    Finished,
    InputError,
    Request,
    SamplingConfig,
    TextDelta,
    TreeConfig,
    generate_plain,
)
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.engine import engine as engine_module
from kangaroo_jax.engine.programs import ProgramStore, compile_program
from kangaroo_jax.engine.shapes import PIECE, Shapes, capacity_class
from kangaroo_jax.model.attention.dense import DenseBackend
from kangaroo_jax.model.target import TargetModel
from tests.decode.models import CONFIG, LAYERS, LETTERS, VOCABULARY, lettered_target, tiny_adapter, tiny_target

DRAFT = DraftConfig(2, 4, 0.1)
TREE = DraftConfig(2, 3, 0.1, TreeConfig(3, 9))
_RANDOM = np.random.default_rng(0)
PROMPTS = ["".join(_RANDOM.choice(list(LETTERS), _RANDOM.integers(1, 60))) for _ in range(12)]
SAMPLING = [
    None,
    SamplingConfig(0.8, seed=3),
    SamplingConfig(1.5, 0.9, 0, seed=4),
    SamplingConfig(1.0, 1.0, 5, seed=5),
    SamplingConfig(0.6, 0.8, 9, seed=6),
]


def engine_of(slots, draft=DRAFT, target=None, kind="kangaroo"):
    return Engine(target or lettered_target(), tiny_adapter(2, kind=kind), EngineConfig(slots), draft)


def run(engine):
    """Steps to the end: id -> answer, and id -> the text and tokens of its deltas."""
    answers, texts, tokens = {}, {}, {}
    while engine.busy:
        for event in engine.step():
            collect(event, answers, texts, tokens)
    return answers, texts, tokens


def collect(event, answers, texts, tokens):
    if isinstance(event, Finished):
        assert event.id not in answers
        answers[event.id] = event.answer
    else:
        assert isinstance(event, TextDelta)
        assert event.id not in answers  # `Finished` is the last event of a request
        texts[event.id] = texts.get(event.id, "") + event.text
        tokens[event.id] = tokens.get(event.id, []) + event.tokens


@functools.cache
def plain_text(prompt):
    return generate_plain(lettered_target(), [prompt], 60, eos_token_ids=[]).texts[0]


def random_request(rng):
    prompt = PROMPTS[rng.integers(len(PROMPTS))]
    kind = rng.integers(3)
    stop = (plain_text(prompt)[(place := rng.integers(50)) : place + rng.integers(1, 4)],) if kind == 0 else ()
    eos = tuple(rng.choice(VOCABULARY, rng.integers(0, 4), replace=False).tolist()) if kind == 1 else ()
    sampling = SAMPLING[rng.integers(len(SAMPLING))] if rng.random() < 0.5 else None
    return Request(prompt, int(rng.integers(1, 61)), sampling, stop, eos, stream=bool(rng.integers(2)))


@functools.cache
def alone(request, tree):
    engine = engine_of(1, TREE if tree else DRAFT)
    engine.add(request)
    return run(engine)[0][0]


@functools.cache
def shared_engine(tree):
    """One engine for all mixes: what earlier requests left in its slots must not matter."""
    return engine_of(3, TREE if tree else DRAFT)


def check_mix(seed, tree=False):
    rng = np.random.default_rng(seed)
    engine = shared_engine(tree)
    left = [random_request(rng) for _ in range(rng.integers(2, 7))]
    requests, answers, texts, tokens, aborted = {}, {}, {}, {}, set()
    while left or engine.busy:
        while left and rng.random() < 0.5:
            request = left.pop()
            requests[engine.add(request)] = request
        if requests and rng.random() < 0.05:
            id = int(rng.choice(list(requests)))
            engine.abort(id)
            if id not in answers:
                aborted.add(id)
        for event in engine.step():
            assert event.id not in aborted
            collect(event, answers, texts, tokens)
    assert answers.keys() | aborted == requests.keys()
    for id, answer in answers.items():
        request = requests[id]
        expected = alone(request, tree)
        assert (answer.tokens, answer.text, answer.finish_reason) == (
            expected.tokens,
            expected.text,
            expected.finish_reason,
        )
        assert answer.accept_lengths == expected.accept_lengths
        assert answer.draft_lengths == expected.draft_lengths
        if request.stream:
            assert texts[id] == answer.text
            assert tokens[id] == answer.tokens
        else:
            assert id not in texts
        if request.sampling is None:
            text = plain_text(request.prompt)[: request.max_new_tokens]
            ends = [i + 1 for i, letter in enumerate(text) if LETTERS.index(letter) in request.eos_token_ids]
            text = text[: ends[0]] if ends else text
            at = text.find(request.stop[0]) if request.stop else -1
            assert answer.text == (text if at < 0 else text[:at])
    return {answer.finish_reason for answer in answers.values()}, bool(aborted)


@pytest.mark.parametrize("tree", [False, pytest.param(True, marks=pytest.mark.long)], ids=["sequence", "tree"])
def test_mixed_requests_equal_each_alone(tree):
    results = [check_mix(seed, tree) for seed in range(12 if tree else 4)]
    assert set().union(*(reasons for reasons, _ in results)) == {"eos", "stop", "length"}
    assert any(aborted for _, aborted in results)


@pytest.mark.long
def test_a_tree_that_is_accepted_to_its_last_level_leaves_numbers_in_its_slot():
    """From there they reach the next request, multiplied by zero."""
    engine = engine_of(1, TREE)
    for prompt in PROMPTS:
        for most in (5, 30):
            engine.add(Request(prompt, most))
            answer = run(engine)[0]
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(engine._state.draft.cache)), (prompt, answer)


@pytest.mark.long
@pytest.mark.parametrize("first", range(4, 204, 50))
def test_200_mixes_equal_each_alone(first):
    for seed in range(first, first + 50):
        check_mix(seed)


@pytest.mark.parametrize("limits", [(1,), (2,), (33,), (34,), (60, 33)])
def test_no_chunk_is_launched_behind_an_answers_end(monkeypatch, limits):
    """A chunk of plain decoding is 32 tokens of each sequence, and prefill gives one."""
    engine = Engine(lettered_target(), None, EngineConfig(len(limits)))
    chunks = []
    launched = engine_module._Launched
    monkeypatch.setattr(engine_module, "_Launched", lambda *args: chunks.append(args[2] is not None) or launched(*args))
    for prompt, most in zip(PROMPTS, limits, strict=False):
        engine.add(Request(prompt, most, eos_token_ids=()))
    answers = run(engine)[0]
    assert [len(answers[i].tokens) for i in range(len(limits))] == list(limits)
    assert sum(chunks) == -(-(max(limits) - 1) // 32)


@pytest.mark.parametrize(
    ("online", "limits", "sizes"),
    [
        (False, [60], [1, 32, 27]),
        (True, [60], [1] * 60),  # a slot is free
        (True, [60, 60], [1, 32, 27]),
        (True, [60, 11], [1, 10, *[1] * 49]),  # the neighbour's end ends the chunk
    ],
)
def test_an_engine_whose_requests_come_meanwhile_returns_soon(online, limits, sizes):
    """Tokens of the first request at each return to the host, in plain decoding."""
    engine = Engine(lettered_target(), None, EngineConfig(2, online=online))
    ids = [engine.add(Request(PROMPTS[0], most, eos_token_ids=(), stream=True)) for most in limits]
    found = []
    while engine.busy:
        found += [len(event.tokens) for event in engine.step() if isinstance(event, TextDelta) and event.id == ids[0]]
    assert found == sizes


def test_a_request_that_comes_during_a_round_waits_for_no_other(monkeypatch):
    """It comes while the host waits for a round's tokens, and its own first token is the next that the device makes."""
    engine, read, late = Engine(lettered_target(), None, EngineConfig(2, online=True)), Engine._read, []
    engine.add(Request(PROMPTS[0], 60, eos_token_ids=(), stream=True))
    for _ in range(6):
        engine.step()

    def read_meanwhile(engine, launched):
        if not late:
            late.append(engine.add(Request(PROMPTS[1], 20, eos_token_ids=(), stream=True)))
        return read(engine, launched)

    monkeypatch.setattr(Engine, "_read", read_meanwhile)
    order = []
    while not late or late[0] not in order:
        order += [event.id for event in engine.step() for _ in event.tokens]
    assert order == [0, late[0]]


@pytest.mark.parametrize("tokens", [500, 900])
def test_nothing_runs_while_a_program_is_compiled(monkeypatch, tokens):
    """Else what it takes would be hidden behind the compilation, which no time counts: a prefill, say, of one piece or
    of two."""
    idle, compile_program, launched = [], engine_module.compile_program, []

    def compiled(*args, **static):
        idle.append(all(x.is_ready() for x in launched if not x.is_deleted()))
        program = compile_program(*args, **static)

        def launch(*inputs):
            results = program(*inputs)
            launched.extend(x for x in jax.tree.leaves(results))
            return results

        return launch

    monkeypatch.setattr(engine_module, "compile_program", compiled)
    monkeypatch.setattr(engine_module, "SHARED", ProgramStore(8))
    model = TargetModel(dataclasses.replace(CONFIG, max_position_embeddings=1024), rngs=nnx.Rngs(0))
    target = Target(model=model, tokenizer=None, name="longer", fingerprint="tiny", eos_token_ids=())
    engine = Engine(target, tiny_adapter(1), EngineConfig(1))
    engine.add(Request([1 + i % 40 for i in range(tokens)], 3, eos_token_ids=()))
    run(engine)
    assert len(idle) >= (2 if tokens < PIECE else 3) and all(idle)


# --- What slots hold.


@pytest.mark.long
@pytest.mark.parametrize("kind", ["kangaroo", "memory"])
def test_a_conversation_prefills_only_what_is_new(kind):
    """Three turns, each with the one before as its beginning, beside a neighbour; and without reuse."""
    engine = engine_of(2, kind=kind)
    engine.add(Request(PROMPTS[0], 60))
    prompt = "abcdefghijklmnopqrstuvwxyz"
    for turn in range(3):
        id = engine.add(Request(prompt, 30, stream=False))
        answer = run(engine)[0][id]
        assert (answer.reused_tokens > 0) == (turn > 0)
        if turn:
            # All but the question and the last two tokens, which the caches may lack.
            assert answer.reused_tokens == len(prompt) - len("ABCDEFG") - 2
        fresh = engine_of(2, kind=kind)
        fresh.add(Request(prompt, 30))
        expected = run(fresh)[0][0]
        assert answer.tokens == expected.tokens
        assert answer.accept_lengths == expected.accept_lengths
        prompt += answer.text + "ABCDEFG"


def test_a_slot_that_holds_more_than_the_prompt_is_no_shorter_prompt():
    engine = engine_of(1)
    whole = "".join(PROMPTS)[:100]
    for prompt in (whole, whole[:50], whole[:50] + whole[:20]):
        id = engine.add(Request(prompt, 20, stream=False))
        answer = run(engine)[0][id]
        assert answer.text == generate_plain(lettered_target(), [prompt], 20).texts[0]
    assert answer.reused_tokens >= 48


# --- Shapes.


@pytest.mark.parametrize(
    ("tree", "extra"),
    [(False, 1), *(pytest.param(*x, marks=pytest.mark.long) for x in ((False, -1), (False, 0), (True, 0), (True, 1)))],
)
def test_long_prompts_in_pieces_equal_plain_decoding(tree, extra):
    target = long_target()
    prompt = np.random.default_rng(1).integers(0, VOCABULARY, 2 * PIECE + extra).tolist()
    draft = TREE if tree else DRAFT
    engine = Engine(target, tiny_adapter(2), EngineConfig(2), draft)
    short = engine.add(Request([1, 2, 3], 90, eos_token_ids=()))
    engine.step()
    id = engine.add(Request(prompt, 8, eos_token_ids=()))
    answers = run(engine)[0]
    assert answers[id].tokens == reference_tokens(prompt, 8)
    assert answers[short].tokens == generate_plain(tiny_target(), [[1, 2, 3]], 90).tokens[0]


@functools.cache
def long_target():
    target = tiny_target()
    leaves, structure = jax.tree.flatten(target.model)
    model = jax.tree.unflatten(structure, leaves)
    model.config = dataclasses.replace(model.config, max_position_embeddings=4096)
    return dataclasses.replace(target, model=model)


def reference_tokens(prompt, count):
    """Greedy tokens without a cache: the complete sequence for every token."""
    from tests.decode.test_lossless import full_forward

    tokens, length = list(prompt), 1088
    for _ in range(count):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        logits = full_forward(2, length)(tiny_target().model, tiny_adapter(2).model, padded)[0]
        tokens.append(int(logits[len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.long
def test_caches_grow_with_what_is_filled_and_shrink_again():
    engine = Engine(long_target(), tiny_adapter(2), EngineConfig(2), DRAFT)
    id = engine.add(Request([1, 2, 3], 1500, eos_token_ids=()))
    seen = set()
    answers = {}
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Finished):
                answers[event.id] = event.answer
        seen.add(engine._capacity)
    assert sorted(seen) == [512, 768, 1024, 1536]  # in classes, up to what the longest answer needs
    assert answers[id].tokens == generate_plain(long_target(), [[1, 2, 3]], 1500, eos_token_ids=[]).tokens[0]
    engine.add(Request([4, 5], 10, eos_token_ids=()))
    run(engine)
    assert engine._capacity == 128


def in_memory(arrays):
    """Bytes of caches, and of what else has more than two axes."""
    return sum(x.nbytes for x in arrays if x.ndim > 2)


@pytest.mark.long
def test_a_long_prompt_in_a_batch_of_one_has_the_only_caches():
    engine = Engine(long_target(), tiny_adapter(2), EngineConfig(1), DRAFT)
    engine.add(Request([1, 2, 3], 1300, eos_token_ids=()))  # caches as large as the prompts need
    run(engine)
    others = in_memory(jax.live_arrays()) - in_memory(jax.tree.leaves(engine._state))
    prompt, reused = np.random.default_rng(0).integers(0, VOCABULARY, 1100).tolist(), []
    for more in (0, 700):  # another prompt, and one that goes on from its answer
        prompt = prompt + [5] * more
        id = engine.add(Request(prompt, 20, eos_token_ids=()))
        engine.step()
        caches = jax.tree.leaves(engine._long_prompt.prompts)
        assert engine._state is None
        assert in_memory(jax.live_arrays()) - others == in_memory(caches)
        answer = run(engine)[0][id]
        assert answer.tokens == generate_plain(long_target(), [prompt], 20, eos_token_ids=[]).tokens[0]
        reused.append(answer.reused_tokens)
        prompt = prompt + answer.tokens
    assert reused[0] == 0
    assert reused[1] > 1100


def test_caches_that_grow_are_not_all_there_twice(monkeypatch):
    def measured(*args, **static):
        program = compile_program(*args, **static)

        def launch(part):
            out = jax.block_until_ready(program(part))
            seen.append(in_memory(jax.live_arrays()) - others)
            return out

        return launch

    engine, seen = engine_of(2), []
    engine.add(Request([1, 2, 3], 5, eos_token_ids=()))
    run(engine)
    before = in_memory(jax.tree.leaves(engine._state))
    others = in_memory(jax.live_arrays()) - before
    monkeypatch.setattr(engine_module, "compile_program", measured)
    engine._resize(2 * engine._capacity)
    after = in_memory(jax.tree.leaves(engine._state))
    layer = in_memory([engine._state.deep.keys[0], engine._state.deep.values[0]])
    assert after > 1.8 * before
    assert len(seen) == LAYERS + 1  # and the draft model's
    assert max(seen) <= after + layer


def test_padded_groups_of_an_accelerator_give_each_request_its_own_tokens(monkeypatch):
    """As on an accelerator: few widths, and prompts that are admitted together with rows of padding."""
    monkeypatch.setattr(engine_module, "choose_backend", lambda mesh, devices: DenseBackend())
    engine = engine_of(4)
    engine.shapes = dataclasses.replace(engine.shapes, accelerator=True)
    requests = [Request(prompt, 12 + i, SAMPLING[i % 2], eos_token_ids=()) for i, prompt in enumerate(PROMPTS[:7])]
    ids = [engine.add(request) for request in requests]
    answers, _, _ = run(engine)
    monkeypatch.undo()
    for id, request in zip(ids, requests, strict=True):
        assert answers[id].tokens == alone(request, False).tokens
    assert engine.shapes.group(3, 4) == (3, 4) and engine.shapes.group(9, 512) == (9, 64)
    assert [engine.shapes.prompt_width(n) for n in (1, 256, 257, 512)] == [256, 256, 512, 512]


def test_capacity_classes():
    assert [capacity_class(n) for n in (1, 128, 129, 192, 193, 256, 257, 384, 385, 512, 513, 1025)] == [
        128, 128, 192, 192, 256, 256, 384, 384, 512, 512, 768, 1536,
    ]  # fmt: skip


def test_a_plan_holds_a_prompt_its_answer_and_a_round():
    shapes = Shapes(engine_of(1).shapes.round)
    for tokens in (1, 64, 65, PIECE, PIECE + 1, 3 * PIECE - 1):
        plan = shapes.plan(tokens, 10)
        assert plan.prompt_capacity >= tokens
        assert plan.positions == tokens + 10 + 5
        assert tokens <= (tokens - 1) // PIECE * PIECE + plan.width <= tokens + PIECE


# --- Bad input.


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(""), "the prompt is empty"),
        (Request("a", 0), "max_new_tokens must be at least 1"),
        (Request("a", stop="b"), "stop must be a list of strings"),
        (Request("a", stop=[""]), "stop must be a list of strings"),
        (Request("a", seed=-1), "seed must be an integer from 0"),
        (Request("a", sampling=SamplingConfig(1.0, seed=[1, 2])), "seed of a request must be one integer"),
        (Request("a", eos_token_ids=[2**31]), "eos_token_ids must be token ids"),
        (Request("a", eos_token_ids=list(range(17))), "at most 16 token ids, found 17"),
        (Request("a" * 500, 20), "shorten the prompt or lower max_new_tokens to 12"),
    ],
)
def test_a_request_that_cannot_be_raises_at_once_and_leaves_the_engine_running(request_, message):
    engine = engine_of(1)
    good = engine.add(Request("abc", 20))
    engine.step()
    with pytest.raises(InputError, match=message) as caught:
        engine.add(request_)
    assert "\n" not in str(caught.value)
    assert run(engine)[0][good].text == generate_plain(lettered_target(), ["abc"], 20).texts[0]


def test_a_special_token_as_stop_string_ends_the_answer():
    """It is in no text, so its id is looked for; on the device, so that no more is decoded."""
    text = plain_text("abc")
    last = text[23]
    tokenizer = copy.deepcopy(lettered_target().tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [last]})
    target = dataclasses.replace(lettered_target(), tokenizer=tokenizer)
    engine = engine_of(1, target=target)
    engine.add(Request("abc", 60, stop=[last, "AAA"]))
    answer = run(engine)[0][0]
    end = text.index(last)
    assert [LETTERS[token] for token in answer.tokens] == list(text[: end + 1])
    assert answer.text == text[:end]
    assert answer.finish_reason == "stop"
    assert engine._state.finished.tolist() == [True]
    with pytest.raises(InputError, match=f"has the special token '{last}' within it"):
        engine.add(Request("abc", stop=[f"x{last}"]))


def test_an_answer_ends_at_the_context_where_asked():
    engine = Engine(lettered_target(), tiny_adapter(2), EngineConfig(1, max_length=50), DRAFT)
    engine.add(Request("abc", 100, eos_token_ids=(), to_context=True))
    answer = run(engine)[0][0]
    assert answer.text == plain_text("abc")[:47]
    assert answer.finish_reason == "length"
    with pytest.raises(InputError, match="the prompt has 50 tokens, but the context is 50"):
        engine.add(Request("a" * 50, to_context=True))


def test_aborting_what_is_unknown_or_has_ended_is_no_error():
    engine = engine_of(1)
    engine.abort(7)
    id = engine.add(Request("abc", 5))
    waiting = engine.add(Request("abc", 5))
    engine.abort(waiting)
    run(engine)
    engine.abort(id)
    assert not engine.busy
    assert engine.step() == []


def test_a_request_that_is_aborted_or_stopped_by_a_string_does_not_run_on():
    engine = engine_of(3)
    kept = engine.add(Request("abc", 200, eos_token_ids=()))
    gone = engine.add(Request("xyz", 200, eos_token_ids=()))
    engine.add(Request("abc", 200, stop=[plain_text("abc")[3:6]], eos_token_ids=()))
    engine.step()
    engine.abort(gone)
    for _ in range(3):  # the string is in the first chunk, which is read while the second runs
        engine.step()
    assert engine._state.finished.tolist() == [False, True, True]
    assert run(engine)[0][kept].text[:60] == plain_text("abc")


def test_a_batch_below_one_is_refused():
    with pytest.raises(InputError, match="max_batch must be a positive integer, found 0"):
        EngineConfig(0)
