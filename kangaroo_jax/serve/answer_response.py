"""Answers as a response, complete or as they come. Where the client leaves, its sequences end."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from kangaroo_jax.engine.draft_spans import DraftSpans
from kangaroo_jax.engine.requests import Answer, Finished
from kangaroo_jax.serve.api_error import ApiError, encode, error_response, json_response
from kangaroo_jax.serve.api_requests import Asked
from kangaroo_jax.serve.engine_thread import EngineThread, Job
from kangaroo_jax.serve.replies import CompletionReply, usage_of

_SEND_PATIENCE = 60.0  # seconds that a client may take to read a piece of its answer


class AnswerResponse:
    """The response to a request for answers, an ASGI application.

    Args:
      thread: that the job runs on.
      job: that is submitted.
      asked: what for.
      prompts: token ids.
      reply: the response's shape.
      tokenizer: of the target.
      noted: fields of the request's line in the log.
    """

    def __init__(
        self,
        thread: EngineThread,
        job: Job,
        asked: Asked,
        prompts: list[list[int]],
        reply: CompletionReply,
        tokenizer: Any,
        noted: dict[str, Any],
    ):
        self._thread, self._tokenizer = thread, tokenizer
        self._job, self._asked, self._prompts, self._reply, self._noted = job, asked, prompts, reply, noted
        self._answers: dict[int, Answer] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._send_stream(send) if self._asked.stream else self._send_complete(send))
        left = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            await work
        finally:
            self._thread.cancel(self._job)
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)
            self._noted["new_tokens"] = sum(len(answer.tokens) for answer in self._answers.values())

    async def _send_complete(self, send: Send) -> None:
        try:
            async for index, event in self._job.events():
                self._note(index, event)
            answers = self._in_order()
            response = json_response(self._reply.complete(answers, self._usage(answers)))
        except ApiError as error:
            self._noted["code"] = error.code
            response = error_response(error)
        await self._send(send, response.status_code, response.raw_headers, response.body)

    async def _send_stream(self, send: Send) -> None:
        begun: set[int] = set()
        spans = {}
        if self._asked.drafts:
            spans = {i: DraftSpans(self._tokenizer, r.prompt) for i, r in enumerate(self._job.requests)}
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
        started = False
        try:
            async for index, event in self._job.events():
                self._note(index, event)
                chunks = []
                if index not in begun:
                    begun.add(index)
                    chunks.append(self._reply.begin(index))
                if isinstance(event, Finished):
                    rest = spans[index].finish(event.answer) if spans else None
                    chunks.append(self._reply.end(index, event.answer, rest))
                else:
                    known = spans[index].feed(event) if spans else None
                    if event.text or known:
                        chunks.append(self._reply.delta(index, event.text, known))
                lines = [chunk for chunk in chunks if chunk is not None]
                if not started:
                    # Not before: an error that comes first has a status of its own.
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    started = True
                if lines:
                    await self._send_lines(send, lines)
            answers = self._in_order()
            usage = self._usage(answers)
            await self._send_lines(send, [self._reply.usage(usage)] if self._asked.include_usage else [])
            await _patiently(send({"type": "http.response.body", "body": b"data: [DONE]\n\n"}))
        except ApiError as error:
            self._noted["code"] = error.code
            if not started:
                response = error_response(error)
                await self._send(send, response.status_code, response.raw_headers, response.body)
                return
            await _patiently(send({"type": "http.response.body", "body": _line(error.body())}))

    def _note(self, index: int, event: Any) -> None:
        if isinstance(event, Finished):
            self._answers[index] = event.answer
            if event.answer.error is not None:
                raise ApiError(500, event.answer.error, "not_numbers")

    def _in_order(self) -> list[Answer]:
        return [self._answers[i] for i in range(len(self._job.requests))]

    def _usage(self, answers: list[Answer]) -> dict[str, Any]:
        usage = usage_of(self._prompts, answers)
        own = usage["kangaroo"]
        self._noted |= {
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "rounds": own["rounds"],
            "accept_length": own["accept_length"],
            "finish_reasons": [answer.finish_reason for answer in answers],
        }
        return usage

    async def _send_lines(self, send: Send, chunks: list[dict[str, Any]]) -> None:
        body = b"".join(map(_line, chunks))
        if body:
            await _patiently(send({"type": "http.response.body", "body": body, "more_body": True}))

    async def _send(self, send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await _patiently(send({"type": "http.response.body", "body": body}))


async def _patiently(sending: Any) -> None:
    """Sends; a client that does not read for long is taken to have left."""
    try:
        async with asyncio.timeout(_SEND_PATIENCE):
            await sending
    except TimeoutError:
        raise ClientDisconnect from None


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _line(value: Any) -> bytes:
    """An event of a stream of server-sent events."""
    return b"data: " + encode(value) + b"\n\n"
