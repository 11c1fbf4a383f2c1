"""Batches: Kangaroo beside plain decoding at the same batch size, and slots that are refilled beside fixed batches.

Greedy; EOS ends nothing. Runs are interleaved in one process; their medians count prefill, and not compilation.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from kangaroo_jax import Answer, DecideConfig, DraftConfig, Engine, EngineConfig, Finished, Request
from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.engine.programs import SHARED
from kangaroo_jax.engine.prompts import Prompt

DecodeAll = Callable[[], tuple[list[Answer], float]]  # with seconds, without compilation

_PROGRAMS = 8  # of an engine, at most: prompts in groups of several widths, and rounds


@dataclasses.dataclass(frozen=True)
class BatchSpeed:
    """One way of decoding at one batch size.

    Attributes:
      seconds: for all answers.
      mean_accept_length: over all rounds.
      identical: answers whose tokens are plain decoding's at the first batch size.
    """

    seconds: float
    mean_accept_length: float
    identical: int


@dataclasses.dataclass(frozen=True)
class BatchComparison:
    """Kangaroo and plain decoding at one batch size.

    Attributes:
      batch_size: sequences on the device.
      tokens: new tokens of all answers.
      answers: number of answers.
      plain_seconds: of plain decoding, for all answers.
      ways: Kangaroo with each way of drafting.
    """

    batch_size: int
    tokens: int
    answers: int
    plain_seconds: float
    ways: dict[str, BatchSpeed]


@dataclasses.dataclass(frozen=True)
class RefillSpeed:
    """Slots that are refilled as answers end, beside fixed batches that wait for their slowest.

    Attributes:
      name: how it decodes: "plain" or "Kangaroo".
      tokens: new tokens of all answers.
      refilled_seconds: with refilled slots, for all answers.
      fixed_seconds: in fixed batches.
      identical: answers whose tokens are those of plain decoding in fixed batches.
      answers: number of answers.
    """

    name: str
    tokens: int
    refilled_seconds: float
    fixed_seconds: float
    identical: int
    answers: int


def requests_of(prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Request]:
    """A request per length; prompts are repeated where there are more lengths."""
    return [Request(prompts[i % len(prompts)], length) for i, length in enumerate(lengths)]


def ragged_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths, drawn evenly from `shortest` to `longest`; the same in every call."""
    return np.random.default_rng(0).integers(shortest, longest + 1, count).tolist()


def ways_of_drafting(draft: DraftConfig) -> dict[str, DraftConfig]:
    """`draft` with its gamma and eta in all rounds, and with sequences that decide how far to draft, at every batch
    size; of a tree, which has no such rule, the first alone."""
    ways = {"fixed": dataclasses.replace(draft, decide=None)}
    if draft.tree is None:
        decide = dataclasses.replace(draft.decide or DecideConfig(), from_slots=1)
        ways["deciding"] = dataclasses.replace(draft, decide=decide)
    return ways


def compare_with_plain(
    target: Target,
    adapter: TrainedAdapter,
    ways: Mapping[str, DraftConfig],
    requests: list[Request],
    batch_sizes: Sequence[int],
    runs: int,
) -> Iterator[BatchComparison]:
    """The requests decoded in fixed batches of each size: plainly, and with each of the `ways` of drafting."""
    reference = None
    for size in batch_sizes:
        plain_call = _in_fixed_batches(target, None, requests, size, DraftConfig())
        calls = [_in_fixed_batches(target, adapter, requests, size, draft) for draft in ways.values()]
        (plain, plain_seconds), *results = _measure([plain_call, *calls], runs)
        reference = reference or plain
        yield BatchComparison(
            size,
            sum(len(answer.tokens) for answer in plain),
            len(plain),
            plain_seconds,
            {
                name: BatchSpeed(
                    seconds,
                    statistics.mean(length for answer in ours for length in answer.accept_lengths),
                    _identical(ours, reference),
                )
                for name, (ours, seconds) in zip(ways, results, strict=True)
            },
        )


def compare_with_fixed(
    target: Target, adapter: TrainedAdapter, draft: DraftConfig, requests: list[Request], batch_size: int, runs: int
) -> list[RefillSpeed]:
    """Refilled slots and fixed batches of the same size, of plain decoding and of Kangaroo."""
    kinds = {"plain": (None, DraftConfig()), "Kangaroo": (adapter, draft)}
    calls = [
        make(target, which, requests, batch_size, how)
        for which, how in kinds.values()
        for make in (_in_fixed_batches, _in_refilled_slots)
    ]
    results = _measure(calls, runs)
    reference = results[0][0]
    tokens = sum(len(answer.tokens) for answer in reference)
    return [
        RefillSpeed(name, tokens, refilled, fixed, _identical(answers, reference), len(answers))
        for name, (_, fixed), (answers, refilled) in zip(kinds, results[::2], results[1::2], strict=True)
    ]


def _in_refilled_slots(
    target: Target, adapter: TrainedAdapter | None, requests: list[Request], size: int, draft: DraftConfig
) -> DecodeAll:
    requests = [dataclasses.replace(request, eos_token_ids=(), stream=False) for request in requests]

    def run() -> tuple[list[Answer], float]:
        # A new one each time: an engine keeps what it knows of a prompt for the next one that begins as it does.
        engine, answers, start = Engine(target, adapter, EngineConfig(size), draft), [], time.perf_counter()
        for request in requests:
            engine.add(request)
        while engine.busy:
            answers += [event.answer for event in engine.step() if isinstance(event, Finished)]
        seconds = time.perf_counter() - start - engine.compile_seconds
        return sorted(answers, key=lambda answer: answer.id), seconds

    return run


def _in_fixed_batches(
    target: Target, adapter: TrainedAdapter | None, requests: list[Request], size: int, draft: DraftConfig
) -> DecodeAll:
    """Batch after batch, each waiting for its slowest sequence."""
    batches = [requests[i : i + size] for i in range(0, len(requests), size)]
    calls = [_in_refilled_slots(target, adapter, batch, len(batch), draft) for batch in batches]

    def run() -> tuple[list[Answer], float]:
        answers, seconds = zip(*(call() for call in calls), strict=True)
        return list(itertools.chain.from_iterable(answers)), sum(seconds)

    return run


def _measure(calls: Sequence[DecodeAll], runs: int) -> list[tuple[list[Answer], float]]:
    """The answers of each call, and the median of its seconds."""
    # Of all ways, where engines find them: loading one again during a run would leave caches of the processor cold.
    SHARED.limit = max(SHARED.limit, _PROGRAMS * len(calls))
    answers = [call()[0] for call in calls]  # compiles
    seconds = [[call()[1] for call in calls] for _ in range(runs)]
    return [(found, statistics.median(times)) for found, times in zip(answers, zip(*seconds, strict=True), strict=True)]


def _identical(answers: list[Answer], reference: list[Answer]) -> int:
    return sum(a.tokens == b.tokens for a, b in zip(answers, reference, strict=True))
