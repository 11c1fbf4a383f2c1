"""The bench commands as a user runs them: what they print, and one line for what is wrong."""

import json
import re

import pytest

from kangaroo_jax import DraftConfig, LookupConfig
from kangaroo_jax.checkpoint.adapter import write_draft_settings
from kangaroo_jax.config import ServeConfig
from tests.serve.servers import MODEL, serving

MISTAKES = [
    ([], "bench: error: expected a command, found ''"),
    (["rooflin"], "bench: error: expected a command, found 'rooflin'"),
    (["roofline", "--shape=llama9b"], "llama7b"),
    (["roofline", "--contexts=many"], "--contexts: expected whole numbers above 0, found 'many'"),
    (["roofline", "--max_draft_len=0"], "--max_draft_len: expected at least 1, found 0"),
    (["roofline", "--model={model}"], "--adapter is missing, and none comes with the package for"),
    (["roofline", "--shape=llama13b", "--dtype=float32"], "but the device holds"),
    (["roofline", "--shape=llama7b", "--exit_layer=32"], "exit_layer: expected 1 to 31"),
    (["roofline", "--tree_budget=16,0"], "--tree_budget: expected whole numbers above 0, found '16,0'"),
    (["roofline", "--tree_topk=0"], "--tree_topk: expected whole numbers above 0, found '0'"),
    (
        ["roofline", "--model={model}", "--adapter={adapter}", "--tree_budget=5"],
        "tree_budget must be at least max_draft_len (6)",
    ),
    (["tune", "--tree_topk=2,x"], "--tree_topk: expected whole numbers above 0, found '2,x'"),
    (["tune", "--model={model}", "--adapter={adapter}", "--tree_topk=100000"], "tree_topk must be at most the"),
    (["tune", "--prompts=/no/such/file"], "/no/such/file: cannot be read"),
    (["tune", "--prompts={bad}"], "bad.jsonl:2: expected an object with a text"),
    (["tune", "--adapter=/no/such/folder"], "/no/such/folder: no such adapter checkpoint"),
    (["tune", "--machine=h100", "--weights=int8"], "--machine predicts costs of float weights alone; leave --weights"),
    (["tune", "--machine=v9"], "preflight v9: expected local, GPUs (h100, h200, a100-80, b200;"),
    (["tune", "--machine=local"], "--machine=local: what rounds cost on this machine is measured; leave the flag out"),
    (["fit", "--machines=v5e:1x1"], "expected --model and --machines, such as"),
    (["fit", "--model=llama7b", "--machines=h100", "--prompt_tokens=9,80000"], "--prompt_tokens: 80000 and 128 new"),
    (["fit", "--model=llama7b", "--machines=v9:1"], "preflight v9:1: expected local, GPUs"),
    (["fit", "--model=llama7b", "--machines=local"], "--machines: what this machine is like is not known beforehand"),
    (["fit", "--model=llama7b", "--machines=h100", "--accept_lengths=9"], "--accept_lengths: expected 1 to 7"),
    (["tree", "--threshold=low"], "--threshold: expected numbers separated by commas, found 'low'"),
    (["tree", "--topk=2"], "Unknown command line flag 'topk'"),
    (["adapters", "--prompts=0"], "--prompts: expected at least 1, found 0"),
    (["adapters", "--model={model}"], "--adapter is missing, and none comes with the package for"),
    (["batch", "--batch_sizes=1,x"], "--batch_sizes: expected whole numbers above 0, found '1,x'"),
    (["batch", "--requests=-1"], "--requests: expected at least 0, found -1"),
    (["batch", "--shortest=5", "--longest=4"], "--longest: expected at least --shortest (5), found 4"),
    (["batch", "--threshold=2"], "threshold must be between 0 and 1"),
    (["serve", "--clients=0"], "--clients: expected whole numbers above 0, found '0'"),
    (["serve", "--shortest=5", "--longest=4"], "--longest: expected at least --shortest (5), found 4"),
    (["serve", "--beside=localhost:8001"], "expected an address such as http://127.0.0.1:8001, found 'localhost:8001'"),
    (["load"], "--model is missing"),
    (["peers", "--model=/no/such/folder", "--adapter=x"], "no such folder"),
]


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=[" ".join(words) or "none" for words, _ in MISTAKES])
def test_mistakes_are_one_line_and_exit_code_2(commands, saved, tmp_path, i):
    words, message = MISTAKES[i]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"prompt": "x"}) + "\n" + json.dumps({"text": "x"}) + "\n")
    code, _, err = commands.run(*(word.format(bad=bad, model=saved[0], adapter=saved[1]) for word in words))
    if "peers" in words and "torch is not installed" in err:
        pytest.skip("torch is not installed")
    assert code == 2, err
    assert message in err
    assert err.count("\n") == 1


def test_only_commands_define_flags(commands):
    assert commands.flags_of_library == []


def test_help_shows_the_flags_of_the_command_and_how_to_use_it(commands):
    code, out, err = commands.run("tree", "--help")
    assert code == 1  # absl's, for --help
    assert err == ""
    assert "python -m kangaroo_jax.bench tree --model=" in out
    shown = set(re.findall(r"^  --(?:\[no\])?(\w+)", out, re.MULTILINE))
    assert shown == {
        *("model", "adapter", "prompts", "dtype", "max_new_tokens", "max_draft_len"),
        *("tree_topk", "tree_budget", "threshold", "runs", "profile"),
    }


@pytest.fixture(scope="module")
def flags(saved):
    """The flags that name a model whose tokens are characters."""
    model, adapter = saved
    return [f"--model={model}", f"--adapter={adapter}"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def one(", "class Two:")))
    return f"--prompts={path}"


ROOFLINE = ["--contexts=16", "--max_draft_len=2", "--widths=3", "--tree_topk=2", "--tree_budget=4"]
PARTS = (
    *("plain step", "shallow pass", "draft step", "verification of 3", "prefill of 16"),
    *("tree level of 2", "verification of tree 4"),
)


def part_rows(out):
    return {name: line[24:].split() for name in PARTS for line in out.splitlines() if line[:24].strip() == name}


def test_roofline_adds_up_the_parts(commands, flags):
    """With the times of command_runner.py: a round of 2 drafts is 2 draft steps, a shallow pass and a verification."""
    code, out, err = commands.run("roofline", *flags, *ROOFLINE, "--batch_sizes=1,4", "fake:times")
    assert code == 0, err
    rows = part_rows(out)
    seconds = {"plain step": 8, "shallow pass": 1, "draft step": 2, "verification of 3": 9, "prefill of 16": 4}
    seconds |= {"tree level of 2": 3, "verification of tree 4": 12}
    assert {name: row[0] for name, row in rows.items()} == {name: f"{value:.3f}" for name, value in seconds.items()}
    assert {name: row[1] for name, row in rows.items()} == {name: f"{value / 8:.3f}" for name, value in seconds.items()}
    for ours, theirs in (("tree level of 2", "draft step"), ("verification of tree 4", "verification of 3")):
        assert rows[ours][2:4] == rows[theirs][2:4]  # the same bytes
    # By the limits of command_runner.py, what has one row reads for longer than it multiplies.
    for name in ("plain step", "shallow pass", "draft step"):
        predicted = float(rows[name][2])  # MB at 1 GB/s
        assert float(rows[name][-2]) == pytest.approx(predicted, abs=0.06)
        assert rows[name][-1] == f"{float(rows[name][-2]) / seconds[name] - 1:.0%}"
    megabytes, rate = float(rows["plain step"][2]), float(rows["plain step"][4])
    assert rate == pytest.approx(megabytes / 8, abs=0.06)
    assert "a round of 2 drafts costs 1.75 plain steps" in out
    names = ("mean accept length", "2 drafts in each round", "drafts up to a rejected")
    speedups = [line[24:].split() for name in names for line in out.splitlines() if line.startswith(name)]
    assert speedups == [
        ["1.0", "1.5", "2.0", "2.5", "3.0"],
        ["0.57", "0.86", "1.14", "1.43", "1.71"],
        ["0.67", "0.92", "1.14", "1.43", "1.71"],
    ]
    rounds = [line.split() for line in out.splitlines() if re.match(r"of \d (drafts|levels)", line)]
    predicted = {name: float(row[-2]) for name, row in rows.items() if name != "prefill of 16"}
    sums = {
        2: 2 * predicted["draft step"] + predicted["shallow pass"] + predicted["verification of 3"],
        # A tree's first level drafts on from one token, and its shallow pass is over all four, which takes longer.
        4: predicted["draft step"] + predicted["tree level of 2"] + predicted["verification of tree 4"],
    }
    assert float(rounds[1][6]) == pytest.approx(sums[2], abs=0.003)
    assert float(rounds[2][5]) > sums[4] + predicted["shallow pass"]
    assert [[*row[:6], row[7]] for row in rounds[:2]] == [
        ["of", "1", "drafts", "21.000", "12.000", "75%", f"{float(rounds[0][6]) / 21 - 1:.0%}"],
        ["of", "2", "drafts", "22.000", "14.000", "57%", f"{float(rounds[1][6]) / 22 - 1:.0%}"],
    ]
    assert [*rounds[2][:5], *rounds[2][6:]] == [
        *("of", "2", "levels,", "4", "22.000", f"{float(rounds[2][5]) / 22 - 1:.0%}", "2.75", "plain", "steps")
    ]
    growth = [line.split() for line in out.splitlines()[-2:]]
    assert [(row[0], row[1], row[2], row[4], row[-1]) for row in growth] == [
        ("1", "16", "8.000", "8.000", "2.75"),
        ("4", "16", "8.000", "2.000", "2.75"),
    ]


@pytest.mark.long
def test_roofline_measures_every_part(commands, flags):
    code, out, err = commands.run("roofline", *flags, *ROOFLINE, "--draft_vocabulary=20")
    assert code == 0, err
    assert set(part_rows(out)) == set(PARTS)
    assert re.search(r"^with 20 tokens +\S+", out, re.MULTILINE)
    assert re.search(r"^of 2 levels, 4 +\S+ +\S+ +\S+% +\S+ plain steps$", out, re.MULTILINE)


@pytest.mark.long
def test_fit_names_the_first_machine_with_room_and_what_bounds_a_plain_step(commands, saved):
    """At 1 MB and 4 Mflop per second."""
    words = ["--exit_layer=1", "--max_draft_len=2", "--dtype=float32", "--max_new_tokens=8", "--accept_lengths=2"]
    words += [f"--model={saved[0]}", "--batch_sizes=1,4,400", "--prompt_tokens=16", "--machines=100,400,4000"]
    code, out, err = commands.run("fit", *words, "fake:machines")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[2:]]
    layer, head, cache = 32 * 64 + 32 * 32 + 3 * 32 * 48 + 2 * 32, 100 * 32, 2 * 2 * 8 * 128
    weights = 4 * (2 * layer + head)
    assert [row[:3] for row in rows] == [["1", "16", "400"], ["4", "16", "4000"], ["400", "16", "does"]]
    for row, batch in zip(rows[:2], (1, 4), strict=True):
        read = weights + 4 * batch * 2 * cache
        assert row[5] == f"{read / 1e3:.2f}"
        assert row[6:9] == [f"{weights / read:.0%}", f"{1 - weights / read:.0%}", "0%"]
        assert row[9] == ("reading" if batch == 1 else "multiplying")  # 4 rows of 3 tokens
    assert rows[2][3:] == ["not", "fit"]


def test_load_counts_the_bytes_of_the_checkpoint(commands, saved):
    model, _ = saved
    code, out, err = commands.run("load", f"--model={model}", "--dtype=float32", "--num_processes=1")
    assert code == 0, err
    numbers = re.search(r"read (\S+) MB in \S+ s; its devices hold (\S+) MB of (\S+) MB", out)
    stored = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert float(numbers[1]) == pytest.approx(stored / 1e6, abs=0.06)
    assert numbers[2] == numbers[3]


SHORT = ["--max_new_tokens=8", "--runs=1"]


TREES = ["--tree_topk=2", "--tree_budget=4", "--threshold=0.1,0.3", "--max_draft_len=2"]


def test_tree_compares_every_setting_with_plain_decoding(commands, flags, prompts):
    """With the outputs of command_runner.py: two rounds of 4 tokens in 0.4 s, of a tree 0.2 s, plain decoding 0.8 s."""
    code, out, err = commands.run("tree", *flags, prompts, *SHORT, *TREES, "fake:decoding")
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if re.match("single|tree", line)]
    single = ["4.00", "0%", "2.00", "200.00", "1.00", "2.00", "2", "of", "2"]
    tree = ["4.00", "0%", "2.00", "100.00", "2.00", "4.00", "2", "of", "2"]
    assert rows == [
        ["single", "0.60", *single],
        ["single", "0.10", *single],
        ["single", "0.30", *single],
        ["tree", "2", "4", "0.10", *tree],
        ["tree", "2", "4", "0.30", *tree],
    ]


@pytest.mark.long
def test_tree_decodes_with_every_setting(commands, flags, prompts):
    code, out, err = commands.run("tree", *flags, prompts, *SHORT, *TREES)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if re.match("single|tree", line)]
    assert [row[0] for row in rows] == ["single"] * 3 + ["tree"] * 2
    assert [row[-3:] for row in rows] == [["2", "of", "2"]] * 5  # identical to plain decoding


@pytest.mark.long
def test_serve_prints_a_row_per_number_of_clients(commands, flags):
    sizes = ["--clients=1,3", "--max_batch=2", "--requests=5", "--shortest=2", "--longest=6", "--runs=1"]
    code, out, err = commands.run("serve", *flags, *sizes)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines()[-2:]]
    assert [(row[0], row[1], row[-3:]) for row in rows] == [("1", "1", ["5", "of", "5"]), ("3", "2", ["5", "of", "5"])]


@pytest.mark.long
def test_serve_measures_another_server_beside_it(commands, flags):
    sizes = ["--clients=3", "--max_batch=2", "--requests=5", "--shortest=2", "--longest=6", "--runs=1"]
    with serving(ServeConfig(queue_size=3)) as other:
        code, out, err = commands.run("serve", *flags, *sizes, f"--beside={other.url}", f"--beside_model={MODEL}")
        assert code == 0, err
        assert other.metric("kangaroo_completion_tokens_total") >= 5 * 2
        *_, speed, first, identical = out.splitlines()[-1].split()
        assert float(speed) > 0 and float(first) > 0 and identical == "5"
        code, out, err = commands.run("serve", *flags, *sizes, f"--beside={other.url}", "--beside_model=unknown")
    assert code == 1
    assert err.splitlines()[-1].endswith("did not answer a request (status 404)")


@pytest.mark.parametrize(
    "fakes",
    [
        ["fake:times", "fake:decoding"],
        pytest.param(["fake:times"], marks=pytest.mark.long),
        pytest.param(["fake:times", "fake:decoding", "--weights=int8"], marks=pytest.mark.long),
    ],
)
def test_tune_writes_the_fastest_setting(commands, flags, saved, prompts, fakes):
    shapes = ["--tree_topk=2", "--tree_budget=8", "--confirm=1"]
    code, out, err = commands.run("tune", *flags, prompts, *SHORT, *shapes, *fakes)
    assert code == 0, err
    path = saved[1] / "decode.json"
    assert f"wrote {path}" in out
    written = json.loads(path.read_text())
    path.unlink()
    rows = [line.split() for line in out.splitlines() if re.match("single|tree", line)]
    assert [row[0] for row in rows] == ["single", "tree"]
    if "fake:decoding" in fakes:
        assert [row[-2] for row in rows] == ["2.00", "4.00"]
        assert written["tree_topk"] == 2
    fastest = max(rows, key=lambda row: float(row[-2]))
    gamma, eta = fastest[-7:-5]
    assert written["max_draft_len"] == int(gamma)
    assert written["threshold"] == pytest.approx(float(eta))
    assert ("costs" in written) == ("tree_topk" not in written)
    assert ("float32, int8 weights, greedy" in out) == ("--weights=int8" in fakes)


@pytest.mark.parametrize("found", [True, pytest.param(False, marks=pytest.mark.long)])
def test_tune_writes_the_costs_of_rounds_and_look_ups_that_are_faster(commands, flags, saved, prompts, found):
    path = write_draft_settings(saved[1], DraftConfig(lookup=LookupConfig(7, 1, 3)))
    fakes = ["fake:times", "fake:decoding", *["fake:found"] * found]
    code, out, err = commands.run("tune", *flags, prompts, *SHORT, "--tree_topk=", "--confirm=1", *fakes)
    assert code == 0, err
    written = json.loads(path.read_text())
    path.unlink()
    # All eight tokens are looked up in one round of 20 ms, in place of two of 21 or more.
    rows = [line.split() for line in out.splitlines() if line.startswith("single")]
    assert len(rows) == (2 if found else 1)
    assert written.get("lookup_tokens") == (8 if found else None)
    assert ("no look-up is predicted to be faster" in out) != found
    # A plain step takes 8 ms, a draft step 2 ms and a round with n drafts 20 + n; so of every batch.
    assert written["costs"].keys() == {"1", "8"}
    for costs in written["costs"].values():
        assert costs["draft_step"] == pytest.approx(0.25)
        assert costs["verification"]["1"] == 1
        assert costs["verification"]["3"] == pytest.approx((22 - 4) / 8)
    assert written["acceptance"] == pytest.approx(3 / 4)  # of four drafted tokens, the last is refused
    assert "batch 8: the best of a single sequence" in out


@pytest.mark.long
def test_batch_and_adapters_print_a_row_per_size_and_adapter(commands, flags):
    sizes = ["--batch_sizes=2", "--prompts=2", "--requests=3", "--shortest=2", "--longest=6", "--max_draft_len=2"]
    code, out, err = commands.run("batch", *flags, *SHORT, *sizes)
    assert code == 0, err
    rows = [line.split() for line in out.splitlines() if re.match(" +2 |plain|Kangaroo", line)]
    assert [row[0] for row in rows] == ["2", "plain", "Kangaroo"]
    assert [row[-3:] for row in rows] == [["2", "of", "2"]] + [["3", "of", "3"]] * 2
    # Tokens per second, speed-up and accept length of both ways, each with its count of identical answers.
    _, plain, fixed, speed_up, accept, *identical, deciding, _, _ = rows[0][:-3]
    assert identical == ["2", "of", "2"]
    assert float(speed_up) == pytest.approx(float(fixed) / float(plain), abs=0.01)
    assert 1 <= float(accept) <= 3
    assert float(deciding) > 0
    model, adapter = flags
    pair = adapter.replace("--adapter=", "--adapters=") + "," + adapter.removeprefix("--adapter=")
    code, out, err = commands.run("adapters", model, pair, "--prompts=1", "--max_new_tokens=8", "--max_draft_len=2")
    assert code == 0, err
    *_, first, second = out.splitlines()
    assert first == second
    assert len(first.split()) == 4


@pytest.mark.long
def test_peers_compares_with_transformers(commands, flags):
    pytest.importorskip("torch")
    code, out, err = commands.run("peers", *flags, *SHORT, "--prompts=1", "--max_draft_len=2", "fake:times")
    assert code == 0, err
    assert re.search(r"^median .* 1 of 1$", out, re.MULTILINE)
    assert re.search(r"^cache of 4096 +8.000 ", out, re.MULTILINE)
