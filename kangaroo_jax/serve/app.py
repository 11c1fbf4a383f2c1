"""The server's application: OpenAI's endpoints, health, metrics and the page."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import importlib.resources
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from kangaroo_jax.checkpoint.adapter import TrainedAdapter
from kangaroo_jax.checkpoint.target import Target
from kangaroo_jax.config import DraftConfig, EngineConfig, ServeConfig
from kangaroo_jax.engine.engine import Engine
from kangaroo_jax.errors import InputError
from kangaroo_jax.serve.answer_response import AnswerResponse
from kangaroo_jax.serve.api_error import ApiError, error_response, json_response
from kangaroo_jax.serve.api_requests import Asked, parse_chat, parse_completion
from kangaroo_jax.serve.engine_thread import EngineThread, Job
from kangaroo_jax.serve.guards import AccessLog, Gate, read_json
from kangaroo_jax.serve.metrics import Metrics
from kangaroo_jax.serve.prompt_encoder import PromptEncoder
from kangaroo_jax.serve.replies import ChatReply, CompletionReply


class Server:
    """Serves one target.

    Args:
      target: from `load_target`, with a tokenizer; its name is the model's in the API.
      adapter: from `load_adapter`; None decodes plainly.
      engine: slots, and the most tokens of a prompt and its answer.
      draft: how to draft.
      config: what is taken from clients.
      log: takes the fields of a line of the access log.
      on_failure: takes the traceback of a bug.

    Raises:
      InputError: as `Engine`, or for a target without a tokenizer.
    """

    def __init__(
        self,
        target: Target,
        adapter: TrainedAdapter | None,
        engine: EngineConfig,
        draft: DraftConfig,
        config: ServeConfig,
        log: Callable[[Mapping[str, Any]], None],
        on_failure: Callable[[str], None],
    ):
        if target.tokenizer is None:
            raise InputError(f"{target.name}: has no tokenizer; put its tokenizer files beside it")
        self._target, self._adapter, self._config = target, adapter, config
        # More would not be computed right: the context is what the model was trained for.
        length = min(engine.max_length or target.config.context, target.config.context)
        self._engine_config, self._draft = EngineConfig(engine.max_batch, length, online=True), draft
        self._make_engine(plain=False)  # refuses what cannot be, before anything listens
        self._metrics = Metrics()
        self._encoder = PromptEncoder(target, length)
        self._tokenizer = copy.deepcopy(target.tokenizer)  # of replies, which are made on neither of the two threads
        slots = engine.max_batch
        self._thread = EngineThread(
            self._make_engine, slots + config.queue_size, slots, self._metrics.event, on_failure
        )
        self._metrics.watch(self._thread, slots)
        self._page, self._page_headers = _page()
        self._created = int(time.time())
        self.app = self._application(log, on_failure)

    @property
    def ready(self) -> bool:
        """Whether requests are answered without waiting for the engine to begin."""
        return self._thread.alive and self._thread.ready

    @property
    def compile_seconds(self) -> float:
        """Of all compilation so far."""
        return self._thread.compile_seconds

    def _make_engine(self, plain: bool) -> Engine:
        # With as many slots for both: on a CPU, empty ones take their time too, and a comparison should be a fair one.
        adapter, draft = (None, DraftConfig()) if plain else (self._adapter, self._draft)
        return Engine(self._target, adapter, self._engine_config, draft)

    def _application(self, log: Callable[[Mapping[str, Any]], None], on_failure: Callable[[str], None]) -> ASGIApp:
        routes = [
            Route("/", self._show_page),
            Route("/v1/models", self._models),
            Route("/v1/models/{name:path}", self._models),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/completions", self._completion, methods=["POST"]),
            Route("/health", self._ready),
            Route("/health/live", self._live),
            Route("/health/ready", self._ready),
            Route("/metrics", self._show_metrics),
        ]
        around = [Middleware(Gate, config=self._config)]
        if self._config.allow_origins:
            around.insert(
                0,
                Middleware(
                    CORSMiddleware,
                    allow_origins=self._config.allow_origins,
                    allow_methods=["GET", "POST"],
                    allow_headers=["Authorization", "Content-Type"],
                    expose_headers=["X-Request-ID", "Retry-After"],
                ),
            )
        inner = Starlette(
            routes=routes,
            middleware=around,
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _bug},
        )
        paths = frozenset(route.path for route in routes if "{" not in route.path)
        return AccessLog(inner, log, self._metrics.response, paths, lambda error: on_failure(_traceback(error)))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        self._thread.start()
        yield
        await self._thread.stop()
        self._encoder.close()

    # --- Endpoints.

    async def _show_page(self, _: Request) -> Response:
        return Response(self._page, 200, self._page_headers, "text/html")

    async def _models(self, request: Request) -> Response:
        name = request.path_params.get("name")
        if name not in (None, self._target.name):
            raise ApiError(404, f"there is no model {name[:60]!r} here", "model_not_found", "model")
        model = {
            "id": self._target.name,
            "object": "model",
            "created": self._created,
            "owned_by": "kangaroo-jax",
            "kangaroo": {
                "chat": bool(self._target.tokenizer.chat_template),
                "drafts": self._adapter is not None or self._draft.lookup is not None,
                "context": self._engine_config.max_length,
            },
        }
        return json_response(model if name is not None else {"object": "list", "data": [model]})

    async def _ready(self, _: Request) -> Response:
        return json_response({"ready": self.ready, "live": self._thread.alive}, 200 if self.ready else 503)

    async def _live(self, _: Request) -> Response:
        return json_response({"live": self._thread.alive}, 200 if self._thread.alive else 503)

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _chat(self, request: Request) -> ASGIApp:
        asked = parse_chat(await read_json(request, self._config.max_body_bytes), self._target.name, self._config)
        return await self._answer(request, asked, ChatReply(self._target.name))

    async def _completion(self, request: Request) -> ASGIApp:
        asked = parse_completion(await read_json(request, self._config.max_body_bytes), self._target.name, self._config)
        return await self._answer(request, asked, CompletionReply(self._target.name))

    async def _answer(self, request: Request, asked: Asked, reply: CompletionReply) -> ASGIApp:
        self._thread.check_room(asked.choices)  # before the work of encoding
        prompts, requests = await self._encoder.requests(asked)
        job = Job(requests, asked.plain and self._adapter is not None, self._config.deadline)
        self._thread.submit(job)
        return AnswerResponse(self._thread, job, asked, prompts, reply, self._tokenizer, request.scope["kangaroo_log"])


async def _api_error(request: Request, error: ApiError) -> Response:
    request.scope["kangaroo_log"]["code"] = error.code
    return error_response(error)


async def _http_error(request: Request, error: HTTPException) -> Response:
    messages = {404: "there is nothing at this path", 405: "this path does not take this method"}
    return await _api_error(
        request,
        ApiError(
            error.status_code,
            messages.get(error.status_code, str(error.detail)),
            "not_found" if error.status_code == 404 else "not_allowed",
            headers=dict(error.headers or {}),
        ),
    )


async def _bug(request: Request, _: Exception) -> Response:
    return await _api_error(request, ApiError(500, "the server failed; its log says why", "internal_error"))


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that let it run its own script and style, ask this server, and nothing else."""
    page = importlib.resources.files("kangaroo_jax.serve").joinpath("page.html").read_bytes()
    allowed = {}
    for name in ("style", "script"):
        parts = re.findall(rf"<{name}>(.*?)</{name}>".encode(), page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(part).digest()).decode() for part in parts)
        allowed[name] = " ".join(f"'sha256-{each}'" for each in hashes)
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {"Content-Security-Policy": policy}
