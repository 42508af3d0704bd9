"""Owns the HTTP endpoints over an Engine; refuses scheduling, sockets and signals.

POST /v1/chat/completions, /v1/completions    plain and SSE
POST /v1/embeddings                           where an encoder model is configured
GET  /v1/models                               the models
GET  /health                                  200 ready, 503 loading, failed or stopping
GET  /load                                    counts and measured rates, versioned
GET  /metrics                                 the same and more, for Prometheus
GET  /tokenizer, POST /tokenize               for who counts tokens elsewhere
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from local_engine.answer import Answer, Calling, Events, Identity, Whole
from local_engine.config import Settings
from local_engine.edge import Edge, http_error, request_error, unexpected
from local_engine.engine import Engine, Job, Model
from local_engine.errors import (
    BodyTooLarge,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    RequestError,
)
from local_engine.jobs import encode, grammar_of, structured
from local_engine.jobs import job as job_of
from local_engine.metrics import CONTENT_TYPE, EngineMetrics
from local_engine.output import Output
from local_engine.protocol import (
    GenerationRequest,
    TokenizeRequest,
    parse_chat,
    parse_completion,
    parse_tokenize,
    parse_wishes,
)
from local_engine.report import State
from local_engine.text import Text
from local_engine.vectors import answer as embedding_answer
from local_engine.vectors import parse_embeddings

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 1024 * 1024

THREADED_BYTES = 16_384
"""Bodies above this are read and encoded on another thread: about 5 ms of tokenizing would hold up every stream."""

Parsed = TypeVar("Parsed", GenerationRequest, TokenizeRequest)


def create_app(
    engine: Engine, settings: Settings, *, token: str | None = None, clock: Callable[[], float] = time.time
) -> ASGIApp:
    """The ASGI app; who does not send the `token` is answered by /health and /metrics only; `clock` gives seconds since
    the epoch."""
    endpoints = _Endpoints(engine, settings, clock)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
            Route("/load", endpoints.load),
            Route("/metrics", endpoints.metrics),
            Route("/tokenizer", endpoints.tokenizer),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        ],
        exception_handlers={RequestError: request_error, HTTPException: http_error, Exception: unexpected},
    )
    return Edge(app, token)


class _Endpoints:
    """The endpoints' bound methods. Invariant: holds nothing of any request."""

    def __init__(self, engine: Engine, settings: Settings, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock
        self._metrics = EngineMetrics(engine)

    async def chat(self, request: Request) -> ASGIApp:
        return await self._generate(request, parse_chat)

    async def completions(self, request: Request) -> ASGIApp:
        return await self._generate(request, parse_completion)

    async def models(self, request: Request) -> Response:
        names = [name for name in (self._settings.name, self._settings.embedding_name) if name is not None]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "hybridgate"} for name in names]
        return _json({"object": "list", "data": models})

    async def embeddings(self, request: Request) -> Response:
        wanted = parse_embeddings(await _body(request))
        embedder = self._engine.model.embedder
        if embedder is None:
            raise NotFound("this engine gives no embeddings: start it with --embedding-model")
        if wanted.model is not None and wanted.model != embedder.name:
            raise ModelNotFound(f"embeddings are {embedder.name}'s only", param="model")
        if wanted.dimensions not in (None, embedder.dimensions):
            raise InvalidRequest(f"dimensions: this model gives {embedder.dimensions}", param="dimensions")
        found = await embedder.embed(wanted.input)
        return _json(embedding_answer(wanted, embedder.name, found))

    async def health(self, request: Request) -> Response:
        state = self._engine.state
        body = {"status": state.value, "model": self._settings.name}
        if self._engine.failure is not None:
            body["error"] = str(self._engine.failure)
        return _json(body, status=200 if state is State.READY else 503)

    async def load(self, request: Request) -> Response:
        report = self._engine.report()
        load, totals = report.load, report.totals
        return _json(
            {
                "version": 1,
                "waiting": load.waiting,
                "running": load.running,
                "max_running": self._engine.model.limits.max_running,
                "max_batch_tokens": self._engine.model.limits.max_batch_tokens,
                "queued_prefill_tokens": load.queued_prefill_tokens,
                "free_blocks": load.free_blocks,
                "total_blocks": load.total_blocks,
                "block_size": self._engine.model.limits.block_size,
                "prefill_tokens_per_second": _rounded(report.prefill_rate, 1),
                "decode_tokens_per_second": _rounded(report.decode_rate, 1),
                "step_ms": _rounded(report.step_seconds, 3, 1000),
                "steps_total": totals.steps,
                "aborted_total": totals.aborted,
                "finished_total": totals.finished,
                "preempted_total": report.preempted,
                "out_of_memory_total": report.shrunk,
                "prefix_asked_tokens_total": report.prefix_asked,
                "prefix_found_tokens_total": report.prefix_found,
                "guessed_tokens_total": report.guessed,
                "accepted_tokens_total": report.accepted,
                "acceptance": _rounded(report.acceptance, 3),
            }
        )

    async def metrics(self, request: Request) -> Response:
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def tokenizer(self, request: Request) -> Response:
        model = self._engine.model
        rest = {
            "chat_template": model.text.chat_template,
            "bos_token": model.text.bos_token,
            "eos_token": model.text.eos_token,
            "context_window": model.limits.capacity,
            "model": self._settings.name,
            "capabilities": _capabilities(model),
        }
        # A big vocabulary is megabytes of JSON already, so it is not parsed to be written again.
        tokenizer = (await asyncio.to_thread(model.text.tokenizer_json)).encode()
        return Response(b'{"tokenizer":' + tokenizer + b"," + orjson.dumps(rest)[1:], media_type="application/json")

    async def tokenize(self, request: Request) -> Response:
        model = self._engine.model
        _, tokens = await _read(await _body(request), parse_tokenize, model.text)
        return _json({"count": len(tokens), "context_window": model.limits.capacity, "tokens": tokens})

    async def _generate(self, request: Request, parse: Callable[[bytes], GenerationRequest]) -> ASGIApp:
        model = self._engine.model
        wishes = parse_wishes(request.headers)
        wanted, prompt = await _read(await _body(request), parse, model.text)
        if wanted.ignored:
            log.debug("fields that mean nothing here were ignored: %s", ", ".join(wanted.ignored))
        if wanted.model is not None and wanted.model != self._settings.name:
            raise ModelNotFound(f"this engine serves {self._settings.name} only", param="model")
        family = model.text.family
        grammar = await asyncio.to_thread(grammar_of, model, wanted) if structured(model, wanted) else None
        answer_id = ("chatcmpl-" if wanted.chat else "cmpl-") + uuid.uuid4().hex
        job = job_of(answer_id, model, wanted, prompt, self._settings.default_max_tokens, grammar, wishes)
        outputs = self._added(job, wanted.n)
        identity = Identity(
            answer_id, int(self._clock()), self._settings.name, wanted.chat, len(prompt), choices=wanted.n
        )
        piece = model.text.piece
        calling = None
        if wanted.tools is not None and family is not None:
            names = frozenset(tool.name for tool in wanted.tools.tools)
            calling = Calling(family, names, parallel=wanted.tools.parallel)
        if wanted.stream:
            return Answer(outputs, Events(identity, piece, include_usage=wanted.include_usage, calling=calling))
        return Answer(outputs, Whole(identity, piece, calling=calling))

    def _added(self, job: Job, choices: int) -> list[Output]:
        """All choices of a request, or none of them. Each after the first draws from a seed of its own."""
        outputs: list[Output] = []
        most = self._engine.model.limits.max_waiting
        if choices > most:  # which would be too many for now, always
            raise InvalidRequest(f"n: no more than {most} choices may wait at once (--max-waiting)", param="n")
        try:
            for index in range(choices):
                seed = job.params.seed
                params = replace(job.params, seed=None if seed is None else (seed + index) % 2**64)
                outputs.append(
                    self._engine.add(replace(job, id=f"{job.id}-{index}", params=params, like=f"{job.id}-0"))
                )
        except RequestError:
            for output in outputs:
                output.close()
            raise
        return outputs


def _capabilities(model: Model) -> list[str]:
    """What of `schema` and `tools` the model can be asked for."""
    able = {"schema": model.grammars is not None, "tools": model.text.family is not None}
    return [name for name, can in able.items() if can]


async def _read(body: bytes, parse: Callable[[bytes], Parsed], text: Text) -> tuple[Parsed, list[int]]:
    """The parsed body and its prompt's tokens; a long one is worked on in another thread. Raises InvalidRequest."""

    def read() -> tuple[Parsed, list[int]]:
        wanted = parse(body)
        return wanted, encode(text, wanted)

    return await asyncio.to_thread(read) if len(body) > THREADED_BYTES else read()


async def _body(request: Request) -> bytes:
    """The body, refused as soon as it is known to be above the limit. Raises BodyTooLarge."""
    too_large = BodyTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes")
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > MAX_BODY_BYTES:
        raise too_large
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _json(body: object, *, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _rounded(value: float | None, digits: int, scale: float = 1.0) -> float | None:
    return None if value is None else round(value * scale, digits)
