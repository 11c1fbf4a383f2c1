"""The server over the loopback interface, beside `generate_many` with the same slots and requests, in turn.

Greedy; EOS ends nothing. The server is in this process, its clients are in another one. Compilation is not counted.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from kangaroo_jax import DraftConfig, EngineConfig, Request, generate_many
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import ServeConfig
from kangaroo_jax.errors import MachineError
from kangaroo_jax.serve import run
from kangaroo_jax.serve.app import Server

_DEADLINE = 3600.0  # seconds
_MAX_COMPILING = 6  # runs: which shapes the server meets depends on when requests come


@dataclasses.dataclass(frozen=True)
class Other:
    """Another server with OpenAI's API and the same model.

    Attributes:
      host: where it is.
      port: of HTTP.
      model: as requests name it.
    """

    host: str
    port: int
    model: str


@dataclasses.dataclass(frozen=True)
class OtherSpeed:
    """How fast it is.

    Attributes:
      tokens_per_second: new tokens by its own count; its answers may end sooner. Median over the runs.
      first_seconds: as in `ServeSpeed`.
      identical: answers whose text begins as `generate_many`'s, or the other way around.
    """

    tokens_per_second: float
    first_seconds: float
    identical: int


@dataclasses.dataclass(frozen=True)
class ServeSpeed:
    """A server with so many clients.

    Attributes:
      clients: that ask at a time.
      slots: of the server, and the batch size of `generate_many`.
      tokens: new tokens of all answers.
      seconds: for all answers, median over the runs.
      many_seconds: of `generate_many`.
      first_seconds: to the first piece of text: median over all answers of all runs.
      first_seconds_95: the same, the 95th percentile.
      identical: answers of the last run whose text is that of `generate_many`.
      answers: number of answers.
      other: the other server, with as many clients and the same prompts; None without one.
    """

    clients: int
    slots: int
    tokens: int
    seconds: float
    many_seconds: float
    first_seconds: float
    first_seconds_95: float
    identical: int
    answers: int
    other: OtherSpeed | None

    @property
    def overhead(self) -> float:
        """Seconds per token that the server takes more than `generate_many`."""
        return (self.seconds - self.many_seconds) / self.tokens


def measure(
    target: Target,
    adapter: TrainedAdapter | None,
    draft: DraftConfig,
    requests: Sequence[Request],
    clients: int,
    max_batch: int,
    runs: int,
    other: Other | None = None,
) -> ServeSpeed:
    """Runs all `runs` times, in turn. What compiles does not count, and is run again.

    Args:
      target: from `load_target`, with a tokenizer.
      adapter: from `load_adapter`; None decodes plainly.
      draft: how to draft.
      requests: texts, with the number of new tokens each.
      clients: that ask at a time.
      max_batch: slots, if there are as many clients.
      runs: that are timed.
      other: a server to measure beside this one.

    Raises:
      MachineError: where a server does not answer.
    """
    slots = min(clients, max_batch)
    failures: list[str] = []
    server = Server(
        target,
        adapter,
        EngineConfig(slots),
        draft,
        ServeConfig(queue_size=max(0, clients - slots), deadline=_DEADLINE),
        log=lambda _: None,
        on_failure=failures.append,
    )
    bodies = [
        {
            "prompt": request.prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        for request in requests
    ]
    other_bodies = [] if other is None else [_openai_body(request, other.model) for request in requests]
    seconds, many_seconds, first, others = [], [], [], []
    with run.in_background(server.app) as (host, port):
        while not server.ready:
            time.sleep(0.05)
        passes = 0
        while len(seconds) < runs:
            passes += 1
            before = server.compile_seconds
            found = _ask({"host": host, "port": port, "clients": clients, "bodies": bodies}, failures)
            taken = found["seconds"] - (server.compile_seconds - before)
            start = time.perf_counter()
            answers = list(
                generate_many(target, adapter, requests, slots, draft=draft, eos_token_ids=(), max_length=None)
            )
            many_taken = time.perf_counter() - start
            if other is not None:
                asked = {"host": other.host, "port": other.port, "clients": clients, "bodies": other_bodies}
                beside = _ask(asked, [])
            if server.compile_seconds == before or passes > runs + _MAX_COMPILING:
                seconds.append(taken)
                many_seconds.append(many_taken)
                first += [answer["first"] for answer in found["answers"]]
                others += [] if other is None else [beside]
    texts = {answer.id: answer.text for answer in answers}
    return ServeSpeed(
        clients=clients,
        slots=slots,
        tokens=sum(len(answer.tokens) for answer in answers),
        seconds=statistics.median(seconds),
        many_seconds=statistics.median(many_seconds),
        first_seconds=statistics.median(first),
        first_seconds_95=float(np.percentile(first, 95)),
        identical=sum(answer["text"] == texts[i] for i, answer in enumerate(found["answers"])),
        answers=len(answers),
        other=None if other is None else _other_speed(others, texts),
    )


def _openai_body(request: Request, model: str) -> dict[str, Any]:
    body = {"model": model, "prompt": request.prompt, "max_tokens": request.max_new_tokens, "temperature": 0}
    return body | {"stream": True, "stream_options": {"include_usage": True}}


def _other_speed(runs: Sequence[dict[str, Any]], texts: dict[int, str]) -> OtherSpeed:
    if any(answer["tokens"] is None for run in runs for answer in run["answers"]):
        raise MachineError("the other server does not say how many tokens its answers have (usage)")
    ends = ((answer["text"], texts[i]) for i, answer in enumerate(runs[-1]["answers"]))
    return OtherSpeed(
        statistics.median(sum(answer["tokens"] for answer in run["answers"]) / run["seconds"] for run in runs),
        statistics.median(answer["first"] for run in runs for answer in run["answers"]),
        sum(theirs.startswith(ours) or ours.startswith(theirs) for theirs, ours in ends),
    )


def _ask(asked: dict[str, Any], failures: list[str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "kangaroo_jax.bench.serve_clients"],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    found = json.loads(done.stdout) if done.returncode == 0 else {"answers": [{}]}
    if any(answer.get("status") != 200 or answer["first"] is None for answer in found["answers"]):
        status = next((answer["status"] for answer in found["answers"] if answer.get("status", 200) != 200), None)
        reason = f"status {status}" if status else f"the clients ended with {done.returncode}"
        reason = failures[-1].splitlines()[-1] if failures else reason
        raise MachineError(f"the server at {asked['host']}:{asked['port']} did not answer a request ({reason})")
    return found
