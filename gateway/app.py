"""Builds every object and passes it in; owns start, stop, and the list of routes.

Nothing here decides anything. `build` makes the objects, `Gateway.lifespan` starts what needs a running loop, `Gateway`
answers the small questions (`/v1/models`, `/livez`, `/readyz`); the rest is chat.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import certifi
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gateway.backends import Backends
from gateway.backends.base import Backend, Chunk
from gateway.backends.cloud import CloudBackend, CloudLibrary
from gateway.backends.openai import OpenAIBackend
from gateway.backends.upstream import AiohttpUpstream
from gateway.chat import ChatPath, Log, Reply, Serving
from gateway.edge import Endpoint, headers_of
from gateway.encodings import load_encoding
from gateway.errors import GatewayError, MethodNotAllowed, NotFound, body_of, status_of
from gateway.explain import explanation
from gateway.facts import knows, request_id_of
from gateway.fleet import Fleet
from gateway.labels import Scanner
from gateway.policy import AUTO, Policy
from gateway.settings import Settings
from gateway.supervisor import EngineSpec, Supervisor
from gateway.tokens import LocalTokenizer, TiktokenCounter, TokenCounter
from gateway.types import ON_PREMISES, Deployment

Tell = Callable[[str], None]

# The detectors' automaton is built as text passes through it; this is passed through before the first request is.
_PROSE = (
    "In 2026, e-mail a-b.c@example to +1 (555) 010-0199; def f(x: int) -> str: return f'{x:>10}' # 0xFF, {[~^|]}\n" * 20
)


def new_id() -> str:
    """16 hexadecimal digits of the operating system's chance."""
    return os.urandom(8).hex()


def serving_of(policy: Policy, counters: Mapping[str, TokenCounter]) -> Serving:
    """A policy with its compiled detectors and whatever token counters are loaded by now."""
    return Serving(policy, Scanner(policy.kinds), counters)


def backend_of(deployment: Deployment, sockets: Mapping[str, str], library: CloudLibrary) -> Backend:
    """The backend that a deployment's declaration asks for. `sockets`: Unix socket by name of those that are served
    locally."""
    if deployment.backend == "litellm":
        return CloudBackend(deployment, library)
    connect = deployment.timeouts.connect
    if deployment.served_locally:
        upstream = AiohttpUpstream("http://engine/v1", connect=connect, uds=sockets[deployment.name])
    else:
        url = deployment.urls[0] if deployment.urls else "http://unconfigured.invalid"
        upstream = AiohttpUpstream(
            url,
            connect=connect,
            trust_env=deployment.zone != ON_PREMISES,
            authorities=authorities_of(deployment) if url.startswith("https:") else None,
        )
    return OpenAIBackend(deployment, upstream)


def authorities_of(deployment: Deployment) -> ssl.SSLContext | None:
    """Whom to trust for an https address. On premises that is never what the environment says. Raises OSError where
    the deployment's file cannot be read."""
    if deployment.ca_file is not None:
        return ssl.create_default_context(cafile=deployment.ca_file)
    return ssl.create_default_context(cafile=certifi.where()) if deployment.zone == ON_PREMISES else None


class Gateway:
    """The running gateway. Invariant: what lifespan starts, lifespan stops: engines, connections, and the folder of the
    sockets."""

    def __init__(self, settings: Settings, policy: Policy, log: Log, tell: Tell) -> None:
        self._settings = settings
        self._log = log
        self._tell = tell
        self._folder = Path(tempfile.mkdtemp(prefix="hybridgate-"))
        local = [d for d in policy.deployments.values() if d.served_locally and d.unavailable is None]
        sockets = {d.name: str(self._folder / f"{number}.sock") for number, d in enumerate(local)}
        self._library = CloudLibrary()
        reachable = [d for d in policy.deployments.values() if d.unavailable is None]
        self._backends = Backends({d.name: backend_of(d, sockets, self._library) for d in reachable})
        self.fleet = Fleet(policy.deployments)
        self.supervisors = {
            d.name: Supervisor(EngineSpec(d.name, d.model, sockets[d.name], settings.engine_start_seconds), self)
            for d in local
        }
        self.path = ChatPath(serving_of(policy, {}), self._backends, self.fleet, log, time.monotonic, new_id)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Start engines and warm what is slow the first time; stop all of it in the end."""
        warming = asyncio.create_task(self._warm())
        for supervisor in self.supervisors.values():
            supervisor.start()
        try:
            yield
        finally:
            warming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await warming
            await asyncio.gather(*(supervisor.stop() for supervisor in self.supervisors.values()))
            await self._backends.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    async def _warm(self) -> None:
        deployments = [d for d in self.path.serving.policy.deployments.values() if d.unavailable is None]
        for name in sorted({d.tokenizer for d in deployments if d.tokenizer.startswith("tiktoken:")}):
            counter = TiktokenCounter(await asyncio.to_thread(load_encoding, name.removeprefix("tiktoken:")))
            self._with_counter(name, counter)
        if any(d.backend == "litellm" for d in deployments):
            await self._library.start()
        await asyncio.to_thread(self.path.serving.scanner.scan, [_PROSE])
        gc.collect()
        gc.freeze()  # what is loaded by now stays: a later collection need not look at it again

    def _with_counter(self, name: str, counter: TokenCounter) -> None:
        serving = self.path.serving
        self.path.serving = replace(serving, counters={**serving.counters, name: counter})

    # What the supervisors report.

    def engine_down(self, name: str, reason: str, retry_after: float) -> None:
        self.fleet.set_down(name, reason, time.monotonic(), retry_after)
        self._log.info("engine", deployment=name, state="down", reason=reason)

    async def engine_up(self, name: str, described: Mapping[str, Any]) -> None:
        """An engine is ready: from now on its own window and tokenizer count. Raises ValueError where it does not say
        what they are."""
        if not isinstance(described, dict) or not {"tokenizer", "chat_template", "context_window"} <= described.keys():
            raise ValueError("tokenizer, chat_template or context_window is missing")
        counter = await asyncio.to_thread(
            LocalTokenizer,
            orjson.dumps(described["tokenizer"]).decode(),
            described["chat_template"],
            described.get("bos_token"),
            described.get("eos_token"),
            datetime.now(),
        )
        serving = self.path.serving
        deployment = serving.policy.deployments[name]
        known = replace(deployment, window=described["context_window"])
        policy = serving.policy.with_deployment(known)
        self.path.serving = replace(
            serving, policy=policy, counters={**serving.counters, deployment.tokenizer: counter}
        )
        self.fleet.set_up(name, time.monotonic())
        self._log.info("engine", deployment=name, state="up", context_window=described["context_window"])
        self._tell(f"{name}: {deployment.model} is ready (window {described['context_window']} tokens)")

    def engine_said(self, name: str, line: str) -> None:
        self._tell(f"{name}: {line}")

    # The small endpoints.

    async def models(self, _: Request) -> Response:
        """What this caller may ask for: `auto`, the aliases, the rules, and the deployments that can be called."""
        policy = self.path.serving.policy
        names = {
            AUTO: "policy",
            **dict.fromkeys(policy.models, "alias"),
            **{rule.name: "rule" for rule in policy.rules},
        }
        names |= {d.name: d.zone for d in policy.deployments.values() if d.unavailable is None}
        data = [{"id": name, "object": "model", "created": 0, "owned_by": owner} for name, owner in names.items()]
        return _json(200, {"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """One model of the list."""
        name = request.path_params["name"]
        if not knows(self.path.serving.policy, name):
            return _error(NotFound("no such model: GET /v1/models lists those that are known"), request)
        return _json(200, {"id": name, "object": "model", "created": 0, "owned_by": "hybridgate"})

    async def live(self, _: Request) -> Response:
        """The process answers."""
        return _json(200, {"status": "live"})

    async def ready(self, _: Request) -> Response:
        """Whether a request could be answered now, and by what; each deployment that is not usable with its reason."""
        policy = self.path.serving.policy
        snapshot = self.fleet.snapshot(time.monotonic(), 0.0)
        reasons = {d.name: d.unavailable or snapshot.deployments[d.name].down for d in policy.deployments.values()}
        usable = [name for name, reason in reasons.items() if reason is None]
        configured = [name for name, d in policy.deployments.items() if d.unavailable is None]
        status = "not ready" if not usable else "ready" if len(usable) == len(configured) else "degraded"
        deployments = {
            name: {"zone": policy.deployments[name].zone, "usable": reason is None, "reason": reason or ""}
            for name, reason in reasons.items()
        }
        told = {"status": status, "policy": {"path": policy.path, "hash": policy.hash}, "deployments": deployments}
        return _json(200 if usable else 503, told)

    async def route(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """The decision for a chat request, with its reasons; nothing is called."""
        known_id = (b"x-request-id", request_id_of(headers, new_id).encode())
        try:
            serving, facts, snapshot, decision = await self.path.route(headers, body)
            status, document = 200, explanation(serving.policy, facts, snapshot, decision)
        except GatewayError as error:
            status, document = status_of(error), body_of(error)
        chunk = Chunk(orjson.dumps(document), last=True)
        return Reply.whole(status, [known_id], chunk)


class Front:
    """The application: a POST to an endpoint goes straight to it, all else through Starlette, whose middleware would
    wrap every event of every stream. Invariant: what is reached here is reached by Starlette's routes as well."""

    def __init__(self, endpoints: Mapping[str, Endpoint], behind: Starlette) -> None:
        self._endpoints = endpoints
        self._behind = behind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._endpoints.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await self._behind(scope, receive, send)


def build(settings: Settings, policy: Policy, log: Log, tell: Tell) -> tuple[Front, Gateway]:
    """The application and the gateway behind it."""
    gateway = Gateway(settings, policy, log, tell)
    answering = {"/v1/chat/completions": gateway.path.complete, "/v1/route": gateway.route}
    endpoints = {
        path: Endpoint(answer, max_body_bytes=settings.max_body_bytes, log=log, new_id=new_id)
        for path, answer in answering.items()
    }
    routes = [
        *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        Route("/v1/models", gateway.models),
        Route("/v1/models/{name:path}", gateway.model),
        Route("/livez", gateway.live),
        Route("/readyz", gateway.ready),
    ]
    app = Starlette(routes=routes, lifespan=gateway.lifespan, exception_handlers={404: _no_route, 405: _no_method})
    app.router.redirect_slashes = False
    return Front(endpoints, app), gateway


async def _no_route(request: Request, _: Exception) -> Response:
    return _error(NotFound("no such path: the API lives under /v1, such as POST /v1/chat/completions"), request)


async def _no_method(request: Request, exc: Exception) -> Response:
    allowed = (exc.headers or {}).get("Allow", "") if isinstance(exc, HTTPException) else ""
    response = _error(MethodNotAllowed(f"this path does not take that method; it takes {allowed}"), request)
    response.headers["allow"] = allowed
    return response


def _error(error: GatewayError, request: Request) -> Response:
    response = _json(status_of(error), body_of(error))
    response.headers["x-request-id"] = request_id_of(headers_of(request.scope), new_id)
    return response


def _json(status: int, document: object) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")
