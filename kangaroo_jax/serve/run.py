"""Runs the application under uvicorn, and ends it in order."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from kangaroo_jax.errors import MachineError

_HEADER_BYTES = 32 * 1024  # of a request
_CONNECTIONS = 1000
_BACKLOG = 512
_BACKGROUND_GRACE = 5.0  # seconds


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 takes a free one.

    Raises:
      MachineError: for an address that cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MachineError(f"cannot listen on {host} port {port} ({reason}); give another --host or --port") from None


def uvicorn_server(app: ASGIApp, grace: float) -> uvicorn.Server:
    """A server of the application. `grace`: seconds that responses have to end when it is told to stop."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",  # which bounds a request's headers
            h11_max_incomplete_event_size=_HEADER_BYTES,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=math.ceil(grace),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
        )
    )


@contextlib.contextmanager
def in_background(app: ASGIApp) -> Iterator[tuple[str, int]]:
    """Serves in a thread of this process, on a free port of the loopback interface; gives host and port."""
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn_server(app, _BACKGROUND_GRACE)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="server")
        thread.start()
        try:
            yield sock.getsockname()[:2]
        finally:
            server.should_exit = True
            thread.join()
