"""The draft vocabulary from training data to drafts: as a part of training, and as a command for an adapter that is
already trained."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
from collections import Counter

import jax
import numpy as np
import pytest
from flax import nnx

from kangaroo_jax import DraftConfig, InputError, demo, generate, generate_plain, load_adapter, load_target
from kangaroo_jax.checkpoint.adapter import DRAFT_VOCABULARY, save_adapter, write_draft_vocabulary
from kangaroo_jax.config import AdapterConfig
from kangaroo_jax.data.cache import CacheFolder, open_cache
from kangaroo_jax.data.encode import Encoder
from kangaroo_jax.data.input import evaluation_batches, load_rows
from kangaroo_jax.data.records import find_sources
from kangaroo_jax.model.drafts.kangaroo import Adapter, adapter_apply
from kangaroo_jax.model.target import deep_apply, lm_head, shallow_apply
from kangaroo_jax.train import draft_vocabulary
from kangaroo_jax.train.draft_vocabulary import StepBytes, best_size, choose, count_tokens, predicted_speed
from kangaroo_jax.train.loop import train
from kangaroo_jax.train.objective import segment_mask

from .runs import assert_same, checkpoint, configured


def add_vocabulary(*flags):
    command = [sys.executable, "-m", "kangaroo_jax.cli.draft_vocabulary", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_most_frequent_tokens_are_drafted(tmp_path):
    adapter = shutil.copytree(demo.ADAPTER, tmp_path / "adapter")
    text = "def f(self):\n    return self.value\n" * 50 + "import os\n"
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    files = {"model": demo.MODEL, "adapter": adapter, "files": tmp_path / "data.jsonl", "cache": tmp_path / "cache"}
    flags = [f"--{name}={value}" for name, value in files.items()]
    done = add_vocabulary(*flags, "--size=12")
    assert done.returncode == 0, done.stderr
    target = load_target(str(demo.MODEL), "float32")
    ids = np.load(adapter / DRAFT_VOCABULARY)
    followers = target.tokenizer.encode(text)[1:]
    frequent = {token for token in set(followers) if followers.count(token) >= 50}
    assert frequent | set(target.eos_token_ids) <= set(ids.tolist())
    assert len(ids) == len(set(ids.tolist())) == 12
    # In use: other drafts, the same tokens.
    prompt = ["class A:\n    def f(self):\n        return self.value\n\n    def g(self):\n"]
    small = load_adapter(adapter, target)
    out = generate(target, small, prompt, 24, DraftConfig(None, 2, 0.0))
    assert out.tokens == generate_plain(target, prompt, 24).tokens
    too_many = add_vocabulary(*flags, "--size=4096")
    assert too_many.returncode == 2
    last = too_many.stderr.strip().splitlines()[-1]
    assert (
        last == "draft_vocabulary: error: draft vocabulary: expected more than 1 and less than 4096 tokens, found 4096"
    )


def test_the_most_frequent_tokens_of_the_data_are_what_loads(small_target_folder, tmp_path):
    """The test above without the command and its decoding, with a target whose tokens are bytes."""
    target = load_target(small_target_folder, "float32")
    adapter = tmp_path / "adapter"
    save_adapter(adapter, jax.jit(lambda: Adapter(target.config, rngs=nnx.Rngs(3)))(), exit_layer=1, target=target)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "abcabcab d" * 20 + "e"}) + "\n")
    sources = find_sources(str(tmp_path / "data.jsonl"))
    cache = open_cache(CacheFolder(tmp_path / "cache"), sources, Encoder(target, ""), 0.0)
    counts = count_tokens(cache, target.config.vocab_size)
    assert {chr(token): int(counts[token]) for token in np.flatnonzero(counts[:256])} == {
        "a": 59,  # the first follows nothing
        "b": 60,
        "c": 40,
        " ": 20,
        "d": 20,
        "e": 1,
    }
    ids = choose(counts, len(target.eos_token_ids) + 4, target.eos_token_ids)
    assert {*map(ord, "abc "), *target.eos_token_ids} == set(ids.tolist())
    write_draft_vocabulary(adapter, ids)
    assert np.array_equal(load_adapter(adapter, target).model.draft_vocabulary.token_ids[...], ids)


def test_tokens_that_end_a_text_are_always_in():
    counts = np.asarray([5, 0, 7, 7, 1])
    assert choose(counts, 3, (1,)).tolist() == [1, 2, 3]
    assert choose(counts, 2, (1,)).tolist() == [1, 2]
    with pytest.raises(InputError, match="more than 1 and less than 5 tokens, found 5"):
        choose(counts, 5, (1,))


@pytest.mark.parametrize(
    ("contents", "what"),
    [
        (b"junk", "not a NumPy array"),
        (np.asarray([1, 5000]), "token id 5000 is outside the vocabulary of 4096"),
        (np.asarray([1, 1]), "twice"),
        (np.asarray([0.5]), "expected a list of token ids"),
        (np.zeros((0,), np.int32), "expected a list of token ids"),
    ],
    ids=["junk", "outside", "twice", "floats", "empty"],
)
def test_a_file_that_is_wrong_is_named(tmp_path, contents, what):
    adapter = shutil.copytree(demo.ADAPTER, tmp_path / "adapter")
    if isinstance(contents, bytes):
        (adapter / DRAFT_VOCABULARY).write_bytes(contents)
    else:
        np.save(adapter / DRAFT_VOCABULARY, contents)
    with pytest.raises(InputError, match=what):
        load_adapter(adapter, load_target(str(demo.MODEL), "float32"))


def test_the_speed_that_is_predicted_is_that_of_the_bytes_read():
    parts = StepBytes(shallow=1, deep=3, adapter=1, head_row=1)
    # Plain: 1 + 3 + 8. A draft step of 3 tokens: 1 + 1 + 3. One draft commits 1.7 tokens for 17 bytes; two would commit
    # 2.19 for 22, which is less for each byte.
    assert predicted_speed(3, 1.0, 8, parts) == pytest.approx(1.7 * 12 / 17)
    # A draft step of all tokens reads 10.
    assert predicted_speed(8, 1.0, 8, parts) == pytest.approx(1.7 * 12 / 22)
    # Half of the tokens cannot be drafted, so half of the drafts that would have been accepted are not.
    assert predicted_speed(2, 0.5, 8, parts) == pytest.approx(1.35 * 12 / 16)
    # Where drafts cost nothing, six are best.
    free = StepBytes(shallow=0, deep=100, adapter=0, head_row=0)
    assert predicted_speed(2, 1.0, 8, free) == pytest.approx(sum(0.7**i for i in range(7)))


def test_the_best_size_covers_enough_and_no_more():
    parts, ranked = StepBytes(shallow=1, deep=3, adapter=1, head_row=1), np.arange(8)[::-1]

    def best(*held_out):  # by rank
        return best_size(ranked, np.asarray(held_out)[::-1], parts, least=1)

    assert best(40, 40, 20, 0, 0, 0, 0, 0) == 3  # the first size that covers all
    assert best(49, 50, 1, 0, 0, 0, 0, 0) == 2  # a hundredth is not worth a row
    cheap = StepBytes(shallow=1000, deep=3000, adapter=1000, head_row=1)
    assert best_size(ranked, np.ones(8), cheap, least=1) == 8  # the head is next to nothing


def test_the_bytes_of_a_step_are_those_of_the_weights(small_target_folder):
    target = load_target(small_target_folder, "float32")
    # Of configuration `small`: hidden 32, 8 heads and 4 key/value heads of 8, MLP 64, 264 tokens, an untied head.
    attention, mlp, norm = 32 * (64 + 2 * 32) + 64 * 32, 3 * 32 * 64, 32
    layer = attention + mlp + 2 * norm
    assert StepBytes.of(target, 1, AdapterConfig("kangaroo")) == StepBytes(
        4 * layer, 4 * (layer + norm), 4 * (attention + 2 * norm), 4 * 32
    )


@pytest.fixture(scope="module")
def settings(tmp_path_factory, small_target_folder):
    """A run whose loss changes after step 3, as overrides of configs/demo.py."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"line {i}: " + "abcde" * (i % 7) + "\n"}) for i in range(60)]
    (folder / "training.jsonl").write_text("\n".join(lines))
    (folder / "held_out.jsonl").write_text(json.dumps({"text": "abcd line 77: zzz" * 4}))
    return {
        "target": str(small_target_folder),
        "exit_layer": 1,
        "adapter.kind": "kangaroo",  # the same figures at every depth of a draft
        "steps": 5,
        "batch_size": 4,
        "sequence_length": 32,
        "loss_chunk": 16,
        "loss": "total_variation",
        "cross_entropy_steps": 3,
        "draft_vocabulary": "11",
        "data.files": str(folder / "training.jsonl"),
        "data.evaluation_files": str(folder / "held_out.jsonl"),
        "data.cache": str(tmp_path_factory.mktemp("cache")),
        "optimizer.warmup_steps": 1,
        "optimizer.schedule": "constant",
        "evaluate_every": 100,
        "save_every": 1,
        "keep_checkpoints": 100,
    }


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    return output, train(configured(settings, output=str(output)))


def test_training_chooses_from_its_data_and_decoding_needs_no_flag(run, settings):
    output, _ = run
    target = load_target(settings["target"], "float32")
    adapter = load_adapter(output, target)
    counts = Counter()
    for line in pathlib.Path(settings["data.files"]).read_text().splitlines():
        counts.update(json.loads(line)["text"][1:])  # the first follows nothing
    expected = {ord(letter) for letter, _ in counts.most_common(10)} | set(target.eos_token_ids)
    assert counts.most_common(11)[9][1] > counts.most_common(11)[10][1]  # else the tenth would be chance
    assert set(adapter.model.draft_vocabulary.token_ids[...].tolist()) == expected
    head = np.asarray(target.model.lm_head[...])
    np.testing.assert_array_equal(adapter.model.draft_vocabulary.weight[...], head[sorted(expected)])


def test_held_out_figures_are_those_of_drafts_from_the_draft_vocabulary(run, settings):
    output, result = run
    config, target = configured(settings), load_target(settings["target"], "float32")
    adapter = load_adapter(output / "5", target).model
    drafted = adapter.draft_vocabulary.token_ids[...]
    _, held_out = load_rows(config.data, target, config.sequence_length, config.seed)
    acceptance = agreement = positions = 0.0
    for batch in evaluation_batches(held_out, config.batch_size, config.evaluation_windows):
        mask = segment_mask(batch["segment_ids"])
        shallow, _ = shallow_apply(target.model, batch["tokens"], batch["positions"], exit_layer=1, mask=mask)
        deep, _ = deep_apply(target.model, shallow, batch["positions"], exit_layer=1, mask=mask)
        adapted, _ = adapter_apply(adapter, shallow, batch["positions"], mask=mask)
        p, logits = (np.asarray(lm_head(target.model, hidden)) for hidden in (deep, adapted))
        p = np.exp(p) / np.exp(p).sum(-1, keepdims=True)
        q = np.zeros(p.shape)
        q[..., drafted] = np.exp(logits[..., drafted]) / np.exp(logits[..., drafted]).sum(-1, keepdims=True)
        acceptance += (np.minimum(p, q).sum(-1) * batch["loss_mask"]).sum()
        agreement += ((p.argmax(-1) == q.argmax(-1)) * batch["loss_mask"]).sum()
        positions += batch["loss_mask"].sum()
    assert result["expected_acceptance"] == pytest.approx(acceptance / positions, rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(agreement / positions, rel=1e-4)


@pytest.mark.parametrize("step", [2, 3], ids=["before the loss changes", "as it changes"])
def test_a_run_that_was_killed_goes_on_with_its_draft_vocabulary_and_loss(run, settings, tmp_path, step, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(run[0] / str(step), output / str(step))
    monkeypatch.setattr(draft_vocabulary, "choose_for_run", None)  # not chosen again
    assert train(configured(settings, output=str(output))) == run[1]
    assert_same(run[0] / "5", output / "5")


def test_the_loss_changes_after_the_steps_of_cross_entropy(run, settings, tmp_path):
    other = tmp_path / "cross_entropy"
    train(configured(settings, output=str(other), loss="cross_entropy", steps=4))
    for step in ("1", "2", "3"):
        assert_same(run[0] / step, other / step)
    path = "norm.weight"
    assert not np.array_equal(checkpoint(run[0] / "4")["adapter"][path], checkpoint(other / "4")["adapter"][path])


def test_a_run_with_another_draft_vocabulary_does_not_go_on(run, settings):
    with pytest.raises(InputError, match="expected draft_vocabulary 12, found 11"):
        train(configured(settings, output=str(run[0]), draft_vocabulary="12"))


def test_a_draft_vocabulary_that_is_too_large_is_named_before_the_data_is_read(settings, tmp_path):
    wrong = {"draft_vocabulary": "264", "output": str(tmp_path / "run"), "data.cache": str(tmp_path / "cache")}
    with pytest.raises(InputError, match="draft_vocabulary: expected less than 264, the target's vocabulary"):
        train(configured(settings | wrong))
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_size_of_the_best_predicted_speed(settings):
    config, target = configured(settings), load_target(settings["target"], "float32")
    training, held_out = load_rows(config.data, target, config.sequence_length, config.seed)
    auto = dataclasses.replace(config, draft_vocabulary="auto")
    auto = draft_vocabulary.choose_for_run(auto, target, training, held_out)
    text = json.loads(pathlib.Path(settings["data.evaluation_files"]).read_text())["text"][1:]
    speeds = {}
    for size in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256):
        fixed = dataclasses.replace(config, draft_vocabulary=size)
        of_size = draft_vocabulary.choose_for_run(fixed, target, training, held_out)
        tokens = set(of_size.token_ids.tolist())
        in_text = sum(ord(letter) in tokens for letter in text) + (target.eos_token_ids[0] in tokens)
        assert of_size.coverage == pytest.approx(in_text / (len(text) + 1))
        speeds[size] = of_size.speed
    assert len(auto.token_ids) == max(speeds, key=speeds.get)
    assert auto.speed == max(speeds.values()) > 1
