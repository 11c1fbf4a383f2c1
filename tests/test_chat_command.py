"""decode.py with a chat model as a user runs it: turns in the terminal, Ctrl-C, the first line, drafts in the text and
as a page.

Truth: plain decoding of the ids that transformers' `apply_chat_template` gives.
"""

import html.parser
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kangaroo_jax import generate_plain, load_target
from tests.bench.models import CONFIG, CONTEXT, save_model
from tests.decode_commands import decode_in_one_process

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"NO_COLOR": "1"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_model(folder)
    # Answers go on to their limits: what ends them is a token that they do not hold, and not the tokenizer's EOS.
    config = folder / "model" / "tokenizer_config.json"
    named = json.loads(config.read_text())
    del named["eos_token"]
    config.write_text(json.dumps(named))
    written = [
        token for turn in ("hi", "hello") for token in plain(folder, prompt_ids(folder, turn), 740, []).tokens[0]
    ]
    end = next(token for token in range(CONFIG.vocab_size) if token not in written)
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    return folder


def flags(work, *more):
    return [f"--model={work}/model", f"--adapter={work}/adapter", "--max_draft_len=2", *more]


def prompt_ids(work, *turns):
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    options = {"add_generation_prompt": True, "return_dict": False}
    return load_target(work / "model", "float32").tokenizer.apply_chat_template(messages, **options)


def plain(work, ids, most=24, eos_token_ids=None):
    return generate_plain(load_target(work / "model", "float32"), [ids], most, eos_token_ids=eos_token_ids)


def expected(work, *turns, most=24):
    """Plain decoding's answer to the last turn."""
    return plain(work, prompt_ids(work, *turns), most).texts[0]


def chat(work, *more, said):
    command = [sys.executable, "decode.py", *flags(work, "--chat", *more)]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, input=said, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.long
def test_a_chat_of_three_turns(work):
    done = chat(work, "--max_new_tokens=24", said="hello you\n\n/what\nand then\n/reset\nhello you\n/exit\nmore\n")
    assert done.returncode == 0, done.stderr
    first, out = done.stdout.split("\n", 1)
    assert first.startswith("each turn is given by the model's chat template; /reset forgets")
    ids, more = prompt_ids(work, "hello you"), prompt_ids(work, "", "", "and then")
    answer = plain(work, ids)
    # The answer's own tokens, of which some are special ones that the text does not have.
    rest = more[len(prompt_ids(work, "")) :]
    two = plain(work, ids + answer.tokens[0] + rest).texts[0].lstrip()
    one = answer.texts[0].lstrip()
    out = re.sub(r"\[24 tokens, accept length \d\.\d\d, \d+\.\d tokens/s; ended at the limit\]", "#", out)
    out = re.sub(r"\(unknown command /what; .*\)", "?", out)
    first = f"> hello you\n{one}\n#\n\n"
    assert out == (
        f"\n{first}> \n> /what\n?\n\n> and then\n{two}\n#\n\n"
        f"> /reset\n(the conversation begins again)\n\n{first}> /exit\n"
    )


@pytest.mark.long
def test_a_conversation_begins_with_messages_and_goes_on_after_a_bad_turn(work):
    beginning = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (work / "beginning.json").write_text(json.dumps(beginning))
    long = "x" * CONTEXT
    done = chat(work, f"--messages={work}/beginning.json", "--max_new_tokens=8", said=f"{long}\nthree\n{long}\n")
    assert done.returncode == 0, done.stderr
    why = rf"\(the conversation has \d+ tokens, but the context is {CONTEXT}; shorten it"
    # There is nothing to forget before the first turn.
    assert re.fullmatch(rf"{why}\)\n\n{why}; /reset begins a new conversation\)\n\n", done.stderr)
    assert f"\n> three\n{expected(work, 'one', 'two', 'three', most=8).lstrip()}\n[8 tokens" in done.stdout


@pytest.mark.long
def test_a_stop_string_that_cannot_be_is_named_before_a_turn_is_read(work):
    special = load_target(work / "model", "float32").tokenizer.all_special_tokens[0]
    done = chat(work, f"--stop=a{special}", said="hello you\n")
    assert done.returncode == 2
    assert "hello you" not in done.stdout
    assert "has the special token" in done.stderr


@pytest.mark.long
def test_a_turn_without_an_answer_is_taken_back(work):
    """NaN for the embedding of "~": no turn with it has a first token."""
    shutil.copytree(work / "model", work / "broken")
    weights = load_file(work / "model" / "model.safetensors")
    weights["model.embed_tokens.weight"][load_target(work / "model").tokenizer.convert_tokens_to_ids("~")] = np.nan
    save_file(weights, work / "broken" / "model.safetensors", metadata={"format": "pt"})
    done = chat(work, f"--model={work}/broken", "--max_new_tokens=8", said="a~b\nthree\n")
    assert done.returncode == 0, done.stderr
    why = "the model's logits are not numbers in float32 at token 1 of the answer; the weights may be damaged"
    assert done.stderr == f"({why})\n\n"
    assert f"> three\n{expected(work, 'three', most=8).lstrip()}\n[8 tokens" in done.stdout


@pytest.mark.long
def test_ctrl_c_ends_the_answer_and_not_the_program(work):
    command = [sys.executable, "-u", "decode.py", *flags(work, "--chat", "--max_draft_len=1")]
    running = subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        running.stdin.write("hello\n")
        running.stdin.flush()
        shown = ""
        while "> hello\n" not in shown or shown.endswith("> hello\n"):
            shown += (read := running.stdout.read(1))
            assert read, running.stderr.read()  # it has ended
        running.send_signal(signal.SIGINT)  # one character of an answer of hundreds was there
        out, error = running.communicate("again\n/exit\n", timeout=200)
    finally:
        running.kill()
    assert running.returncode == 0, error
    assert error == ""
    before, _, after = (shown + out).partition("[ended by Ctrl-C]\n\n")
    assert expected(work, "hello", most=600).lstrip().startswith(before.rpartition("> hello\n")[2].rstrip("\n"))
    assert re.search(r"> again\n[\s\S]+\n\[\d+ tokens, accept length", after)


MESSAGES = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b"), ("user", "<c> & d"))]


@pytest.fixture(scope="module")
def results(work):
    (work / "messages.json").write_text(json.dumps(MESSAGES))
    common = ("--max_new_tokens=24", "--json")
    lines = [
        flags(work, *common, "--prompt=hi"),
        flags(work, *common, "--prompt=hi", "--raw"),
        flags(work, *common, f"--messages={work}/messages.json", "--show_drafts", f"--html={work}/drafts.html"),
        flags(work, *common, f"--messages={work}/messages.json", "--tree", f"--html={work}/tree.html", "--stop=e"),
        flags(work, *common[1:], "--prompt=hi", "--max_new_tokens=10000"),
    ]
    done = decode_in_one_process(lines, ENVIRONMENT)
    assert [code for code, _, _ in done] == [0] * len(lines), done
    return [(out, json.loads(out.splitlines()[-1])) for _, out, _ in done]


@pytest.mark.long
def test_the_first_line_says_how_the_prompt_was_given(work, results):
    (turn, turn_text), (raw, raw_text), (messages, messages_text) = ((out, done["text"]) for out, done in results[:3])
    assert turn.startswith(
        f"the prompt as a user's turn of the model's chat template (--raw: as it is):\n\nhi\n\n{turn_text}"
    )
    assert raw.startswith(f"the prompt as it is, without the model's chat template (--raw):\n\nhi{raw_text}")
    assert messages.startswith(f"the messages of {work}/messages.json, by the model's chat template:\n\n")
    assert turn_text == expected(work, "hi")
    assert raw_text == plain(work, load_target(work / "model", "float32").tokenizer.encode("hi")).texts[0]
    assert messages_text == expected(work, *(message["content"] for message in MESSAGES))


@pytest.mark.long
def test_an_answer_ends_at_the_context(work, results):
    assert results[4][1]["new_tokens"] == CONTEXT - len("B<user> hi\n<assistant> ")  # a character is a token, as BOS


@pytest.mark.long
def test_the_text_with_markers_is_the_text(results):
    out, text = results[2][0], results[2][1]["text"]
    legend = "{+drafted and accepted+}, [-drafted and rejected-], added by the target\n\n<c> & d\n\n"
    marked = out.partition(legend)[2]
    assert "{+" in marked[: 2 * len(text)]
    shown = re.sub(r"\{\+(.*?)\+\}", r"\1", re.sub(r"\[-.*?-\]", "", marked), flags=re.DOTALL)
    assert shown.startswith(text + "\n")


class Page(html.parser.HTMLParser):
    """The text of the answer's spans, and everything that would be loaded."""

    def __init__(self, path):
        super().__init__()
        self.kinds, self.text, self.loaded, self._kind = [], "", [], None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.loaded += [attributes[name] for name in ("src", "href") if name in attributes]
        self._kind = attributes["class"] if "data-r" in attributes and tag == "span" else None
        self.kinds += [self._kind] if self._kind else []

    def handle_endtag(self, tag):
        self._kind = None

    def handle_data(self, data):
        if self._kind in ("a", "t"):
            self.text += data


@pytest.mark.long
def test_the_page_has_the_text_and_needs_nothing_else(work, results):
    kinds = set()
    for name, (_, done) in (("drafts", results[2]), ("tree", results[3])):
        page = Page(work / f"{name}.html")
        assert page.text == done["text"]
        kinds |= set(page.kinds)
        assert page.loaded == []
        source = (work / f"{name}.html").read_text()
        assert "&lt;c&gt; &amp; d" in source
        assert "http" not in source
        data = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL).group(1)
        assert len(json.loads(data)) == source.count("<button data-r=") == done["rounds"]
    assert {"a", "t", "x"} <= kinds


@pytest.mark.long
def test_colours_are_for_terminals_that_want_them():
    code = "from kangaroo_jax.cli.answer import legend; print(legend())"
    script = f"import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', {code!r}]))"
    for variables, colours in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        environment = (
            {key: value for key, value in os.environ.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | variables
        )
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
        )
        assert ("\033[32mdrafted and accepted\033[0m" in done.stdout) == colours, done
        assert ("{+drafted and accepted+}" in done.stdout) != colours
