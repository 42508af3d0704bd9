"""Owns the HTTP endpoints over an Engine; refuses scheduling, sockets and signals.

POST /v1/chat/completions, /v1/completions    plain and SSE
GET  /v1/models                               the one model
GET  /health                                  200 ready, 503 loading, failed or stopping
GET  /load                                    counts and measured rates, versioned
GET  /tokenizer, POST /tokenize               for who counts tokens elsewhere
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import orjson
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_engine import calls
from local_engine.answer import Answer, Calling, Events, Identity, Whole, error_response
from local_engine.config import Settings
from local_engine.conversation import Conversation
from local_engine.engine import Engine, Job, Model, State
from local_engine.errors import (
    BodyTooLarge,
    ContextLengthExceeded,
    GenerationFailed,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RequestError,
)
from local_engine.grammar import Grammar, Wanted
from local_engine.output import Output
from local_engine.protocol import (
    GenerationRequest,
    TokenizeRequest,
    parse_chat,
    parse_completion,
    parse_request_id,
    parse_tokenize,
    parse_wishes,
)
from local_engine.sequence import SamplingParams
from local_engine.text import Text

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 32 * 1024 * 1024

THREADED_BYTES = 16_384
"""Bodies above this are read and encoded on another thread: about 5 ms of tokenizing would hold up every stream."""

Parsed = TypeVar("Parsed", GenerationRequest, TokenizeRequest)


def create_app(engine: Engine, settings: Settings, *, clock: Callable[[], float] = time.time) -> ASGIApp:
    """The ASGI app; `clock` gives seconds since the epoch."""
    endpoints = _Endpoints(engine, settings, clock)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/models", endpoints.models),
            Route("/health", endpoints.health),
            Route("/load", endpoints.load),
            Route("/tokenizer", endpoints.tokenizer),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
        ],
        exception_handlers={RequestError: _request_error, HTTPException: _http_error, Exception: _unexpected},
    )
    return _Edge(app)


class _Endpoints:
    """The endpoints' bound methods. Invariant: holds nothing of any request."""

    def __init__(self, engine: Engine, settings: Settings, clock: Callable[[], float]) -> None:
        self._engine = engine
        self._settings = settings
        self._clock = clock

    async def chat(self, request: Request) -> ASGIApp:
        return await self._generate(request, parse_chat)

    async def completions(self, request: Request) -> ASGIApp:
        return await self._generate(request, parse_completion)

    async def models(self, request: Request) -> Response:
        model = {"id": self._settings.name, "object": "model", "created": 0, "owned_by": "hybridgate"}
        return _json({"object": "list", "data": [model]})

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
                "acceptance": None,
            }
        )

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
        if wanted.model is not None and wanted.model != self._settings.name:
            raise ModelNotFound(f"this engine serves {self._settings.name} only", param="model")
        family = model.text.family
        grammar = await self._grammar(model, wanted)
        params = _params(wanted, _max_tokens(len(prompt), wanted, self._settings.default_max_tokens, model))
        if any(token >= model.text.vocab_size for token, _ in params.logit_bias):
            raise InvalidRequest(f"logit_bias: token ids must be below {model.text.vocab_size}", param="logit_bias")
        answer_id = ("chatcmpl-" if wanted.chat else "cmpl-") + uuid.uuid4().hex
        job = Job(
            answer_id,
            tuple(prompt),
            params,
            wishes.priority,
            wishes.first_token_by,
            grammar,
            salt=wanted.cache_salt.encode(),
            shown=frozenset() if wanted.tools is None or family is None else frozenset(family.marks),
        )
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

    async def _grammar(self, model: Model, wanted: GenerationRequest) -> Grammar | None:
        structure = _structure(model, wanted)
        if structure is None:
            return None
        if model.grammars is None:
            raise InvalidRequest("this model's tokenizer cannot follow a structure", param=structure.param)
        return await asyncio.to_thread(model.grammars.compiled, structure)

    def _added(self, job: Job, choices: int) -> list[Output]:
        """All choices of a request, or none of them. Each after the first draws from a seed of its own."""
        outputs: list[Output] = []
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


def _structure(model: Model, wanted: GenerationRequest) -> Wanted | None:
    """What the answer must look like: calls where one is required, or what a structure says, or either of them. Raises
    InvalidRequest where both cannot be had."""
    tools, structure, text = wanted.tools, wanted.structure, model.text
    if tools is None or text.family is None:
        return structure
    if not tools.must and structure is None:
        return None
    if structure is not None and (tools.must or structure.kind != "json_schema"):
        raise InvalidRequest(
            f"tools and {structure.param}: only a JSON Schema goes together with tools, and only where no call is "
            "required",
            param=structure.param,
        )
    form = calls.grammar(
        text.family,
        tools.callable,
        text.special_token,
        parallel=tools.parallel,
        or_answer=None if structure is None else structure.text,
    )
    return Wanted("lark", form, "tools")


def _params(wanted: GenerationRequest, max_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=wanted.temperature,
        top_p=wanted.top_p,
        top_k=wanted.top_k,
        seed=wanted.seed,
        stop=wanted.stop,
        min_p=wanted.min_p,
        repetition_penalty=wanted.repetition_penalty,
        presence_penalty=wanted.presence_penalty,
        frequency_penalty=wanted.frequency_penalty,
        logit_bias=wanted.logit_bias,
        min_tokens=min(wanted.min_tokens, max_tokens),
        ignore_eos=wanted.ignore_eos,
        logprobs=wanted.logprobs,
    )


def _max_tokens(prompt: int, wanted: GenerationRequest, default: int, model: Model) -> int:
    """How many tokens may be generated behind a prompt of so many. Raises InvalidRequest."""
    limit, asked = model.limits.capacity, wanted.max_tokens
    field = "messages" if wanted.chat else "prompt"
    which = "context window" if limit == model.limits.window else "KV cache"
    if prompt == 0:
        raise InvalidRequest("the prompt is empty", param=field)
    if prompt >= limit:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens, the model's {which} holds {limit} with the answer; shorten the prompt",
            param=field,
        )
    if asked is not None and prompt + asked > limit:
        raise ContextLengthExceeded(
            f"the prompt has {prompt} tokens and max_tokens is {asked}, together more than the {limit} of the model's "
            f"{which}; shorten one of them",
            param="max_tokens",
        )
    return asked if asked is not None else min(default, limit - prompt)


async def _read(body: bytes, parse: Callable[[bytes], Parsed], text: Text) -> tuple[Parsed, list[int]]:
    """The parsed body and its prompt's tokens; a long one is worked on in another thread. Raises InvalidRequest."""

    def read() -> tuple[Parsed, list[int]]:
        wanted = parse(body)
        return wanted, _encode(text, wanted)

    return await asyncio.to_thread(read) if len(body) > THREADED_BYTES else read()


def _encode(text: Text, wanted: GenerationRequest | TokenizeRequest) -> list[int]:
    """The prompt's tokens. Raises InvalidRequest."""
    prompt = wanted.prompt
    if isinstance(prompt, str):
        return text.encode(prompt, special_tokens=isinstance(wanted, GenerationRequest) or wanted.special_tokens)
    if isinstance(prompt, Conversation):
        return text.encode_chat(prompt)
    tokens = list(prompt)
    if tokens and max(tokens) >= text.vocab_size:
        raise InvalidRequest(f"prompt: token ids must be below {text.vocab_size}", param="prompt")
    return tokens


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


class _Edge:
    """The outermost app: request ids, and the last word on errors.

    Invariants: every response carries an x-request-id, the caller's if it is fit; nothing is answered twice; nothing
    that a caller sent is logged.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = parse_request_id(Headers(scope=scope)) or f"req-{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except Exception as error:  # noqa: BLE001 - the ASGI edge
            frames = "; ".join(
                f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-5:]
            )
            log.error("request %s failed: %s at %s", request_id, type(error).__name__, frames)
            if not started:
                await (await _unexpected(Request(scope), error))(scope, receive, send_with_id)


def _error(error: RequestError) -> Response:
    status, headers, body = error_response(error)
    return Response(body, status, headers, media_type="application/json")


async def _request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error)


async def _unexpected(request: Request, error: Exception) -> Response:
    return _error(GenerationFailed("the engine failed to answer"))


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return _error(MethodNotAllowed(f"this path takes {allow}", allow))
    if error.status_code == 404:
        return _error(NotFound("no such path"))
    return _error(InvalidRequest(error.detail))


def _json(body: object, *, status: int = 200) -> Response:
    return Response(orjson.dumps(body), status, media_type="application/json")


def _rounded(value: float | None, digits: int, scale: float = 1.0) -> float | None:
    return None if value is None else round(value * scale, digits)
