"""Writes records: as many as are wanted, each from one or several requests, all through one engine."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import pathlib
import time
from collections.abc import Callable, Hashable
from typing import Any, Protocol

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, EngineConfig
from kangaroo_jax.data.synthesize.record_file import Record, RecordFile
from kangaroo_jax.engine.engine import Engine
from kangaroo_jax.engine.requests import Answer, Finished, Request
from kangaroo_jax.errors import InputError

_DUPLICATE = "duplicate"
_FAILED = "logits not numbers"
_TRIED = 64  # indices without any record after which the next are not tried
_PER_RECORD = 4  # indices tried for each record that is wanted, at most


class Job(Protocol):
    """One record on its way.

    Attributes:
      key: as `Source.key`, once it is known; None before.
    """

    key: Hashable | None

    def start(self) -> Record | str | None:
        """To be called first; returns what `take` does."""

    def request(self) -> Request:
        """What is to be decoded next."""

    def take(self, answer: Answer) -> Record | str | None:
        """Takes what was decoded: None where `request` has more to decode, else the record, or why there is none."""


class Source(Protocol):
    """What records are made of.

    Attributes:
      settings: what its records depend on, JSON values.
      every: what all of its records have in common, besides what their jobs give and their indices.
      count: how many indices it has; None: any.
      advice: the end of a message about too few records, what to do.
    """

    settings: dict[str, Any]
    every: Record
    count: int | None
    advice: str

    def job(self, index: int) -> Job:
        """Record `index`, from 0. It depends on this number and on the settings alone."""

    def key(self, record: Record) -> Hashable:
        """Of records with equal keys, the first is kept."""


@dataclasses.dataclass
class Tally:
    """What a run has done so far.

    Attributes:
      wanted: records.
      before: of them, there before.
      records: of them, there now.
      tokens: decoded by this run, those of dropped records included.
      compile_seconds: of compilation, in no other figure.
      dropped: how many were left out by this run, by reason.
    """

    wanted: int
    before: int
    records: int
    tokens: int = 0
    compile_seconds: float = 0.0
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    start: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock since the beginning, without compilation."""
        return max(time.monotonic() - self.start - self.compile_seconds, 1e-9)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def as_json(self) -> dict[str, Any]:
        """The figures that a report shows."""
        names = ("records", "before", "tokens", "seconds", "compile_seconds")
        return {name: getattr(self, name) for name in names} | {"dropped": dict(self.dropped)}


def write_records(
    target: Target,
    adapter: TrainedAdapter | None,
    source: Source,
    output: pathlib.Path,
    wanted: int,
    *,
    batch_size: int,
    draft: DraftConfig = DraftConfig(),  # noqa: B008 - frozen
    flag: str = "--output",
    on_progress: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """Makes `output` hold `wanted` records, the first ones by index that are usable and no duplicates.

    Killed at any moment, the next call does the rest. In float32 the file is the same whether and where it was
    interrupted, and whatever the batch size, unless sequences decide how far to draft.

    Args:
      target: from `load_target`, with a tokenizer.
      adapter: from `load_adapter`; None decodes plainly.
      source: of the records.
      output: from `record_file.check_place`.
      wanted: how many; at most `source.count`.
      batch_size: sequences decoded together.
      draft: how to draft, with an adapter.
      flag: that names the output, for messages.
      on_progress: called after each record.

    Raises:
      InputError: for records of other settings in `output`, or fewer usable ones than wanted. What was made stays for
        a run that wants fewer.
    """
    draft = draft.at(batch_size)
    drafts = f"{draft}"
    if draft.decide is not None:
        drafts += f" in {batch_size} slots"
        if draft.decide.costs:  # what is sampled depends on them
            known = (draft.decide.nearest(batch_size), draft.decide.acceptance)
            drafts += f", costs {hashlib.sha256(repr(known).encode()).hexdigest()[:8]}"
    settings = {
        "model": f"{pathlib.Path(target.name).name} ({target.fingerprint})",
        "dtype": str(target.model.dtype),
        # In sampling, an adapter draws other random numbers.
        "adapter": None if adapter is None else f"{pathlib.Path(adapter.name).name}, {drafts}",
        **source.settings,
    }
    with RecordFile(output, settings, source.key, flag) as file:
        if file.before > wanted:
            raise InputError(
                f"{output}: has {file.before} records, more than the {wanted} that are wanted; give another {flag}, or "
                "that number"
            )
        tally = Tally(wanted, len(file), len(file))
        on_progress(tally)
        if file.before < wanted:
            _Run(target, adapter, source, file, tally, batch_size, draft, on_progress).run()
        file.settle(wanted)
    return tally


class _Run:
    """The loop of `write_records`."""

    def __init__(
        self,
        target: Target,
        adapter: TrainedAdapter | None,
        source: Source,
        file: RecordFile,
        tally: Tally,
        batch_size: int,
        draft: DraftConfig,
        on_progress: Callable[[Tally], None],
    ):
        self.target, self.source, self.file, self.tally = target, source, file, tally
        self.engine = Engine(target, adapter, EngineConfig(batch_size), draft)
        self.batch_size, self.on_progress = batch_size, on_progress
        # So that a slot that gets free finds a request that waits.
        self.most = batch_size + max(1, batch_size // 8)
        self.jobs: dict[int, tuple[int, Job]] = {}  # by the id of its request
        self.next = 0  # the smallest index that was not begun
        self.limit = source.count
        if self.limit is None:
            self.limit = _TRIED + _PER_RECORD * tally.wanted

    def run(self) -> None:
        while True:
            self._begin()
            if not self.jobs:
                break
            for event in self.engine.step():
                if isinstance(event, Finished):
                    self._take(event.answer)
            self.tally.compile_seconds = self.engine.compile_seconds
        if len(self.file) < self.tally.wanted and (self.source.count is None or not len(self.file)):
            raise InputError(self._too_few())

    def _begin(self) -> None:
        """Begins as many records as are missing, and as there is room for."""
        limit = self.limit
        if not len(self.file) and self.source.count is None:
            limit = min(limit, _TRIED + self.batch_size)
        while len(self.jobs) < self.most and self.next < limit:
            # A killed run can leave gaps before what it has: they are filled even if there are records enough.
            if len(self.file) + len(self.jobs) >= self.tally.wanted and self.next >= self.file.last(self.tally.wanted):
                return
            index, self.next = self.next, self.next + 1
            if index not in self.file:
                job = self.source.job(index)
                self._go_on(index, job, job.start())

    def _take(self, answer: Answer) -> None:
        index, job = self.jobs.pop(answer.id)
        self.tally.tokens += len(answer.tokens)
        self._go_on(index, job, job.take(answer) if answer.error is None else _FAILED)

    def _go_on(self, index: int, job: Job, outcome: Record | str | None) -> None:
        """With a job that has an outcome, or is to decode more."""
        if job.key is not None and self.file.is_duplicate(index, job.key):
            outcome = _DUPLICATE
        if outcome is None:
            try:
                self.jobs[self.engine.add(job.request())] = (index, job)
            except InputError as error:  # a token that the model has no row for
                outcome = str(error)
            else:
                return
        if isinstance(outcome, str):
            self.tally.dropped[outcome] += 1
            self.file.add({"index": index, "dropped": outcome})
        else:
            self.file.add({"index": index, **outcome, **self.source.every})
            self.tally.records = len(self.file)
        self.on_progress(self.tally)

    def _too_few(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.tally.dropped.most_common())
        found = f"{len(self.file)} of the {self.tally.wanted} records that are wanted are usable"
        return f"{self.target.name}: {found}, after {self.next} tries ({reasons}); {self.source.advice}"
