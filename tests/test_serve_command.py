"""`python -m kangaroo_jax.serve` as a user runs it: what it refuses, curl, SIGTERM, kill -9, and its memory.

Truth: plain decoding.
"""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import openai
import pytest

from kangaroo_jax import generate_plain, load_target
from tests.bench.models import save_model
from tests.decode_commands import run_in_one_process

ROOT = pathlib.Path(__file__).parents[1]
PROMPT = "def add(self, item):"
MEGABYTE = 2**20


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    save_model(folder)
    return folder


@contextlib.contextmanager
def serving(work, *flags, port=0):
    """The process, its address, and the lines of its log."""
    command = [sys.executable, "-m", "kangaroo_jax.serve", f"--model={work}/model", f"--adapter={work}/adapter"]
    with open(work / "log", "w") as log:
        process = subprocess.Popen(
            [*command, f"--port={port}", "--max_batch=2", *flags],
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        first = process.stderr.readline()
        found = re.search(r"^model on (http://127\.0\.0\.1:\d+)$", first)
        assert found, first
        url = found.group(1)
        end = time.monotonic() + 120
        while httpx.get(f"{url}/health").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def plain(work, most):
    target = load_target(work / "model", "float32")
    return generate_plain(target, [PROMPT], most, eos_token_ids=[]).texts[0]


def test_what_cannot_be_is_one_line(tmp_path):
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        lines = [
            [f"--port={taken.getsockname()[1]}"],
            ["--host=no.such.host.invalid"],
            [f"--api_key_file={tmp_path}/empty"],
            [f"--api_key_file={tmp_path}/missing"],
            ["--allow_origin=example.org"],
            ["--max_batch=0"],
            ["--max_length=0"],
            ["--queue_size=-1"],
            ["--deadline=0"],
            ["--plain", "--adapter=x"],
            ["--port=70000"],
        ]
        found = run_in_one_process(["kangaroo_jax.cli.serve", "serve"], lines, dict(os.environ))
    expected = [
        (1, "give another --host or --port"),
        (1, "cannot listen on no.such.host.invalid"),
        (2, "has no key"),
        (2, "No such file or directory"),
        (2, "allow_origin must be like https://chat.example.org"),
        (2, "max_batch must be a positive integer"),
        (2, "max_length must be a positive integer"),
        (2, "queue_size must be an integer, 0 or above"),
        (2, "deadline must be a finite number above 0"),
        (2, "--adapter and --plain do not go together"),
        (1, "cannot listen on 127.0.0.1 port 70000"),
    ]
    for (code, out, err), (status, message), line in zip(found, expected, lines, strict=True):
        assert code == status, (line, err)
        assert out == ""
        assert err.startswith("serve: error: ")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.long
def test_sigterm_loses_no_running_answer(work):
    truth = plain(work, 200)
    with serving(work, "--grace=60") as (process, url), concurrent.futures.ThreadPoolExecutor(5) as pool:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

        def ask(stream):
            begun.append(None)
            settings = {"model": "model", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "stream": stream}
            answer = client.completions.create(**settings, extra_body={"ignore_eos": True})
            if not stream:
                return answer.choices[0].text
            return "".join(choice.text for chunk in answer for choice in chunk.choices)

        begun = []
        asked = [pool.submit(ask, bool(i % 2)) for i in range(5)]
        while "kangaroo_running 2.0" not in httpx.get(f"{url}/metrics").text:
            assert not all(each.done() for each in asked)
        process.send_signal(signal.SIGTERM)
        assert [each.result() for each in asked] == [truth] * 5
        assert process.wait(60) == 0
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
    lines = [json.loads(line) for line in (work / "log").read_text().splitlines()]
    assert [line["new_tokens"] for line in lines] == [200] * 5


@pytest.mark.long
def test_kill_9_and_a_restart_on_the_same_port_and_curl(work, tmp_path):
    (tmp_path / "keys").write_text("secret\n")
    key = f"--api_key_file={tmp_path}/keys"
    with serving(work, key) as (process, url):
        process.kill()
    with serving(work, key, port=url.rsplit(":", 1)[1]) as (_, again):
        assert again == url
        body = json.dumps({"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True})
        command = ["curl", "-s", f"{url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
        refused = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert refused["error"]["code"] == "invalid_api_key"
        command += ["-H", "Authorization: Bearer secret"]
        answer = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert answer["choices"][0]["text"] == plain(work, 20)


@pytest.mark.long
def test_memory_is_flat_over_2000_requests(work):
    with serving(work) as (process, url), httpx.Client(base_url=url, timeout=60) as client:

        def ask(i):
            if i % 5 == 0:
                return client.post("/v1/completions", content=b"x" * 100_000, headers={"Content-Type": "text/plain"})
            if i % 5 == 1:
                return client.post("/v1/completions", json={"prompt": PROMPT, "foo": "y" * 10_000})
            if i % 5 == 2:
                return client.get(f"/v1/{i}")
            return client.post(
                "/v1/completions", json={"prompt": PROMPT, "max_tokens": 1 + i % 9, "stream": i % 2 == 0}
            )

        def ask_until(last):
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                found = {response.status_code for response in pool.map(ask, range(last))}
            assert found == {200, 400, 404, 415}
            status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
            return int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) * 1024

        before = ask_until(600)
        assert ask_until(2000) - before < 32 * MEGABYTE
