"""What stands around the application: who may ask, how much, and a line of the log for each request."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kangaroo_jax import json_text
from kangaroo_jax.config import ServeConfig
from kangaroo_jax.serve.api_error import ApiError, error_response

_BODY_SECONDS = 30.0  # that a client may take to send a body
_DISCARDED = 32  # times the limit: what is read of a body that is too long, so that the client gets to read the answer
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_QUIET = ("/health", "/metrics")  # asked for every few seconds, and not worth a line
_CLIENT_LEFT = 499  # nginx's status for it, in the log


async def read_json(request: Request, limit: int) -> Any:
    """A request's body, a JSON value.

    Raises:
      ApiError: for another content type, a body that is too long or takes too long, or what is not JSON.
      ClientDisconnect: where the client leaves before its end.
    """
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    # A page of another site can send anything but this without being asked for permission first.
    if kind != "application/json":
        raise ApiError(415, "the content type must be application/json", "unsupported_media_type")
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    body += piece
                elif size > _DISCARDED * limit:
                    break
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {_BODY_SECONDS:.0f} s", "body_timeout") from None
    if size > limit:
        raise ApiError(413, f"the body must be at most {limit} bytes", "body_too_large")
    try:
        return json_text.parse(bytes(body))
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON ({error})", "invalid_json") from None


class Gate:
    """Lets through what comes to an allowed host and, under /v1, with an API key."""

    def __init__(self, app: ASGIApp, config: ServeConfig):
        self._app = app
        self._keys = [key.encode() for key in config.api_keys]
        # A proxy in front of the server, and pages of allowed origins beside it, go by the origin's name.
        origins = (re.sub(r"^\w+://|:\d+$", "", origin) for origin in config.allow_origins)
        self._hosts = {host.lower() for host in (*config.hosts, *origins)} if config.hosts else {"*"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                self._check_host(headers.get("host", ""))
                if scope["path"].startswith("/v1") and scope["method"] != "OPTIONS":
                    self._check_key(headers.get("authorization", ""))
            except ApiError as error:
                scope["kangaroo_log"]["code"] = error.code
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check_host(self, host: str) -> None:
        name = re.sub(r":\d*$", "", host).lower()
        if "*" not in self._hosts and name not in self._hosts:
            raise ApiError(403, "this server is not known by the name in the Host header", "unknown_host")

    def _check_key(self, given: str) -> None:
        kind, _, key = given.partition(" ")
        # All are compared, each in constant time: how long it takes says nothing about them.
        found = [hmac.compare_digest(key.strip().encode("utf-8", "replace"), known) for known in self._keys]
        if self._keys and not (any(found) and kind.lower() == "bearer"):
            raise ApiError(
                401,
                "an API key is needed; send it as `Authorization: Bearer KEY`",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )


class AccessLog:
    """Writes a line per request, with what the application has noted in `scope["kangaroo_log"]`, and adds headers that
    all responses have.

    Args:
      app: the application.
      log: takes a line's fields.
      count: takes path, status and an error's code.
      paths: that the server has; others are not told apart in `count`, as anyone can make them up.
      on_failure: takes the exception of a bug.
    """

    def __init__(
        self,
        app: ASGIApp,
        log: Callable[[Mapping[str, Any]], None],
        count: Callable[[str, int, str | None], None],
        paths: frozenset[str],
        on_failure: Callable[[BaseException], None],
    ):
        self._app, self._log, self._count, self._paths, self._on_failure = app, log, count, paths, on_failure

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        noted: dict[str, Any] = {}
        scope["kangaroo_log"] = noted
        start, id, status = time.monotonic(), uuid.uuid4().hex, None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        left = False
        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            left, noted["code"] = True, "client_left"
        except Exception as error:
            noted["code"] = "internal_error"
            self._on_failure(error)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            final = _CLIENT_LEFT if left or status is None else status
            self._count(path, final, noted.get("code"))
            if not path.startswith(_QUIET):
                self._log(self._line(scope, id, final, start) | noted)

    @staticmethod
    def _line(scope: Scope, id: str, status: int, start: float) -> dict[str, Any]:
        client = scope.get("client")
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": status,
            "seconds": round(time.monotonic() - start, 4),
        }
