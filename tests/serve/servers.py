"""A server in this process, on a free port of the loopback interface, and clients of it."""

from __future__ import annotations

import contextlib
import functools
import time

import httpx
import openai

from kangaroo_jax import DraftConfig, EngineConfig, SamplingConfig, generate
from kangaroo_jax.config import ServeConfig
from kangaroo_jax.serve import run
from kangaroo_jax.serve.app import Server
from tests.bench.models import EXIT_LAYER, small_adapter, small_chat_target

MODEL = "small"  # a token of it is a character
DRAFT = DraftConfig(EXIT_LAYER, 4, 0.1)


@functools.cache
def alone(prompt, most=24, sampling=None, stop=(), eos=None):
    """What the server has to answer: `generate` of one prompt (text, or a tuple of token ids)."""
    sampling = SamplingConfig() if sampling is None else sampling
    prompts = [prompt if isinstance(prompt, str) else list(prompt)]
    return generate(small_chat_target(), small_adapter(), prompts, most, DRAFT, sampling, eos, stop=list(stop))


class Running:
    """A server that runs: where it is, what it logged, and clients of it."""

    def __init__(self, url, server, log, failures):
        self.url, self.server, self.log, self.failures = url, server, log, failures
        self.openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
        self.http = httpx.Client(base_url=url, timeout=120)

    def post(self, path, **body):
        """The response to a JSON body."""
        return self.http.post(f"/v1/{path}", json=body)

    def metric(self, name):
        """A figure of /metrics, without labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.split()[0] == name)

    def settle(self, running=0):
        """Waits until so many sequences run or wait."""
        thread = self.server._thread
        wait_for(lambda: thread.active == running and len(thread._sequences) == running)


def wait_for(holds, seconds=60):
    """Waits until it holds; fails if it does not."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold"
        time.sleep(0.01)


@contextlib.contextmanager
def serving(config=None, max_batch=1, max_length=None):
    """Runs a server of the small model."""
    log, failures = [], []
    engine, config = EngineConfig(max_batch, max_length), config or ServeConfig()
    server = Server(small_chat_target(), small_adapter(), engine, DRAFT, config, log.append, failures.append)
    with run.in_background(server.app) as (host, port):
        running = Running(f"http://{host}:{port}", server, log, failures)
        try:
            wait_for(lambda: server.ready)
            yield running
        finally:
            running.http.close()
            running.openai.close()


def check_alive(running):
    """It answers, rightly, and holds nothing of earlier requests."""
    prompt = "def add(self, item):"
    response = running.post("completions", prompt=prompt, temperature=0, max_tokens=24)
    assert response.json()["choices"][0]["text"] == alone(prompt).texts[0]
    running.settle()
    assert not running.server._thread._jobs
    assert not running.server._thread._open
