"""Files of prompts and of answers: kills at any byte, settings, ids, parts of several processes, bad lines.

Truth: `generate_plain` alone, and the prompts' own ids.
"""

import copy
import dataclasses
import fcntl
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from kangaroo_jax import DecideConfig, DraftConfig, InputError, SamplingConfig, TreeConfig, generate_plain
from kangaroo_jax.config import RoundCosts
from kangaroo_jax.engine import answer_file
from kangaroo_jax.engine.answer_prompts import answer_prompts
from kangaroo_jax.engine.prompt_file import read_prompts
from kangaroo_jax.model.drafts.kangaroo import DraftVocabulary
from tests.decode.models import lettered_target, tiny_adapter

ROOT = pathlib.Path(__file__).parents[2]
DRAFT = DraftConfig(1, 4, 0.1)
COSTS = RoundCosts(1, 0.25, ((1, 1.0), (5, 1.3)), 0.05)
DECIDING = dataclasses.replace(DRAFT, decide=DecideConfig((COSTS,), from_slots=2))
LINES = [{"id": f"q{i}", "prompt": "abcdefghij"[i:] * 3, "max_new_tokens": 5 + 3 * i} for i in range(7)]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def answer(source, output, **kwargs):
    prompts, bad = read_prompts(source)
    assert bad == []
    kwargs = {"adapter": tiny_adapter(1), "batch_size": 1, "max_new_tokens": 20, "draft": DRAFT, **kwargs}
    target = kwargs.pop("target", lettered_target())
    return answer_prompts(target, prompts=prompts, output=output, source=source, **kwargs)


def with_draft_vocabulary(token_ids):
    model = nnx.clone(tiny_adapter(1).model)
    model.draft_vocabulary = DraftVocabulary(lettered_target().model, jnp.asarray(token_ids))
    return dataclasses.replace(tiny_adapter(1), model=model)


def read(output):
    """id -> record; every id once."""
    records = [json.loads(line) for line in output.read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records)
    return by_id


@functools.cache
def plain(prompt, most):
    return generate_plain(lettered_target(), [prompt], 60).texts[0][:most]


@pytest.fixture
def whole(tmp_path):
    """Prompts, and a whole run's answers to them."""
    source, output = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "answers.jsonl"
    done = answer(source, output)
    assert (done.prompts, done.before, done.errors) == (len(LINES), 0, 0)
    return source, output


def test_answers_are_plain_decoding_s(whole):
    records = read(whole[1])
    assert set(records) == {line["id"] for line in LINES}
    for line in LINES:
        record = records[line["id"]]
        assert record["text"] == plain(line["prompt"], line["max_new_tokens"])
        assert record["new_tokens"] == line["max_new_tokens"] == 1 + sum(record["accept_lengths"])
        assert record["finish_reason"] == "length"


def test_after_a_kill_at_any_byte_each_id_is_there_once(whole, tmp_path):
    source, output = whole
    expected, content = read(output), output.read_bytes()
    for end in (*range(0, len(content), 97), len(content) - 1, len(content)):
        output.write_bytes(content[:end])
        done = answer(source, output)
        assert read(output) == expected
        assert done.before == content[:end].count(b"\n")
        assert done.prompts == len(LINES) - done.before
    output.write_bytes(content[:300] + bytes(50) + b"\n")  # what a loss of power may leave
    answer(source, output)
    assert read(output) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "answers.jsonl",
        "answers.jsonl.settings.json",
        "prompts.jsonl",
    ]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_of_sequences_that_decide_are_gone_on_with(tmp_path, temperature):
    """With another batch size too, down to one that keeps to gamma and eta; but not sampled ones: they depend on it."""
    source, output = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "answers.jsonl"
    how = {"draft": DECIDING, "sampling": SamplingConfig(temperature)}
    answer(source, output, batch_size=2, **how)
    expected, lines = read(output), output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:3]))
    done = answer(source, output, batch_size=2, **how)
    assert (done.before, done.prompts) == (3, len(LINES) - 3)
    assert read(output) == expected
    if temperature:
        for batch_size in (1, 3):
            with pytest.raises(InputError, match=r"made with decide .*'slots': 2.*, not "):
                answer(source, output, batch_size=batch_size, **how)
    else:
        assert all(answer(source, output, batch_size=size, **how).before == len(LINES) for size in (1, 3))


def test_more_prompts_in_the_same_file_are_answered_by_the_next_run(whole):
    source, output = whole
    before = output.read_bytes()
    write(pathlib.Path(source), [{"id": 0, "prompt": "new", "max_new_tokens": 4}, *LINES])
    done = answer(source, output)
    assert (done.prompts, done.before) == (1, len(LINES))
    assert output.read_bytes().startswith(before)
    assert read(output)[0]["text"] == plain("new", 4)


def test_a_prompt_that_cannot_be_answered_gets_its_error_and_is_tried_again(tmp_path):
    bad = [
        {"id": "empty", "prompt": ""},
        {"id": "long", "prompt": "ab" * 256},
        {"id": "half", "prompt": "a\ud800"},
    ]
    source, output = write(tmp_path / "prompts.jsonl", [LINES[0], *bad, LINES[1]]), tmp_path / "answers.jsonl"
    for _ in range(2):
        said = []
        done = answer(source, output, on_error=said.append)
        assert done.errors == 3
        records = read(output)
        assert set(records) == {"q0", "q1", "empty", "long", "half"}
        assert "is empty" in records["empty"]["error"]
        assert "has 512 tokens, but the context is 512" in records["long"]["error"]
        assert "not valid Unicode" in records["half"]["error"]
        assert records["q1"]["text"] == plain(LINES[1]["prompt"], LINES[1]["max_new_tokens"])
        assert len(said) == 3
        assert said[1].startswith(f"{source} id 'long': ")
    bad[0]["prompt"], bad[1]["prompt"], bad[2]["prompt"] = "a", "ab" * 10, "ab"
    write(pathlib.Path(source), [LINES[0], *bad, LINES[1]])
    assert answer(source, output).errors == 0
    assert not any("error" in record for record in read(output).values())


def chat_target():
    """The lettered target, whose turns begin with Q, and its answers with R."""
    tokenizer = copy.deepcopy(lettered_target().tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'Q' + m.content }}{% endfor %}{% if add_generation_prompt %}R{% endif %}"
    )
    return dataclasses.replace(lettered_target(), tokenizer=tokenizer)


def test_messages_and_user_turns_are_given_by_the_chat_template(tmp_path):
    messages = [{"role": role, "content": text} for role, text in (("user", "ab"), ("assistant", "c"), ("user", "de"))]
    source = write(tmp_path / "p.jsonl", [{"id": 0, "messages": messages}, {"id": 1, "prompt": "xyz"}])
    done = answer(source, tmp_path / "chat.jsonl", target=chat_target(), as_user_turns=True)
    assert (done.prompts, done.errors) == (2, 0)
    assert {i: record["text"] for i, record in read(tmp_path / "chat.jsonl").items()} == {
        0: plain("QabQcQdeR", 20),
        1: plain("QxyzR", 20),
    }
    answer(source, tmp_path / "raw.jsonl", target=chat_target())
    assert read(tmp_path / "raw.jsonl")[1]["text"] == plain("xyz", 20)
    with pytest.raises(InputError, match="made with prompts 'user turns', not None"):
        answer(source, tmp_path / "chat.jsonl", target=chat_target())
    # A target without a template answers the text, and says why it does not answer the messages.
    done = answer(source, tmp_path / "none.jsonl", on_error=(said := []).append)
    assert (done.prompts, done.errors) == (1, 1)
    assert "its tokenizer has no chat template" in said[0]


@pytest.mark.long
def test_an_answer_ends_at_the_context(tmp_path):
    source = write(tmp_path / "prompts.jsonl", [{"id": 0, "prompt": "ab" * 10, "max_new_tokens": 493}])
    assert answer(source, tmp_path / "answers.jsonl").errors == 0
    record = read(tmp_path / "answers.jsonl")[0]
    assert (record["new_tokens"], record["finish_reason"]) == (492, "length")
    assert record["text"] == generate_plain(lettered_target(), ["ab" * 10], 492).texts[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"id": 0, "prompt": "a", "messages": []}, '"prompt" and "messages" are both there; give one'),
        ({"id": 0}, '"prompt" is missing'),
        ({"id": 0, "messages": "a"}, "messages must be a list like"),
        ({"id": 0, "messages": [{"role": "bot", "content": "a"}]}, "message 0 is of the unknown role 'bot'"),
        ({"id": 0, "messages": [{"role": "system", "content": "a"}]}, 'messages have no turn of "user"'),
    ],
)
def test_bad_messages_are_named_with_their_line(tmp_path, line, message):
    prompts, [bad] = read_prompts(write(tmp_path / "prompts.jsonl", [line]))
    assert prompts == []
    assert bad.startswith(f"{tmp_path}/prompts.jsonl line 1: {message}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 21}, "made with max_new_tokens 20, not 21"),
        ({"draft": DraftConfig(1, 3, 0.1)}, "made with max_draft_len 4, not 3"),
        ({"sampling": SamplingConfig(1.0)}, "made with temperature 0.0, not 1.0"),
        ({"sampling": SamplingConfig(seed=3)}, "made with seed 0, not 3"),
        ({"stop": ["x"]}, r"made with stop \[\], not \['x'\]"),
        (
            {"draft": dataclasses.replace(DRAFT, tree=TreeConfig(2, 4))},
            "made with tree None, not {'topk': 2, 'budget': 4}",
        ),
        ({"adapter": with_draft_vocabulary([3, 1])}, r"made with draft_vocabulary None, not '2 tokens \(\w+\)'"),
    ],
)
def test_answers_of_other_settings_are_refused(whole, change, message):
    before = whole[1].read_bytes()
    with pytest.raises(InputError, match=message):
        answer(*whole, **change)
    assert whole[1].read_bytes() == before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lines: [*lines, b'{"id": "other", "error": ""}\n'], "line 8: the id 'other' is not in .*prompts.jsonl"),
        (lambda lines: [*lines, lines[0]], "line 8: the id 'q.' is answered twice"),
        (lambda lines: [b"not ours\n", *lines], "line 1: not an answer as this command writes it"),
        (lambda lines: [b'{"id": "q0", "text": "x"}\n'], "line 1: not an answer as this command writes it"),
    ],
)
def test_lines_that_are_not_this_command_s_are_refused(whole, spoil, message):
    source, output = whole
    output.write_bytes(b"".join(spoil(output.read_bytes().splitlines(keepends=True))))
    before = output.read_bytes()
    with pytest.raises(InputError, match=message):
        answer(source, output)
    assert output.read_bytes() == before


def test_an_answer_to_another_prompt_of_the_same_id_is_refused(whole):
    source, output = whole
    write(pathlib.Path(source), [*LINES[:3], LINES[3] | {"prompt": "other"}, *LINES[4:]])
    with pytest.raises(InputError, match=r"answers.jsonl line \d: the id 'q3' had another prompt then"):
        answer(source, output)


def test_a_file_of_another_kind_is_refused_and_nothing_left_beside_it(tmp_path):
    source, output = write(tmp_path / "prompts.jsonl", LINES), tmp_path / "notes.txt"
    output.write_text("my notes")
    with pytest.raises(InputError, match=r"notes.txt: there already, and not made by this command"):
        answer(source, output)
    assert output.read_text() == "my notes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "prompts.jsonl"]


def test_two_runs_do_not_write_the_same_file(whole):
    with open(f"{whole[1]}.settings.json") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another run is writing it"):
            answer(*whole)
    assert answer(*whole).before == len(LINES)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "no" / "answers.jsonl", "there is no folder .*/no; create it"),
        (lambda folder: folder, "is a folder; give a file"),
        (lambda folder: folder / "prompts.jsonl", "is the --input too"),
    ],
)
def test_a_place_that_cannot_take_answers_is_named(tmp_path, make, message):
    source = write(tmp_path / "prompts.jsonl", LINES)
    with pytest.raises(InputError, match=message):
        answer_file.check_place(str(make(tmp_path)), source)


def test_bad_lines_are_named_by_number_and_the_rest_read(tmp_path):
    good = json.dumps(LINES[0]).encode()
    bad = {
        b"{": "not JSON",
        b"[" * 100_000: "not JSON",
        b'"text"': 'expected an object with "id" and "prompt"',
        b'{"prompt": "a"}': '"id" is missing',
        b'{"id": 1}': '"prompt" is missing',
        b'{"id": true, "prompt": "a"}': '"id" must be a text or an integer, found true',
        b'{"id": "", "prompt": "a"}': '"id" must be a text or an integer, found ""',
        b'{"id": 1, "prompt": ["a"]}': '"prompt" must be a text, found ["a"]',
        b'{"id": 1, "prompt": "a", "max_new_tokens": 0}': '"max_new_tokens" must be a positive integer, found 0',
        b'{"id": 1, "prompt": "a", "seed": -1}': '"seed" must be an integer from 0',
        b'{"id": "q0", "prompt": "b"}': "the id 'q0' is line 1's",
        b'{"id": 1, "prompt": "\xff"}': "not UTF-8",
    }
    path = tmp_path / "prompts.jsonl"
    last = b'{"id": 1, "prompt": "a", "seed": 3, "topic": "x"}'
    path.write_bytes(b"\n".join([b"\xef\xbb\xbf" + good, b"", *bad, last]))
    prompts, messages = read_prompts(str(path))
    assert [prompt.id for prompt in prompts] == ["q0", 1]
    assert prompts[1].seed == 3
    assert len(messages) == len(bad)
    for number, (message, expected) in enumerate(zip(messages, bad.values(), strict=True), start=3):
        assert message.startswith(f"{path} line {number}: ")
        assert expected in message
        assert len(message) < 300


def test_a_file_that_cannot_be_read_or_is_empty_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.jsonl: No such file"):
        read_prompts(str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(InputError, match=r"empty.jsonl: no prompts"):
        read_prompts(str(tmp_path / "empty.jsonl"))


PROCESS = """
import pathlib, sys, time
sys.path.insert(0, sys.argv[1])
from tests.engine.test_answers import answer
folder, index, count = pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def barrier(name):
    (folder / f"{name} {index}").touch()
    while not all((folder / f"{name} {i}").exists() for i in range(count)):
        time.sleep(0.01)
done = answer(f"{folder}/prompts.jsonl", folder / "out" / "answers.jsonl", process_index=index, process_count=count,
              barrier=barrier)
print(done.prompts, done.before, done.errors)
"""


@pytest.mark.long
def test_two_processes_share_a_file_and_merge(whole, tmp_path):
    """The first run's answers are spread over the output and parts of three processes, one torn: a killed run."""
    source, output = whole
    expected = read(output)
    lines = output.read_bytes().splitlines(keepends=True)
    folder = tmp_path / "out"
    folder.mkdir()
    torn = answer_file.part(folder / "answers.jsonl", 2, 3)
    (folder / "answers.jsonl").write_bytes(lines[0])
    answer_file.part(folder / "answers.jsonl", 0, 3).write_bytes(lines[0] + lines[1])  # merged, and not yet removed
    torn.write_bytes(lines[2] + lines[3][:20])
    os.link(f"{output}.settings.json", folder / "answers.jsonl.settings.json")
    write(pathlib.Path(source), [*LINES, {"id": "empty", "prompt": ""}])
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(ROOT), str(tmp_path), str(i), "2"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    done = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    prompts, before, errors = zip(*(map(int, out.split()) for out, _ in done), strict=True)
    assert (prompts, before, errors[0]) == ((2, 2), (3, 3), 1)
    records = read(folder / "answers.jsonl")
    assert "is empty" in records.pop("empty")["error"]
    assert records == expected
    assert sorted(path.name for path in folder.iterdir()) == ["answers.jsonl", "answers.jsonl.settings.json"]
