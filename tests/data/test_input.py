"""Batches against the records themselves, and against each other: one order, whatever the number of processes and
interruptions."""

import collections
import json

import numpy as np
import pytest

from kangaroo_jax.config import DataConfig
from kangaroo_jax.data.cache import cache_folder, open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.input import (
    Rows,
    check_files,
    device_part,
    evaluation_batches,
    load_rows,
    training_batches,
)
from kangaroo_jax.data.records import find_sources
from kangaroo_jax.demo import corpus
from kangaroo_jax.errors import InputError

LENGTH = 64
STANDARD_LIBRARY = "python:kangaroo_jax.demo.corpus.standard_library"


def conversation(number):
    """Two answers, of lengths that depend on the number."""
    turns = [("human", f"question {number}"), ("gpt", f"answer {number} " + f"{number:03d} " * (number * 7 % 23))]
    turns += [("human", "and?"), ("gpt", f"{number} more")]
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    path.write_text("\n".join(json.dumps(conversation(i)) for i in range(150)))
    return path


@pytest.fixture(scope="module")
def settings(chats, tmp_path_factory):
    return DataConfig(str(chats), "", 0.1, "llama-2", str(tmp_path_factory.mktemp("cache")), 0.0)


@pytest.fixture(scope="module")
def rows(settings, target):
    """Training and held-out rows."""
    return load_rows(settings, target, LENGTH, seed=0)


def cache_of(settings, target):
    sources, encoder = find_sources(settings.files), Encoder(target, settings.template)
    return open_cache(cache_folder(settings.cache), sources, encoder, 0.0)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(left, right):
    assert left.keys() == right.keys()
    return all(np.array_equal(left[name], right[name]) for name in left)


def joined(parts):
    """The global batch of the parts of all processes. Each has the ids of all of its rows: the first names records."""
    row_ids = parts[0]["row_ids"]
    assert all(np.array_equal(part["row_ids"], row_ids) for part in parts)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} | {"row_ids": row_ids}


def test_rows_hold_each_record_piece_by_piece(rows, settings, target):
    cache = cache_of(settings, target)
    counted = np.zeros(cache.lengths.sum())
    for start, end in cache.counted:
        counted[start:end] = 1
    expected, owners = collections.Counter(), collections.defaultdict(set)
    for record, mask in enumerate(np.split(counted, np.cumsum(cache.lengths)[:-1])):
        whole = cache.tokens(record)
        for start in range(0, len(whole), LENGTH):
            piece = (*whole[start : start + LENGTH], *mask[start : start + LENGTH])
            if mask[start : start + LENGTH].any():  # others have nothing to learn
                expected[piece] += 1
                owners[piece].add(cache.describe(record))

    found = collections.Counter()
    for part in rows:
        for index in range(len(part)):
            row = part[index]
            count, segments = np.count_nonzero(row["segment_ids"]), []
            assert all(not row[name][count:].any() for name in ("tokens", "loss_mask", "segment_ids", "positions"))
            for segment in range(1, row["segment_ids"].max() + 1):
                at = np.flatnonzero(row["segment_ids"] == segment)
                assert row["positions"][at].tolist() == list(range(len(at)))
                assert at.tolist() == list(range(at[0], at[0] + len(at)))
                segments.append((*row["tokens"][at], *row["loss_mask"][at]))
            found.update(segments)
            names = set(part.record_ids([index]))
            assert all(owners[piece] & names for piece in segments)
            assert names <= set.union(*(owners[piece] for piece in segments))
    assert found == expected


def test_held_out_records_are_not_trained_on_and_follow_the_seed(rows, settings, target):
    def names(part):
        return set(part.record_ids(range(len(part))))

    training, held_out = rows
    assert len(names(held_out)) == 15
    assert len(names(training)) == 135
    assert not names(training) & names(held_out)
    again, other = (load_rows(settings, target, LENGTH, seed) for seed in (0, 1))
    assert [part.fingerprint for part in again] == [part.fingerprint for part in rows]
    assert names(other[1]) != names(held_out)
    assert training.fingerprint not in (held_out.fingerprint, other[0].fingerprint)
    longer = load_rows(settings, target, 2 * LENGTH, 0)
    assert longer[0].fingerprint != training.fingerprint


def test_standard_library_is_split_as_the_corpus_says(monkeypatch, tmp_path, target):
    sources = {False: {"a.py": "training " * 40}, True: {"b.py": "held out " * 30}}
    monkeypatch.setattr(corpus, "standard_library", lambda held_out: sources[held_out])
    settings = DataConfig(STANDARD_LIBRARY, "", 0.1, "", str(tmp_path), 0.0)
    check_files(settings)
    for part, held_out in zip(load_rows(settings, target, 16, 0), (False, True), strict=True):
        text = "".join(sources[held_out].values()).encode()
        learned = b"".join(bytes(row["tokens"][row["tokens"] < 256]) for row in map(part.__getitem__, range(len(part))))
        assert sorted(learned.replace(b"\0", b"")) == sorted(text)


def test_an_epoch_sees_every_row_once_and_the_next_in_another_order(rows):
    training = rows[0]
    batches, other = training_batches(training, 1, seed=0), training_batches(training, 1, seed=1)

    def epoch(batches):
        return np.concatenate([batch["row_ids"] for batch in take(batches, len(training))]).tolist()

    first, second, different = epoch(batches), epoch(batches), epoch(other)
    assert sorted(first) == sorted(second) == list(range(len(training)))
    assert first != second
    assert first != different


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(rows, processes):
    whole = training_batches(rows[0], 8, seed=3)
    parts = [training_batches(rows[0], 8, 3, process, processes) for process in range(processes)]
    for _ in range(2 * len(rows[0]) // 8):
        expected, found = next(whole), [next(part) for part in parts]
        assert all(batch["tokens"].shape == (8 // processes, LENGTH) for batch in found)
        assert equal(joined(found), expected)
        assert all(part.get_state() == whole.get_state() for part in parts)
    evaluation = evaluation_batches(rows[1], 8, 13)
    parts = [evaluation_batches(rows[1], 8, 13, process, processes) for process in range(processes)]
    for expected, *found in zip(evaluation, *parts, strict=True):
        assert equal(joined(found), expected)


@pytest.mark.parametrize("seen", [0, 1, 40])  # 40: in the second epoch
def test_a_restored_position_goes_on_where_it_was(rows, seen):
    batches = training_batches(rows[0], 8, seed=3)
    take(batches, seen)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 6)
    restored = [training_batches(rows[0], 8, 3, process, 2) for process in range(2)]  # on two machines now
    for batches in restored:
        batches.set_state(state)
    for batch in expected:
        parts = [next(batches) for batches in restored]
        assert equal(joined(parts), batch)


def test_evaluation_batches_are_spread_and_padding_does_not_count(rows):
    held_out = rows[1]
    assert len(held_out) > 12
    batches = evaluation_batches(held_out, 4, max_rows=6)
    assert [batch["tokens"].shape for batch in batches] == [(4, LENGTH), (4, LENGTH)]
    ids = np.concatenate([batch["row_ids"] for batch in batches]).tolist()
    assert ids == [i * len(held_out) // 6 for i in range(6)] + [-1, -1]
    for name in ("loss_mask", "segment_ids"):
        assert not batches[1][name][2:].any()
    assert held_out.record_ids([-1]) == []
    assert "row_ids" not in device_part(batches[0])


def test_too_little_data_is_named(rows, settings, target, tmp_path):
    training = rows[0]
    with pytest.raises(InputError, match=f"expected at least 999 rows of {LENGTH} tokens, found {len(training)}"):
        training_batches(training, 999, seed=0)
    with pytest.raises(InputError, match="batch_size: expected a multiple of the 3 processes, found 8"):
        training_batches(training, 8, 0, 0, 3)
    nothing = Rows(cache_of(settings, target), np.arange(0), LENGTH)
    with pytest.raises(InputError, match="nothing held out"):
        evaluation_batches(nothing, 4, max_rows=8)
    (tmp_path / "a.txt").write_text("one record")
    one = DataConfig(str(tmp_path / "a.txt"), "", 0.1, "", settings.cache, 0.0)
    with pytest.raises(InputError, match=r"data\.files: one record, of which none can be held out"):
        load_rows(one, target, LENGTH, 0)
    with pytest.raises(InputError, match=r"missing\.txt: no such file"):
        check_files(DataConfig(STANDARD_LIBRARY, str(tmp_path / "missing.txt"), 0.1, "", "", 0.0))
