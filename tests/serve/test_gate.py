"""Who may ask a server: API keys and the Host header. Without an engine."""

import asyncio

import httpx
import pytest

from kangaroo_jax import DraftConfig, EngineConfig
from kangaroo_jax.config import ServeConfig
from kangaroo_jax.serve.app import Server
from kangaroo_jax.serve.guards import Gate
from tests.bench.models import small_chat_target


def ask_gate(config, path="/v1/models", **headers):
    """The status that `Gate` gives."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    async def noted(scope, receive, send):
        await Gate(app, config)({**scope, "kangaroo_log": {}}, receive, send)

    async def ask():
        transport = httpx.ASGITransport(noted)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(ask()).status_code


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ("Bearer secret", 200),
        ("bearer other", 200),
        ("Bearer secre", 401),
        ("Bearer ", 401),
        ("Bearer secret ütf".encode(), 401),
        ("Basic secret", 401),
        ("secret", 401),
        (None, 401),
    ],
)
def test_api_keys(given, status):
    config = ServeConfig(api_keys=("secret", "other"))
    headers = {} if given is None else {"Authorization": given}
    assert ask_gate(config, **headers) == status
    assert ask_gate(config, "/health", **headers) == 200
    assert ask_gate(ServeConfig(), **headers) == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("chat.example.org", 200),
        ("evil.example", 403),
        ("", 403),
    ],
)
def test_a_loopback_server_is_not_asked_by_other_names(host, status):
    hosts, origins = ("localhost", "127.0.0.1", "[::1]"), ("https://chat.example.org",)
    assert ask_gate(ServeConfig(hosts=hosts, allow_origins=origins), Host=host) == status
    assert ask_gate(ServeConfig(), Host=host) == 200


@pytest.mark.parametrize(
    ("allowed", "origin", "answered"),
    [
        ((), "https://chat.example.org", False),
        (("https://chat.example.org",), "https://chat.example.org", True),
        (("https://chat.example.org",), "https://evil.example", False),
        (("*",), "https://evil.example", True),
    ],
)
def test_pages_of_other_sites(allowed, origin, answered):
    config = ServeConfig(allow_origins=allowed)
    ignore = lambda _: None  # noqa: E731
    server = Server(small_chat_target(), None, EngineConfig(1), DraftConfig(), config, ignore, ignore)
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}

    async def ask():
        transport = httpx.ASGITransport(server.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
            first = await client.options("/v1/completions", headers={"Origin": origin, **wanted})
            return first, await client.get("/v1/models", headers={"Origin": origin})

    first, models = asyncio.run(ask())
    assert (first.status_code == 200) == answered
    assert ("access-control-allow-origin" in models.headers) == answered
