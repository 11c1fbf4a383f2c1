"""Many clients at a time, of which some leave and some ask for odd things.

Truth: each gets the answer of `generate` alone.
"""

import asyncio
import json
import socket
import threading

import httpx
import numpy as np
import pytest

from kangaroo_jax import SamplingConfig
from kangaroo_jax.config import ServeConfig
from kangaroo_jax.serve import run
from tests.serve.servers import alone, check_alive, serving

PROMPT = "def add(self, item):"


@pytest.mark.long
def test_500_requests_of_which_a_third_leave_and_a_third_are_odd():
    rng = np.random.default_rng(0)
    prompts = [PROMPT, "class Stack:", "x" * 70, "import os"]
    odd = [
        {"temperature": 0.8, "seed": 3},
        {"temperature": 1.2, "top_k": 5, "seed": 4},
        {"temperature": 0, "stop": [alone(PROMPT, 40).texts[0][20:22]]},
        {"temperature": 0.7, "top_p": 0.8, "seed": 5, "stop": "e"},
        {"n": 3, "temperature": 0.9, "seed": 6},
        {"temperature": -1},
        {"logprobs": 2},
    ]

    def expected(body):
        settings = {name: body[name] for name in ("temperature", "top_p", "top_k") if name in body}
        stop = body.get("stop", [])
        return [
            alone(
                body["prompt"],
                body["max_tokens"],
                SamplingConfig(**settings, seed=body.get("seed", 0) + i),
                tuple([stop] if isinstance(stop, str) else stop),
            ).texts[0]
            for i in range(body.get("n", 1))
        ]

    async def one(client, kind, body, wait):
        if kind == 0:  # leaves at a random moment
            task = asyncio.create_task(client.post("/v1/completions", json=body))
            await asyncio.sleep(wait)
            task.cancel()
            return None
        if not body["stream"]:
            return await client.post("/v1/completions", json=body)
        texts = [""] * body.get("n", 1)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                return response
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
        return texts

    async def all_of_them(url):
        limit = asyncio.Semaphore(24)
        asked = []
        for i in range(500):
            body = {"prompt": prompts[rng.integers(4)], "max_tokens": int(rng.choice([1, 20, 40])), "temperature": 0}
            if i % 3 == 1:
                body |= odd[rng.integers(len(odd))]
            asked.append((i % 3, body | {"stream": bool(rng.integers(2))}, float(rng.exponential(0.1))))

        async def limited(client, *request):
            async with limit:
                return await one(client, *request)

        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            answers = await asyncio.gather(*(limited(client, *request) for request in asked))
        return asked, answers

    with serving(ServeConfig(queue_size=100), max_batch=4) as running:
        asked, answers = asyncio.run(all_of_them(running.url))
        running.settle()
        assert not running.server._thread._engines[False].busy
        assert running.failures == []
        checked = 0
        for (kind, body, _), answer in zip(asked, answers, strict=True):
            if kind == 0:
                continue
            if body["temperature"] < 0 or "logprobs" in body:
                assert answer.status_code == 400
                continue
            texts = answer if isinstance(answer, list) else [c["text"] for c in answer.json()["choices"]]
            assert texts == expected(body)
            checked += 1
        assert checked > 250


@pytest.mark.long
def test_a_slow_reader_does_not_slow_others(monkeypatch):
    listen = run.listen

    def listen_with_little_room(host, port):
        listening = listen(host, port)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of its connections too
        return listening

    monkeypatch.setattr(run, "listen", listen_with_little_room)
    with serving(ServeConfig(), max_batch=4) as running:
        host, port = running.url.removeprefix("http://").split(":")
        body = json.dumps(
            {
                "prompt": PROMPT,
                "max_tokens": 220,
                "ignore_eos": True,
                "stream": True,
                "n": 16,
                "kangaroo": {"drafts": True},
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.socket() as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            reader.connect((host, int(port)))
            reader.sendall(head.encode() + b"\r\n\r\n" + body)
            running.settle()  # its answers are done, though it has read nothing of them
            assert not running.log  # and are still being sent
            check_alive(running)
            assert len(running.log) == 1
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                piece = reader.recv(4096)
                assert piece
                received += piece
            assert b"data: [DONE]" in received


@pytest.mark.long
def test_clients_at_a_time_get_what_they_get_alone():
    with serving(ServeConfig(), max_batch=4) as running:
        texts = {}

        def ask(i):
            body = {"prompt": "abcdef"[i % 6] * (1 + 9 * i), "temperature": 0, "max_tokens": 60}
            texts[i] = running.post("completions", **body).json()["choices"][0]["text"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(12):
            assert texts[i] == alone("abcdef"[i % 6] * (1 + 9 * i), 60).texts[0]
