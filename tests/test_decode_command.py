"""decode.py as a user runs it: exit codes, one-line errors, the shape of its output."""

import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.decode_commands import decode_in_one_process

ROOT = pathlib.Path(__file__).parents[1]
AS_USERS = os.environ | {"XLA_FLAGS": ""}  # tests compile with less optimization


def decode(*flags, **kwargs):
    kwargs.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run([sys.executable, "decode.py", *flags], cwd=ROOT, capture_output=True, timeout=300, **kwargs)


def last_line(out):
    return json.loads(out.splitlines()[-1])


def test_compare_prints_text_table_and_json(results):
    code, out, error = results[0]
    assert code == 0, error
    assert out.startswith("import os\n")
    for row in (
        "new tokens",
        "seconds",
        "tokens per second",
        "mean accept length",
        "rounds",
        "draft steps",
        "speed-up",
    ):
        assert row in out
    result = json.loads(out.splitlines()[-1])
    assert set(result) == {
        *(
            "new_tokens",
            "seconds",
            "tokens_per_second",
            "mean_accept_length",
            "rounds",
            "lookup_rounds",
            "plain_rounds",
            "draft_steps",
            "text",
        ),
        *("plain_tokens_per_second", "speedup", "identical"),
    }
    assert result["identical"] is True
    assert result["new_tokens"] == 24
    assert result["text"] in out
    assert abs(result["tokens_per_second"] - 24 / result["seconds"]) < 0.01 * result["tokens_per_second"]
    assert abs(result["mean_accept_length"] - 23 / result["rounds"]) < 1e-3


@pytest.mark.long
def test_compare_of_samples_does_not_speak_of_identical_tokens():
    flags = ("--compare", "--json", "--max_new_tokens=24", "--prompt=import os\n", "--temperature=0.8", "--top_p=0.95")
    done = decode(*flags, "--seed=3", "--max_draft_len=1")  # one width to compile
    assert done.returncode == 0, done.stderr.decode()
    out = done.stdout.decode()
    *shown, last = out.splitlines()
    assert "identical" not in "".join(shown)
    assert "the texts are not expected to be the same" in out
    result = json.loads(last)
    assert result["identical"] is None
    assert result["sampling"] == {"temperature": 0.8, "top_p": 0.95, "top_k": 0, "seed": 3}
    assert result["text"] in out


@pytest.mark.long
def test_prompt_from_standard_input_equals_prompt_flag(results):
    piped = decode(*SHORT, input=b"class Stack:\n", stdin=None)
    assert last_line(piped.stdout.decode())["text"] == last_line(results[1][1])["text"]


def test_plain_decoding_gives_the_same_text_without_drafts(results):
    code, out, error = results[2]
    assert code == 0, error
    shown, result = out.splitlines()[:-1], last_line(out)
    assert result["text"] == last_line(results[1][1])["text"]
    assert (result["draft_steps"], result["mean_accept_length"]) == (0, 1.0)
    assert any(line.split() == ["plain"] for line in shown)
    assert "Kangaroo" not in "".join(shown)


@pytest.mark.long
def test_int8_weights_are_said_and_counted():
    lines = [
        ["--weights=int8", "--compare", "--json", "--max_new_tokens=24", "--prompt=import os\n", "--max_draft_len=2"],
        ["--preflight=local", "--context=16", "--max_new_tokens=8"],
        ["--preflight=local", "--context=16", "--max_new_tokens=8", "--weights=int8"],
    ]
    (compared, out, note), *preflights = decode_in_one_process(lines, dict(os.environ))
    assert compared == 0, note
    assert "(int8 weights): the output is that of plain decoding with these, not with the checkpoint's own" in note
    assert json.loads(out.splitlines()[-1])["identical"] is True
    assert [code for code, _, _ in preflights] == [0, 0]
    floats, int8 = (float(re.search(r"arguments, per device +(\S+) ", out)[1]) for _, out, _ in preflights)
    assert int8 < 0.6 * floats  # with caches, and a scale for each row
    assert "float32, int8 weights" in preflights[1][1]


@pytest.mark.long
def test_look_ups_are_shown_and_counted():
    prompt = "--prompt=class Stack:\n    def push(self, item):\n        self.items.append(item)\n"
    flags = ("--lookup_tokens=8", "--max_draft_len=2", "--show_drafts", "--json", "--compare", "--max_new_tokens=64")
    done = decode(*flags, prompt, env=AS_USERS)
    assert done.returncode == 0, done.stderr.decode()
    *shown, last = done.stdout.decode().splitlines()
    result = json.loads(last)
    assert result["identical"] is True
    assert 0 < result["lookup_rounds"] < result["rounds"]
    assert result["draft_steps"] > 0
    assert any(line.startswith("lookup rounds") for line in shown)
    assert "{=looked up and accepted=}" in "".join(shown)
    assert "".join(shown).count("{=") > 1


@pytest.mark.long
def test_profile_holds_the_named_scopes(tmp_path):
    done = decode(f"--profile={tmp_path}", "--max_new_tokens=8", "--max_draft_len=1", "--prompt=class Stack:\n")
    assert done.returncode == 0, done.stderr.decode()
    (trace,) = tmp_path.rglob("perfetto_trace.json.gz")
    assert str(trace) in done.stdout.decode()
    assert gzip.decompress(trace.read_bytes()).count(b'"ph"') > 100
    (xplane,) = tmp_path.rglob("*.xplane.pb")
    for scope in (b"draft/", b"verify/", b"commit/", b"shallow/", b"adapter/", b"head/", b"deep/"):
        assert scope in xplane.read_bytes(), scope


SHORT = ("--max_new_tokens=8", "--max_draft_len=1", "--json")
RUNS = [
    ("--compare", "--json", "--max_new_tokens=24", "--prompt=import os\n", "--max_draft_len=2"),
    (*SHORT, "--prompt=class Stack:\n"),
    ("--plain", "--max_new_tokens=8", "--json", "--prompt=class Stack:\n"),
]
MISTAKES = [
    (["--profile=/dev/null/x", "--prompt=x"], "profile /dev/null/x: cannot be made a folder"),
    (["--model=/no/such/folder", "--adapter=x", "--prompt=x"], "/no/such/folder: no such folder"),
    (["--model={target}", "--prompt=x"], "--adapter is missing, and none comes with the package for"),
    (["--model={target}", "--prompt=x"], "python train.py --config="),
    (["--model={target}", "--prompt=x"], "or decode without one: --plain"),
    (["--prompt="], "the prompt is empty"),
    (["--prompt_file=/no/such/file"], "/no/such/file: No such file"),
    (["--prompt_file={latin1}"], "not UTF-8"),
    (["--prompt=x", "--prompt_file=y"], "give one"),
    (["--exit_layer=3"], "but exit_layer=3 was given"),
    (["--exit_layer=0"], "exit_layer must be"),
    (["--max_draft_len=0"], "max_draft_len must be"),
    (["--threshold=1.5"], "threshold must be"),
    (["--temperature=-1"], "temperature must be"),
    (["--temperature=1", "--top_p=0"], "top_p must be"),
    (["--temperature=1", "--top_k=-1"], "top_k must be"),
    (["--temperature=1", "--seed=-1"], "seed must be"),
    (["--top_p=0.9"], "without a --temperature above 0"),
    (["--max_new_tokens=0"], "--max_new_tokens must be at least 1, found 0"),
    (["--prompt_file={long}"], "but the context is 1024"),
    (["--adapter=/no/such/adapter"], "/no/such/adapter"),
    (["a prompt without its flag"], "unexpected argument 'a prompt without its flag'"),
    (["--max_new_tokens=many"], "--max_new_tokens=many"),
    (["--dtype=int8"], "--dtype=int8"),
    (["--plain", "--compare"], "--compare and --plain do not go together"),
    (["--plain", "--adapter=x"], "--adapter and --plain do not go together"),
    (["--plain", "--threshold=0"], "--threshold and --plain do not go together"),
    (["--plain", "--lookup_tokens=5"], "--lookup_tokens and --plain do not go together"),
    (["--tree", "--lookup_tokens=5"], "trees and look-ups exclude each other; leave one out"),
    (["--lookup_tokens=2000"], "lookup_tokens must be less than the target's context (1024), found 2000"),
    (["--plain", "--notree"], "--tree and --plain do not go together"),
    (
        ["--preflight=h100", "--adapter=x"],
        "--adapter changes nothing with --preflight, which compiles for the model's shape",
    ),
    (["--preflight=h100", "--seed=0"], "--seed changes nothing with --preflight"),
    (["--chat", "--prompt=x"], "--prompt and --chat do not go together"),
    (["--chat", "--raw"], "--raw and --chat do not go together"),
    (["--chat", "--compare"], "--compare and --chat do not go together"),
    (["--chat", "--json"], "--json and --chat do not go together"),
    (["--chat", "--html=x"], "--html and --chat do not go together"),
    (["--chat", "--input=x", "--output=y"], "--chat and --input do not go together"),
    (["--chat", "--messages=-"], "--chat and --messages=- both read standard input; give the messages in a file"),
    (["--prompt=x", "--long_context"], "long_context changes nothing for this llama, whose context is 1024; leave it"),
    (["--prompt=x", "--stop="], "--stop must not be empty"),
    (["--messages=x", "--prompt=y"], "--prompt and --messages do not go together"),
    (["--messages=x", "--raw"], "--raw and --messages do not go together"),
    (["--show_drafts", "--plain"], "--show_drafts and --plain do not go together"),
    (["--html=x", "--plain"], "--html and --plain do not go together"),
    (["--show_drafts", "--input=x", "--output=y"], "--show_drafts and --input do not go together"),
    (["--messages=/no/such/file"], "/no/such/file: No such file"),
    (["--messages={latin1}"], "not UTF-8"),
    (["--messages={long}"], "not JSON"),
    (["--messages={object}"], "expected a list like"),
    (["--messages={robot}"], "message 0 is of the unknown role 'robot'"),
    (["--messages={system}"], 'messages have no turn of "user"'),
    (["--messages={user}"], "its tokenizer has no chat template"),
    (["--chat"], "its tokenizer has no chat template"),
    (["--html=/no/such/folder/x.html"], "cannot be written (No such file or directory)"),
    (["--html={folder}"], "is a folder; give a file"),
    (["--no_such_flag=1"], "no_such_flag"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompt")
    (folder / "latin1").write_bytes("café".encode("latin-1"))
    (folder / "long").write_text("x = 1; " * 400)
    (folder / "object").write_text('{"messages": []}')
    for role in ("robot", "system", "user"):
        (folder / role).write_text(json.dumps([{"role": role, "content": "a"}]))
    files = {"folder": folder, "target": ROOT / "tests/fixtures/golden/tiny-gqa"} | {
        path.name: path for path in folder.iterdir()
    }
    commands = [[flag.format_map(files) for flag in flags] for flags, _ in MISTAKES]
    return decode_in_one_process([*RUNS, *commands], dict(os.environ))


@pytest.mark.parametrize("index", range(len(MISTAKES)), ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_bad_input_is_one_line_and_exit_code_2(results, index):
    code, out, error = results[len(RUNS) + index]
    assert code == 2
    assert error.startswith("decode.py: error: ")
    assert MISTAKES[index][1] in error
    assert error.count("\n") == 1
    assert out == ""
