"""The input pipeline against the files themselves: with bytes as tokens, the windows must spell the documents back.

Restored positions are compared with an iterator that was never interrupted.
"""

import dataclasses
import json

import numpy as np
import pytest

from kangaroo_jax.demo import corpus
from kangaroo_jax.errors import InputError
from kangaroo_jax.train import data

EOS = 257


def windows_of(count: int, length: int = 4) -> data.Windows:
    tokens = np.arange(count * length, dtype=np.int32).reshape(count, length)
    return data.Windows(tokens, np.ones(tokens.shape, np.float32))


def test_windows_spell_the_documents(tmp_path, target):
    texts = ["def f():\n    return 1\n", "Zoë → 你好\n", "a\x00b", " spaces  and\ttabs "]
    (tmp_path / "a.txt").write_text(texts[0], encoding="utf-8")
    (tmp_path / "b.py").write_text(texts[1], encoding="utf-8")
    lines = [json.dumps({"text": text, "source": "test"}) for text in texts[2:]]
    (tmp_path / "c.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    files = data.find_files([str(tmp_path / "[ab].*"), str(tmp_path / "c.jsonl"), str(tmp_path / "a.txt")])
    stream = data.tokenize(data.read_documents(files), target)
    assert stream.tolist() == [token for text in texts for token in [*text.encode(), EOS]]
    windows = data.cut(stream, 7)
    assert windows.tokens.ravel().tolist() == stream[: len(stream) // 7 * 7].tolist()
    assert (windows.loss_mask == 1).all()


def test_standard_library_is_split_as_the_corpus_says(monkeypatch, target):
    sources = {False: {"a.py": "training " * 40}, True: {"b.py": "held out " * 30}}
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: sources[held_out])
    for parts in zip(data.load_windows("stdlib", "", 0.1, target, 16), (False, True), strict=True):
        windows, held_out = parts
        text = "".join(sources[held_out].values()).encode()
        assert bytes(windows.tokens.ravel().tolist()) == text[: windows.tokens.size]


def test_held_out_share_is_disjoint_and_the_same_each_time(tmp_path, target):
    (tmp_path / "a.txt").write_text("".join(chr(33 + i % 90) + str(i) for i in range(3000)))
    first, again = (data.load_windows(str(tmp_path / "a.txt"), "", 0.1, target, 16) for _ in range(2))
    training, held_out = ({row.tobytes() for row in part.tokens} for part in first)
    assert not training & held_out
    assert len(held_out) / (len(training) + len(held_out)) == pytest.approx(0.1, abs=0.01)
    assert [part.fingerprint for part in first] == [part.fingerprint for part in again]
    assert first[0].fingerprint != first[1].fingerprint


def test_an_epoch_sees_every_window_once_and_the_next_in_another_order():
    batches = data.training_batches(windows_of(12), 4, seed=0)
    epochs = [np.concatenate([next(batches)["tokens"][:, 0] for _ in range(3)]) for _ in range(2)]
    assert all(sorted(epoch) == list(range(0, 48, 4)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    other = data.training_batches(windows_of(12), 4, seed=1)
    assert epochs[0].tolist() != np.concatenate([next(other)["tokens"][:, 0] for _ in range(3)]).tolist()


@pytest.mark.parametrize("seen", [0, 1, 7])
def test_a_restored_position_goes_on_where_it_was(seen):
    batches = data.training_batches(windows_of(11), 4, seed=3)  # 11: batches reach across epochs
    for _ in range(seen):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(6)]
    restored = data.training_batches(windows_of(11), 4, seed=3)
    restored.set_state(state)
    for batch in expected:
        found = next(restored)
        assert all((found[name] == batch[name]).all() for name in batch)


def test_evaluation_batches_are_spread_and_padding_does_not_count():
    batches = data.evaluation_batches(windows_of(10), 4, most=6)
    assert [batch["tokens"].shape for batch in batches] == [(4, 4), (4, 4)]
    rows = np.concatenate([batch["tokens"][batch["loss_mask"][:, 0] > 0] for batch in batches])
    assert rows[:, 0].tolist() == [4 * i for i in (0, 1, 3, 5, 6, 8)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": oops}\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txt": "y", "id": 1}\n', "a.jsonl:3: expected an object with a string"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": "half an emoji \\ud83d"}\n', 'a.jsonl:1: "text" is not valid Unicode (character 14)'),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl:1: expected an object with a string"),
        ("a.jsonl", b'["text"]\n', "a.jsonl:1: expected an object with a string"),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl:1: not UTF-8"),
        ("a.txt", b"abc\xff\xfe", "a.txt: not UTF-8 text (invalid start byte at byte 3)"),
    ],
)
def test_malformed_files_are_named(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        list(data.read_documents([tmp_path / name]))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files_and_too_little_text_are_named(tmp_path, target):
    with pytest.raises(InputError, match=r"nothing-\*.txt: no such file"):
        data.check_files("stdlib", str(tmp_path / "nothing-*.txt"))
    with pytest.raises(InputError, match=r"data\.files: empty"):
        data.check_files(" , ", "")
    with pytest.raises(InputError, match="expected at least 4 windows of 4 tokens, found 3"):
        data.training_batches(windows_of(3), 4, seed=0)
    with pytest.raises(InputError, match="too little held-out text"):
        data.evaluation_batches(windows_of(0), 4, most=8)
    with pytest.raises(InputError, match="has no tokenizer"):
        data.tokenize(iter(["text"]), dataclasses.replace(target, tokenizer=None))
