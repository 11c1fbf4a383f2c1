"""Data files against what was written into them: places, roles, texts; and every way in which they can be wrong."""

import json

import pytest

from kangaroo_jax.data.records import BadRecord, Conversation, Text, Turn, find_sources, read_records, tidy
from kangaroo_jax.demo import corpus
from kangaroo_jax.errors import InputError

CHAT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
HELLO = Conversation((Turn("user", "hi"), Turn("assistant", "hello")))


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    sources = find_sources(str(path))
    return [(entry.place.describe(sources), entry.content) for entry in read_records(sources)]


def test_records_of_every_kind_with_their_places(tmp_path):
    openai = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    }
    openai["messages"].append({"role": "assistant", "content": "hello"})
    bing = {"conversations": [{"from": "USER", "value": "hi"}, {"from": "bing", "value": "hello"}]}
    lines = [CHAT, openai, bing, {"text": "words"}]
    found = read(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    with_system = Conversation((Turn("system", "s"), *HELLO.turns))
    expected = [HELLO, with_system, HELLO, Text("words")]
    assert found == [(f"{tmp_path}/a.jsonl:{1 + 2 * i}", content) for i, content in enumerate(expected)]

    as_list = json.dumps(lines, indent=1)
    found = read(tmp_path / "a.json", as_list)
    assert [content for _, content in found] == expected
    for i, (place, _) in enumerate(found):
        line = 1 + as_list[: as_list.index(json.dumps(lines[i], indent=1).replace("\n", "\n ")[:30])].count("\n")
        assert line > 1 or i == 0
        assert place.endswith(f" (item {i})")
    assert found[0][0] == f"{tmp_path}/a.json:2 (item 0)"
    # JSON Lines by another name, and a list in a file of lines.
    assert read(tmp_path / "b.json", json.dumps(CHAT) + "\n" + json.dumps(CHAT)) == [
        (f"{tmp_path}/b.json:{line}", HELLO) for line in (1, 2)
    ]
    assert [content for _, content in read(tmp_path / "c.jsonl", json.dumps([CHAT, CHAT]))] == [HELLO, HELLO]


def test_records_as_other_tools_write_them(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    lines = [{"id": "1", key: turns} for key in ("conversations", "conversation", "messages")]
    lines += [
        {"messages": CHAT["conversations"]},
        {"prompt": "a ", "completion": "b"},
        {"prompt": "a", "completion": ""},
    ]
    expected = [HELLO] * 4 + [Text("a b", prompt=2), None]
    assert [content for _, content in read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, lines)))] == expected


def test_objects_over_several_lines(tmp_path):
    text = "\n".join(json.dumps(record, indent=2) for record in (CHAT, {"text": "a"}, CHAT))
    found = read(tmp_path / "a.json", text)
    assert [content for _, content in found] == [HELLO, Text("a"), HELLO]
    lines = text.split("\n")
    starts = [number for number, line in enumerate(lines, 1) if line == "{"]
    assert [place for place, _ in found] == [f"{tmp_path}/a.json:{line} (item {i})" for i, line in enumerate(starts)]
    with pytest.raises(InputError, match=rf"a.json:{len(lines) + 1}: not valid JSON .* the rest of the file cannot be"):
        read(tmp_path / "a.json", text + "\noops")
    # A first line that is broken is a bad line, and the others are read.
    found = read(tmp_path / "a.jsonl", '{"text": "a\n{"text": "b"}')
    assert "not valid JSON" in str(found[0][1])
    assert found[1][1] == Text("b")


def test_what_changes_what_is_learned_is_taken(tmp_path):
    def content(record):
        return read(tmp_path / "a.jsonl", json.dumps(record))[0][1]

    def chat(**answer):
        return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", **answer}]}

    system = Conversation((Turn("system", "Be short."), *HELLO.turns))
    assert content(CHAT | {"system": "Be short."}) == content(CHAT | {"system_prompt": "Be short."}) == system
    repeated = chat()
    repeated["messages"].insert(0, {"role": "system", "content": "Be short."})
    assert content(repeated | {"system": "Be short."}) == system
    assert content(CHAT | {"system": " ", "tools": []}) == HELLO
    for key, value in (("loss", False), ("weight", 0), ("train", False), ("loss_mask", 0)):
        record = chat(**{key: value})
        assert content(record) is None  # nothing else is there to learn
        record["messages"] += chat(**{key: 1})["messages"]
        assert content(record) == Conversation((HELLO.turns[0], Turn("assistant", "hello", False), *HELLO.turns))
        assert content(chat(**{key: True})) == HELLO
        assert content(chat() | {key: value}) is None
    user = chat()
    user["messages"][0]["weight"] = 0
    assert content(user) == HELLO


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_bom_and_crlf_in_the_file_do_not_reach_the_text(tmp_path, name):
    text = "one\r\ntwo"  # within the text they stay
    record = json.dumps({"text": text})
    body = f"{record}\r\n{record}\r\n" if name == "a.jsonl" else f"[\r\n{record},\r\n{record}]\r\n"
    found = read(tmp_path / name, b"\xef\xbb\xbf" + body.encode())
    assert [content for _, content in found] == [Text(text)] * 2
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\ntwo") == [(f"{tmp_path}/a.txt:1", Text("one\ntwo"))]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ("s:rules u:a g:b", "s:rules u:a g:b"),
        ("u:a g: u:b g:c", "u:a\n\nb g:c"),  # an empty answer: both questions are asked at once
        ("u:a u:b g:c g:d u:e g:f", "u:a\n\nb g:c\n\nd u:e g:f"),
        ("g:unasked u:a g:b", "u:a g:b"),
        ("u: g:unasked u:a g:b", "u:a g:b"),
        ("s:rules g:unasked u:a g:b u:unanswered", "s:rules u:a g:b"),
        ("u:a g: ", ""),
        ("", ""),
        ("s:rules", ""),
    ],
)
def test_turns_in_the_shape_that_templates_expect(turns, expected):
    def parse(text):
        roles = {"s": "system", "u": "user", "g": "assistant"}
        return tuple(Turn(roles[word[0]], word[2:]) for word in text.split(" ") if word)

    assert tidy(parse(turns)) == parse(expected)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": oops}', "not valid JSON (Expecting value at column 10); expected one object per line"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"text": "half an emoji \\ud83d"}', '"text" is not valid Unicode (character 14)'),
        (b'{"text": "\xff"}', "not UTF-8 text (invalid start byte at byte 10 of the line)"),
        (
            b'{"txt": "y", "id": 1}',
            'expected an object with "conversations", "messages", "prompt" and "completion", or a string under "text"',
        ),
        (b'{"text": 3}', "found keys text"),
        (b'"text"', "found str"),
        (b'{"text": "a", "text": "b"}', 'the key "text" is there twice'),
        (b'{"conversations": [{"from": "human", "value": "a", "value": "b"}]}', 'the key "value" is there twice'),
        (b'{"conversations": "hi"}', 'expected a list under "conversations", found str'),
        (b'{"conversations": [{"from": "cat", "value": "a"}]}', "turn 0 of conversations: expected a role under"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}',
            'a part of "content" has no text, found None',
        ),
        (b'{"conversations": [{"from": "gpt", "value": null}]}', 'expected a string under "value", found NoneType'),
        (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "turn 0 of messages is not valid Unicode"),
        (b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}', "turn 0 of messages: a tool call"),
        (b'{"messages": ["hi"]}', "turn 0 of messages: expected an object, found str"),
        (b'{"messages": [], "tools": [{}]}', '"tools": a conversation with tools'),
        (
            b'{"messages": [{"role": "system", "content": "a"}], "system": "b"}',
            "a system text of the record, and another",
        ),
        (b'{"messages": [], "system": ["b"]}', "expected a string as the record's system text, found list"),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}',
            'turn 0 of messages: expected true or false, 0 or 1 under "weight", found 0.5',
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "a", "reasoning_content": "b"}]}',
            'turn 0 of messages: only what is under "content" can be trained on, found "reasoning_content" as well',
        ),
        (b'{"messages": [], "loss": 2.5}', 'the record: expected true or false, 0 or 1 under "loss", found 2.5'),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": false}, '
            b'{"role": "assistant", "content": "b"}]}',
            "consecutive turns of assistant, of which only some are to be learned",
        ),
        (
            b'{"prompt": "a", "completion": "b", "token_ids": [1], "learned": [[0, 2]], "tokenizer": "x"}',
            '"learned": expected ascending places in 1 tokens, found [[0, 2]]',
        ),
        (b'{"prompt": "a", "completion": "b", "token_ids": [1]}', '"token_ids": expected to be told under "tokenizer"'),
    ],
)
def test_bad_lines_are_named_and_the_others_read(tmp_path, line, expected):
    good = json.dumps(CHAT).encode()
    found = read(tmp_path / "a.jsonl", b"\n".join([good, line, good]))
    assert [place.rpartition(":")[2] for place, _ in found] == ["1", "2", "3"]
    assert found[0][1] == found[2][1] == HELLO
    assert isinstance(found[1][1], BadRecord)
    assert expected in str(found[1][1])


def test_a_bad_item_of_a_list_is_named_and_the_others_read(tmp_path):
    found = read(tmp_path / "a.json", f'[{json.dumps(CHAT)},\n{{"text": "a", "text": "b"}},\n{json.dumps(CHAT)}]')
    assert [place for place, _ in found] == [f"{tmp_path}/a.json:{i + 1} (item {i})" for i in range(3)]
    assert [str(content) for _, content in found][1] == 'the key "text" is there twice'
    assert found[0][1] == found[2][1] == HELLO


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[{"text": "a"},\n{"text": oops},\n{"text": "b"}]', "a.json:2: not valid JSON (Expecting value at column 10"),
        ('[{"text": "a"}\n{"text": "b"}]', "a.json:2: not valid JSON (expected ',' or ']' at column 1"),
        ('[\n{"text": "a"},\n]', "a.json:3: not valid JSON (a comma before the end of the list at column 1"),
        ('[{"text": "a"},\n{"text": "b"', "a.json:2: not valid JSON (Expecting ',' delimiter"),
        ('[{"text": "a"}', "a.json:1: not valid JSON (expected ',' or ']'"),
        ('[{"text": "a"}]\n[]', "a.json:2: not valid JSON (text after the list"),
        (b'[\n{"text": "\xff"}]', "a.json:2: not UTF-8 text (invalid start byte at byte 12)"),
    ],
)
def test_a_broken_list_is_one_error(tmp_path, content, expected):
    with pytest.raises(InputError) as error:
        read(tmp_path / "a.json", content)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_text_files(tmp_path):
    assert read(tmp_path / "a.py", "def f():\n    return 1\n")[0][1] == Text("def f():\n    return 1\n")
    (_, bad), *_ = read(tmp_path / "a.txt", b"abc\n\xff\xfe")
    assert str(bad) == "not UTF-8 text (invalid start byte at byte 4)"
    assert read(tmp_path / "a.txt", " \n\n") == [(f"{tmp_path}/a.txt:1", None)]
    text = "".join(f"line {i}\n" for i in range(10_000)) + "x" * 100_000
    parts = read(tmp_path / "a.txt", text)
    assert "".join(part.text for _, part in parts) == text
    assert [part.begins for _, part in parts] == [True] + [False] * (len(parts) - 1)
    assert [part.ends for _, part in parts] == [False] * (len(parts) - 1) + [True]
    assert max(len(part.text) for _, part in parts) <= 32_768
    lines = text.split("\n")
    for place, part in parts[:3]:
        assert lines[int(place.rpartition(":")[2]) - 1] == part.text.split("\n")[0]


def test_files_globs_and_what_matches_nothing(tmp_path, monkeypatch):
    for name in ("a.txt", "b.py", "c.jsonl"):
        (tmp_path / name).touch()
    files = find_sources(f"{tmp_path}/[ab].*, {tmp_path}/c.jsonl,{tmp_path}/a.txt")
    assert [source.name for source in files] == [f"{tmp_path}/{name}" for name in ("a.txt", "b.py", "c.jsonl")]
    with pytest.raises(InputError, match=r"nothing-\*.txt: no such file"):
        find_sources(str(tmp_path / "nothing-*.txt"))
    with pytest.raises(InputError, match=r"data\.files: empty"):
        find_sources(" , ")
    sources = {False: {"a.py": "training"}, True: {"b.py": "held out"}}
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: sources[held_out])
    with pytest.raises(InputError, match=r"python:kangaroo_jax\.demo\.corpora\.all: cannot be imported \(.*'corpora'"):
        find_sources("python:kangaroo_jax.demo.corpora.all")
    with pytest.raises(InputError, match=r"python:kangaroo_jax\.demo\.corpus: a module; expected python:MODULE"):
        find_sources("python:kangaroo_jax.demo.corpus")
    for held_out, text in ((False, "training"), (True, "held out")):
        (entry,) = read_records(find_sources("python:kangaroo_jax.demo.corpus.standard_library", held_out))
        assert entry.content == Text(text)


def test_buckets(service):
    names = ("one.jsonl", "other.txt", "two.jsonl")
    for name in (*names, "deeper/one.jsonl"):
        service.put(f"chats/{name}", json.dumps(CHAT).encode())
    at = service.location("chats")
    sources = find_sources(f"{at}/*.jsonl,{at}/other.txt")
    names = ("one.jsonl", "two.jsonl", "other.txt")
    assert [source.name for source in sources] == [f"{at}/{name}" for name in names]
    assert [entry.content for entry in read_records(sources)] == [HELLO, HELLO, Text(json.dumps(CHAT))]
    assert len(find_sources(f"{at}/**/*.jsonl")) == 3
    with pytest.raises(InputError, match=rf"{at}/none\.jsonl: no such file"):
        find_sources(f"{at}/none.jsonl")
    service.remove("chats/one.jsonl")
    with pytest.raises(InputError, match=rf"{at}/one\.jsonl: "):
        list(read_records(sources))
