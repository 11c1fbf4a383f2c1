"""The engine on a thread of its own: requests go in through a queue, and events come out through one per client."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from kangaroo_jax.config import SamplingConfig
from kangaroo_jax.engine.engine import Engine
from kangaroo_jax.engine.requests import Event, Finished, Request
from kangaroo_jax.errors import InputError
from kangaroo_jax.serve.api_error import ApiError

_WARM_UP = 8  # tokens: enough for a round
_STOP_PATIENCE = 30.0  # seconds that a step may take to end when the server stops


class Job:
    """The sequences that one client waits for.

    Attributes:
      requests: one for each sequence.
      plain: whether they are decoded plainly.
      deadline: when it ends in any case, on `time.monotonic`'s clock.
      submitted: when it began to wait, on the same clock.
    """

    def __init__(self, requests: Sequence[Request], plain: bool, deadline: float):
        self.requests, self.plain = requests, plain
        self.submitted = time.monotonic()
        self.deadline = self.submitted + deadline
        self.left = len(requests)  # sequences that have not ended
        self.inbox: asyncio.Queue[tuple[int, Event | ApiError]] = asyncio.Queue()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """The sequences' events with the place of each, up to the last `Finished`.

        Raises:
          ApiError: where the job ends without one.
        """
        for _ in self.requests:
            event: Event | None = None
            while not isinstance(event, Finished):
                index, event = await self.inbox.get()
                if isinstance(event, ApiError):
                    raise event
                yield index, event


class EngineThread:
    """Runs jobs in engines.

    Its methods belong to the event loop that `start` is called in.

    Args:
      make_engine: gives an engine; its argument says whether it decodes plainly. One of each kind runs, on the same
        thread: the plain one is there to compare.
      capacity: sequences that may run or wait.
      slots: sequences that run at a time.
      on_event: called with a job, the place of a sequence in it and what has become of that.
      on_failure: called with a traceback where the engine fails, which is a bug.
    """

    def __init__(
        self,
        make_engine: Callable[[bool], Engine],
        capacity: int,
        slots: int,
        on_event: Callable[[Job, int, Event | ApiError], None],
        on_failure: Callable[[str], None],
    ):
        self._make_engine = make_engine
        self._capacity, self._slots = capacity, slots
        self._on_event, self._on_failure = on_event, on_failure
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._job_seconds = 1.0  # of recent jobs
        self._open: set[Job] = set()
        self.active = 0  # sequences that run or wait
        self.ready = False
        # Of the thread alone:
        self._engines: dict[bool, Engine] = {}
        self._sequences: dict[tuple[bool, int], tuple[Job, int]] = {}
        self._jobs: dict[Job, list[tuple[bool, int]]] = {}

    # --- On the event loop.

    def start(self) -> None:
        """Starts the thread. It decodes a few tokens first, and is ready after that."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread; what runs is dropped."""
        self.ready = False
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join, _STOP_PATIENCE)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(engine.waiting for engine in list(self._engines.values()))

    @property
    def compile_seconds(self) -> float:
        """Of all compilation so far."""
        return sum(engine.compile_seconds for engine in list(self._engines.values()))

    def check_room(self, sequences: int) -> None:
        """Raises `ApiError` where so many more sequences have no place."""
        if not self.alive:
            raise ApiError(503, "the engine has stopped", "engine_stopped")
        if self.active + sequences > self._capacity:
            turns = max(1.0, (self.active - self._slots) / self._slots)
            seconds = min(60, max(1, round(turns * self._job_seconds)))
            raise ApiError(
                429,
                f"{self.active} sequences run or wait, and {self._capacity} may; try again in {seconds} s",
                "queue_full",
                headers={"Retry-After": str(seconds)},
            )

    def submit(self, job: Job) -> None:
        """Queues a job; raises `ApiError` where it has no place."""
        self.check_room(job.left)
        self.active += job.left
        self._open.add(job)
        self._commands.put(lambda: self._add(job))

    def cancel(self, job: Job) -> None:
        """Ends a job, if it has not ended: its slots are free before the next round."""
        if job.left:
            self._close(job)
            self._commands.put(lambda: self._abort(job))

    def _deliver(self, events: Sequence[tuple[Job, int, Event | ApiError]]) -> None:
        for job, index, event in events:
            if not job.left:
                continue
            if isinstance(event, ApiError):
                self._close(job)
            elif isinstance(event, Finished):
                self.active -= 1
                job.left -= 1
                if not job.left:
                    self._close(job)
                self._job_seconds += 0.2 * (event.answer.seconds - self._job_seconds)
            self._on_event(job, index, event)
            job.inbox.put_nowait((index, event))

    def _close(self, job: Job) -> None:
        self.active -= job.left
        job.left = 0
        self._open.discard(job)

    def _end_all(self) -> None:
        """Ends what is left when the thread has ended."""
        error = ApiError(503, "the engine has stopped", "engine_stopped")
        self._deliver([(job, 0, error) for job in list(self._open)])

    # --- On the thread.

    def _work(self) -> None:
        try:
            self._warm_up()
            self.ready = True
            while self._take_commands():
                self._end_late_jobs()
                self._step()
        except BaseException:
            self._on_failure(traceback.format_exc())
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._end_all)

    def _engine(self, plain: bool) -> Engine:
        if plain not in self._engines:
            self._engines[plain] = self._make_engine(plain)
        return self._engines[plain]

    def _warm_up(self) -> None:
        """Compiles what short prompts need, and shows that the device works."""
        engine = self._engine(False)
        # Sampled first: where compiling takes long, that program then serves greedy requests as well.
        for temperature in (1.0, 0.0):
            sampling = SamplingConfig(temperature)
            engine.add(Request([0], _WARM_UP, sampling, eos_token_ids=(), stream=False, to_context=True))
            while engine.busy:
                engine.step()

    def _take_commands(self) -> bool:
        """Does what the event loop asked for, and waits for that where nothing runs; False at the end."""
        block = not self._sequences
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
            block = False

    def _add(self, job: Job) -> None:
        ids: list[tuple[bool, int]] = []
        self._jobs[job] = ids
        try:
            for index, request in enumerate(job.requests):
                key = (job.plain, self._engine(job.plain).add(request))
                ids.append(key)
                self._sequences[key] = (job, index)
        except InputError as error:
            self._end(job, ApiError(400, str(error), "invalid_value"))
        except Exception:  # the engine has not changed
            self._on_failure(traceback.format_exc())
            self._end(job, _engine_failed())

    def _abort(self, job: Job) -> None:
        for plain, id in self._jobs.pop(job, ()):
            if self._sequences.pop((plain, id), None) is not None:
                self._engine(plain).abort(id)

    def _end_late_jobs(self) -> None:
        now = time.monotonic()
        for job in [job for job in self._jobs if job.deadline < now]:
            seconds = round(job.deadline - job.submitted)
            message = f"no complete answer within {seconds} s; ask for less, or try again later"
            self._end(job, ApiError(504, message, "deadline_exceeded"))

    def _end(self, job: Job, error: ApiError) -> None:
        self._abort(job)
        self._send([(job, 0, error)])

    def _step(self) -> None:
        for plain, engine in list(self._engines.items()):
            if not engine.busy:
                continue
            try:
                events = engine.step()
            except Exception:
                # Its arrays are lost, as a step takes and gives them. The weights are not.
                self._on_failure(traceback.format_exc())
                del self._engines[plain]
                self._fail([job for job in self._jobs if job.plain == plain])
                continue
            if events:
                self._send([(*self._place(plain, event), event) for event in events])

    def _place(self, plain: bool, event: Event) -> tuple[Job, int]:
        if not isinstance(event, Finished):
            return self._sequences[plain, event.id]
        job, index = self._sequences.pop((plain, event.id))
        if all(key not in self._sequences for key in self._jobs[job]):
            del self._jobs[job]
        return job, index

    def _fail(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            for key in self._jobs.pop(job):
                self._sequences.pop(key, None)
            self._send([(job, 0, _engine_failed())])

    def _send(self, events: Sequence[tuple[Job, int, Event | ApiError]]) -> None:
        # One call for all of a step: each wakes the event loop.
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._deliver, events)


def _engine_failed() -> ApiError:
    return ApiError(500, "the engine failed; the server's log says why", "engine_failed")
