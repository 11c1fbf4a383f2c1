"""What int8 weights change, as `bench weights` measures it. Truth: log-softmax in numpy, and counts by hand."""

import re

import numpy as np
import pytest

from kangaroo_jax import load_target
from kangaroo_jax.bench.weights_quality import measure, windows
from tests.checkpoint.forward import forward

TEXT = "the quick brown fox jumps over the lazy dog, and then it rests. " * 3


@pytest.fixture(scope="module")
def target(saved):
    return load_target(saved[0], "float32")


def test_the_loss_is_that_of_each_token_after_those_before_it(target):
    text, prompts = windows(target, TEXT, 24, 5), windows(target, TEXT, 8, 2)
    logits = np.asarray(forward(target.model, text), np.float64)[:, :-1]
    logits -= logits.max(axis=-1, keepdims=True)
    chances = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    each = -np.take_along_axis(chances, text[:, 1:, None], axis=-1)[..., 0]
    found = measure(target, text, prompts, 4)
    # Passes of 4 rows at most, of which each counts the same.
    assert found.loss == pytest.approx(np.mean([each[:3].mean(), each[3:].mean()]), rel=1e-5)
    assert (found.changed, found.same) == (0.0, 2)


def test_a_token_that_is_not_the_targets_choice_counts_once(target):
    text, prompts = windows(target, TEXT, 24, 2), windows(target, TEXT, 8, 3)
    answers = measure(target, text, prompts, 5).answers
    changed = answers.copy()
    changed[1, -1] = (changed[1, -1] + 1) % target.config.vocab_size
    found = measure(target, text, prompts, 5, changed)
    assert found.changed == pytest.approx(1 / answers.size)
    assert found.same == 2


@pytest.mark.long
def test_the_command_compares_float_int8_and_int8_with_float_tables(commands, saved, target, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--dtype=float32", "--length=24", "--pieces=4", "--prompts=3", "--prompt_tokens=8", "--max_new_tokens=5"]
    code, out, err = commands.run("weights", f"--model={saved[0]}", f"--text={tmp_path}/text.txt", *words)
    assert code == 0, err
    rows = re.findall(r"^(float32\D*?(?:int8 weights)?\D*?) +(\d+) +(\d+\.\d+) +(\S+)% +(\d+) of 3$", out, re.MULTILINE)
    names = ["float32", "float32, int8 weights", "float32, int8 weights, float embedding and head"]
    assert [row[0] for row in rows] == names
    floats, int8, tables = (int(row[1]) for row in rows)
    vocabulary, hidden = target.config.vocab_size, target.config.hidden_size
    heads = 1 if target.config.tie_word_embeddings else 2
    # A table's row is an output channel: hidden int8 values and a scale of 4 bytes.
    assert tables - int8 == heads * vocabulary * (4 * hidden - hidden - 4)
    assert int8 < tables < floats
    assert rows[0][3:] == ("0.00", "3")
    losses = [float(row[2]) for row in rows]
    assert len(set(losses)) > 1
    assert max(losses) - min(losses) < 0.1
