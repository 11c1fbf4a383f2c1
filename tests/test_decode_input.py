"""decode.py --input as a user runs it: a kill and a rerun, batch 4 against batch 1, exit codes, one-line errors."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.bench.models import save_model
from tests.decode_commands import decode_in_one_process

ROOT = pathlib.Path(__file__).parents[1]
COUNT = 16
PROMPTS = [{"id": i, "prompt": f"{i}: class Stack{i}", "max_new_tokens": 60 + 7 * i % 60} for i in range(COUNT)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model, an adapter and prompts, and a cache of compiled programs."""
    folder = tmp_path_factory.mktemp("work")
    save_model(folder)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return folder


def environment(work):
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def flags(work, output, *more):
    return [
        f"--model={work}/model",
        f"--adapter={work}/adapter",
        f"--input={work}/prompts.jsonl",
        f"--output={work}/{output}",
        "--max_draft_len=2",
        *more,
    ]


def read(path):
    """id -> record; every id once."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {record["id"]: record for record in records}
    assert len(by_id) == len(records)
    return by_id


def flags_of_tuned(work, output, *more):
    """An adapter with a tree in its decode.json, on two prompts."""
    return [*flags(work, output, "--batch_size=1", *more), f"--adapter={work}/tuned", f"--input={work}/two.jsonl"]


def write_broken_model(work):
    """The model with NaN for the embedding of "~", which no prompt but one has."""
    shutil.copytree(work / "model", work / "broken")
    weights = load_file(work / "model" / "model.safetensors")
    token = json.loads((work / "model" / "tokenizer.json").read_text())["model"]["vocab"]["~"]
    weights["model.embed_tokens.weight"][token] = np.nan
    save_file(weights, work / "broken" / "model.safetensors", metadata={"format": "pt"})


TUNED = {"max_draft_len": 3, "threshold": 0.125, "tree_topk": 2, "tree_budget": 6}
BAD_LINE = '{"id": "x", "prompt": 7}'
MISTAKES = [
    (["--input={input}"], "--output is missing"),
    (["--output=x"], "--output, --batch_size and --data_parallel belong to --input"),
    (["--batch_size=2", "--prompt=x"], "--output, --batch_size and --data_parallel belong to --input"),
    (["--input={input}", "--output={folder}/o", "--prompt=x"], "--prompt and --input do not go together"),
    (["--input={input}", "--output={folder}/o", "--prompt="], "--prompt and --input do not go together"),
    (["--input={input}", "--output={folder}/o", "--prompt_file=x"], "--prompt_file and --input do not go"),
    (["--input={input}", "--output={folder}/o", "--compare"], "--compare and --input do not go together"),
    (["--input={input}", "--output={folder}/o", "--profile=p"], "--profile and --input do not go together"),
    (["--input={input}", "--output={folder}/o", "--batch_size=0"], "--batch_size must be at least 1, found 0"),
    (["--input={input}", "--output={folder}/o", "--temperature=-1"], "temperature must be"),
    (["--input={input}", "--output={folder}/o", "--top_k=3"], "without a --temperature above 0"),
    (["--input={input}", "--output={folder}/o", "--max_new_tokens=0"], "max_new_tokens must be at least 1, found 0"),
    (["--input=/no/such", "--output={folder}/o"], "--input=/no/such: No such file or directory"),
    (["--input={folder}", "--output={folder}/o"], "Is a directory"),
    (["--input={input}", "--output={folder}/no/o"], "there is no folder"),
    (["--input={input}", "--output={folder}"], "is a folder; give a file"),
    (["--input={input}", "--output={input}"], "is the --input too"),
    (["--input={input}", "--output={folder}/o", "--model=/no/such", "--adapter=x"], "/no/such: no such folder"),
]


def broken_flags(work):
    return [f"--model={work}/broken", f"--adapter={work}/adapter"]


@pytest.fixture(scope="module")
def results(work):
    """One process does the mistakes, then a whole run at batch 4, one at batch 1, and one with bad lines, twice."""
    lines = [[word.format(folder=work, input=work / "prompts.jsonl") for word in words] for words, _ in MISTAKES]
    good = PROMPTS[:2]
    mixed = [
        json.dumps(good[0]),
        BAD_LINE,
        json.dumps({"id": "e", "prompt": ""}),
        json.dumps(good[1]),
        json.dumps(good[0]),
    ]
    (work / "mixed.jsonl").write_text("\n".join(mixed))
    (work / "bad.jsonl").write_text(BAD_LINE)
    (work / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in good))
    lines += [
        flags(work, "batch4.jsonl", "--batch_size=4"),
        flags(work, "batch1.jsonl", "--batch_size=1", "--json"),
        *[[*flags(work, "mixed-answers.jsonl", "--batch_size=1"), f"--input={work}/mixed.jsonl"] for _ in range(2)],
        [*flags(work, "none.jsonl"), f"--input={work}/bad.jsonl"],
        flags(work, "batch4.jsonl", "--max_new_tokens=100"),
    ]
    return decode_in_one_process(lines, environment(work))


@pytest.fixture(scope="module")
def more_results(results, work):
    """Another process does what takes longer to compile: trees, logits that are no numbers, samples of batches."""
    write_broken_model(work)
    broken = [{"id": "bad", "prompt": "a~b"}, *PROMPTS[:2]]
    (work / "broken.jsonl").write_text("".join(json.dumps(line) + "\n" for line in broken))
    shutil.copytree(work / "adapter", work / "tuned")
    (work / "tuned" / "decode.json").write_text(json.dumps(TUNED))
    lines = [
        flags_of_tuned(work, "tree.jsonl"),
        flags_of_tuned(work, "tree.jsonl", "--notree"),
        flags_of_tuned(work, "no-tree.jsonl", "--notree"),
        [*flags(work, "broken-answers.jsonl"), *broken_flags(work), f"--input={work}/broken.jsonl"],
        ["--prompt=a~b", *broken_flags(work), "--max_draft_len=2"],
        ["--prompt=a~b", *broken_flags(work), "--max_draft_len=2", "--compare", "--show_drafts"],
        flags(work, "sampled4.jsonl", "--temperature=0.9", "--top_p=0.95", "--seed=3", "--stop=ab", "--batch_size=4"),
        flags(work, "sampled1.jsonl", "--temperature=0.9", "--top_p=0.95", "--seed=3", "--stop=ab", "--batch_size=1"),
    ]
    return decode_in_one_process(lines, environment(work))


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(results, work, i):
    code, out, error = results[i]
    assert code == 2, error
    assert error.startswith("decode.py: error: ")
    assert MISTAKES[i][1] in error
    assert error.count("\n") == 1
    assert out == ""
    assert not (work / "o").exists()
    assert not (work / "o.settings.json").exists()


def test_batch_4_equals_batch_1(results, work):
    (four, out, _), (one, as_json, _) = results[len(MISTAKES) :][:2]
    assert (four, one) == (0, 0)
    assert out.startswith(f"{COUNT} prompts answered, 0 were before, 0 could not be; ")
    assert read(work / "batch4.jsonl") == read(work / "batch1.jsonl")
    assert set(read(work / "batch4.jsonl")) == set(range(COUNT))
    last = json.loads(as_json.splitlines()[-1])
    assert (last["prompts"], last["errors"], last["bad_lines"]) == (COUNT, 0, 0)
    assert last["new_tokens"] == sum(record["new_tokens"] for record in read(work / "batch1.jsonl").values())


@pytest.mark.long
def test_samples_do_not_depend_on_the_batch_size(more_results, work):
    assert [code for code, _, _ in more_results[-2:]] == [0, 0]
    sampled = read(work / "sampled4.jsonl")
    assert sampled == read(work / "sampled1.jsonl")
    greedy = read(work / "batch4.jsonl")
    assert sum(sampled[i]["text"] != greedy[i]["text"] for i in sampled) > COUNT // 2


def test_bad_lines_are_listed_and_the_rest_answered(results, work):
    runs = results[len(MISTAKES) + 2 :][:2]
    for (code, out, error), counts in zip(
        runs, ("2 prompts answered, 0 were", "0 prompts answered, 2 were"), strict=True
    ):
        assert code == 1
        assert out.startswith(counts)
        assert error.splitlines() == [
            f'decode.py: {work}/mixed.jsonl line 2: "prompt" must be a text, found 7',
            f"decode.py: {work}/mixed.jsonl line 5: the id 0 is line 1's; give each line its own",
            f"{work}/mixed.jsonl id 'e': the prompt is empty; give at least one token",
        ]
    records = read(work / "mixed-answers.jsonl")
    assert set(records) == {0, 1, "e"}
    assert "error" in records["e"]
    assert records[1] == read(work / "batch1.jsonl")[1]


def test_a_file_of_bad_lines_alone_and_other_settings(results, work):
    (code, _, error), (refused, _, why) = results[len(MISTAKES) + 4 :][:2]
    assert code == 1
    assert error.count("\n") == 1
    assert "bad.jsonl line 1" in error
    assert not (work / "none.jsonl").exists()
    assert refused == 2
    assert "made with max_new_tokens 128, not 100" in why


@pytest.mark.long
def test_logits_that_are_not_numbers_are_one_line_and_exit_code_1(more_results, work):
    why = "the model's logits are not numbers in float32 at token 1 of the answer; the weights may be damaged"
    (code, out, error), *single = more_results[3:6]
    assert (code, error) == (1, f"{work}/broken.jsonl id 'bad': {why}\n")
    assert out.startswith("2 prompts answered, 0 were before, 1 could not be; ")
    answers, expected = read(work / "broken-answers.jsonl"), read(work / "batch1.jsonl")
    assert answers.pop("bad") == {"id": "bad", "error": why}
    assert {i: answer["text"] for i, answer in answers.items()} == {i: expected[i]["text"] for i in (0, 1)}
    for code, out, error in single:
        assert (code, out, error) == (1, "", f"decode.py: error: {why}\n")


@pytest.mark.long
def test_a_tuned_tree_is_drafted_unless_a_flag_says_otherwise(more_results, work):
    (tree, _, _), (refused, _, why), (without, _, _) = more_results[:3]
    assert (tree, refused, without) == (0, 2, 0)
    made = [json.loads((work / f"{name}.jsonl.settings.json").read_text()) for name in ("tree", "no-tree")]
    assert [settings["tree"] for settings in made] == [{"topk": 2, "budget": 6}, None]
    assert [settings["threshold"] for settings in made] == [0.125, 0.6]
    assert [settings["max_draft_len"] for settings in made] == [2, 2]  # the flag's
    assert "made with " in why
    answers, others, plain = (read(work / f"{name}.jsonl") for name in ("tree", "no-tree", "batch1"))
    assert [answers[i]["text"] for i in (0, 1)] == [others[i]["text"] for i in (0, 1)]
    assert [answers[i]["text"] for i in (0, 1)] == [plain[i]["text"] for i in (0, 1)]
    assert [answers[i]["accept_lengths"] for i in (0, 1)] != [others[i]["accept_lengths"] for i in (0, 1)]


def test_plain_decoding_answers_a_file_with_the_same_texts(results, work):
    words = [f"--model={work}/model", f"--input={work}/two.jsonl", f"--output={work}/plain.jsonl"]
    command = [sys.executable, "decode.py", "--plain", "--batch_size=1", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment(work), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers, drafted = read(work / "plain.jsonl"), read(work / "batch1.jsonl")
    assert {i: answers[i]["text"] for i in (0, 1)} == {i: drafted[i]["text"] for i in (0, 1)}
    assert {length for answer in answers.values() for length in answer["accept_lengths"]} == {1}


@pytest.mark.long
def test_a_run_that_is_killed_is_finished_by_the_next(results, work):
    expected = read(work / "batch1.jsonl")
    output = work / "killed.jsonl"
    command = [sys.executable, "decode.py", *flags(work, "killed.jsonl", "--batch_size=1")]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment(work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    left = output.read_bytes().count(b"\n")
    assert 3 <= left < len(PROMPTS)
    done = subprocess.run(command, cwd=ROOT, env=environment(work), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{len(PROMPTS) - left} prompts answered, {left} were before, 0 could not be")
    assert read(output) == expected


@pytest.mark.long
def test_all_devices_that_divide_the_batch_take_prompts(results, work):
    command = [sys.executable, "decode.py", *flags(work, "spread.jsonl", "--batch_size=6")]
    variables = environment(work) | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {os.environ['XLA_FLAGS']}",
    }
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "note: the prompts are spread over 3 of 4 devices (--data_parallel)\n" in done.stderr
    assert read(work / "spread.jsonl") == read(work / "batch1.jsonl")
