"""Figures for Prometheus."""

from __future__ import annotations

import time
import weakref

import prometheus_client as prometheus

from kangaroo_jax.engine.requests import Event, Finished
from kangaroo_jax.serve.api_error import ApiError
from kangaroo_jax.serve.engine_thread import EngineThread, Job

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counts what a server does.

    Tokens per second are `rate` of `kangaroo_completion_tokens_total`, the mean accept length is `rate` of
    `kangaroo_committed_tokens_total` divided by that of `kangaroo_rounds_total`.
    """

    def __init__(self) -> None:
        # Its own, so that two servers in one process count separately.
        self.registry = prometheus.CollectorRegistry()
        add = {"registry": self.registry}
        self._responses = prometheus.Counter(
            "kangaroo_responses", "Responses, by path and status.", ["path", "status"], **add
        )
        self._failures = prometheus.Counter("kangaroo_errors", "Refused and failed requests, by code.", ["code"], **add)
        self._prompt = prometheus.Counter("kangaroo_prompt_tokens", "Tokens of prompts.", **add)
        self._reused = prometheus.Counter("kangaroo_reused_tokens", "Of these, that a slot held already.", **add)
        self._completion = prometheus.Counter("kangaroo_completion_tokens", "New tokens.", **add)
        self._committed = prometheus.Counter("kangaroo_committed_tokens", "Tokens that rounds gave.", **add)
        self._rounds = prometheus.Counter("kangaroo_rounds", "Rounds of decoding.", **add)
        self._first = prometheus.Histogram(
            "kangaroo_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **add
        )
        self._between = prometheus.Histogram(
            "kangaroo_time_per_token_seconds",
            "Mean time between the tokens of an answer.",
            buckets=_TOKEN_SECONDS,
            **add,
        )
        self._begun: weakref.WeakKeyDictionary[Job, dict[int, float]] = weakref.WeakKeyDictionary()

    def watch(self, thread: EngineThread, slots: int) -> None:
        """Shows an engine's queue and slots."""
        for name, what, value in (
            ("kangaroo_waiting", "Sequences that wait for a slot.", lambda: thread.waiting),
            ("kangaroo_running", "Sequences in slots.", lambda: max(0, thread.active - thread.waiting)),
            ("kangaroo_slots", "Slots.", lambda: slots),
        ):
            prometheus.Gauge(name, what, registry=self.registry).set_function(value)

    def event(self, job: Job, index: int, event: Event | ApiError) -> None:
        """Counts what has become of a sequence."""
        if isinstance(event, ApiError):
            return
        now, begun = time.monotonic(), self._begun.setdefault(job, {})
        if isinstance(event, Finished):
            answer = event.answer
            self._prompt.inc(len(job.requests[index].prompt))
            self._reused.inc(answer.reused_tokens)
            self._committed.inc(sum(answer.accept_lengths))
            self._rounds.inc(len(answer.accept_lengths))
            if index in begun and len(answer.tokens) > 1:
                self._between.observe((now - begun[index]) / (len(answer.tokens) - 1))
            return
        self._completion.inc(len(event.tokens))
        if index not in begun:
            begun[index] = now
            self._first.observe(now - job.submitted)

    def response(self, path: str, status: int, code: str | None) -> None:
        """Counts a response; `path` is one of the server's, or "other"."""
        self._responses.labels(path, str(status)).inc()
        if code is not None:
            self._failures.labels(code).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return prometheus.generate_latest(self.registry)
