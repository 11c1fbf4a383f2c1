"""Errors in OpenAI's shape, and JSON responses."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
      status: HTTP status.
      message: one line: what is wrong, and how to fix it. Without paths, and nothing of other requests.
      code: for programs.
      param: the field that is wrong.
      headers: further headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, " ".join(message.split()), code, param
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The response's JSON value."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def encode(value: Any) -> bytes:
    """JSON, all in ASCII: what a client sent, and gets back in an error, may not be valid Unicode."""
    return json.dumps(value, separators=(",", ":")).encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON value as a response."""
    return Response(encode(value), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """An error as a response."""
    return json_response(error.body(), error.status, error.headers)
