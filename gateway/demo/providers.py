"""The fake providers: one local server that answers as OpenAI, Anthropic, Mistral and Cohere do, and misbehaves on
command.

Owns pacing, faults and the log of what arrived. Refuses to be a model: answers are deterministic and say nothing of the
question. Not for production; it keeps what it is sent in memory and shows it on /_log, because proving that nothing
arrived is what it is for.

    POST /v1/chat/completions           OpenAI          POST /v1/messages    Anthropic
    POST /mistral/v1/chat/completions   Mistral         POST /v2/chat        Cohere
    GET  /v1/models, /health            for whoever probes
    POST /_control   {"provider": "openai" | "*", "queue": [behaviour, ...], "always": behaviour | null}
    DELETE /_control                    behaves again
    GET  /_log       {"requests": [{"provider", "path", "headers", "body"}], "received", "disconnects", "in_flight"}
    DELETE /_log                        forgets them

Run it with `python -m gateway.demo.providers --port 9000`.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, cast

import orjson
import uvicorn
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.demo.formats import FORMATS, Finish, Format, Json, Reply, text_of, tool_call
from gateway.embedded import embedded

TRANSPORT = "hybridgate.transport"  # ASGI extension: the connection, so that it can be reset
Fault = Literal["reset", "cut", "silence", "malformed", "content_type"]


@validated(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Behaviour:
    """How one request is answered.

    `delay`: seconds before the headers. `chunk_delay`: seconds before each event of a stream. `chunks`: number of
    pieces of the answer (None: as many as it has words). `echo`: the answer, or a tool call's text, is what the last
    message says, so many characters a piece. `status`, `message`, `code`: an error instead of an answer, in
    the provider's format; `retry_after` becomes the header. `fault` strikes when `after` events have been sent; with
    `after` 0 before the headers. A plain answer has one event, so that 0 is the only useful `after` there. `reset`: the
    connection is reset; `cut`: it is closed as if the answer were complete (`after` 0: an empty body); `silence`:
    nothing more comes until the client goes away; `malformed`: an event, or the body, that is no JSON; `content_type`:
    an HTML page.
    """

    delay: float = 0.0
    chunk_delay: float = 0.0
    chunks: int | None = None
    echo: int | None = None
    status: int | None = None
    message: str = "The fake provider was told to fail."
    code: str | None = None
    retry_after: str | None = None
    fault: Fault | None = None
    after: int = 0


@validated(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Command:
    """A body of POST /_control, parsed."""

    provider: str = "*"
    queue: tuple[Behaviour, ...] = ()
    always: Behaviour | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """One request that arrived."""

    provider: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(slots=True)
class Script:
    """What each provider does next. Invariant: a queued behaviour is used once, then the standing one applies."""

    standing: dict[str, Behaviour] = field(default_factory=dict)
    queued: dict[str, deque[Behaviour]] = field(default_factory=dict)

    def next(self, provider: str) -> Behaviour:
        for name in (provider, "*"):
            if queue := self.queued.get(name):
                return queue.popleft()
        return self.standing.get(provider) or self.standing.get("*") or Behaviour()

    def clear(self) -> None:
        self.standing.clear()
        self.queued.clear()


class FakeProviders:
    """An ASGI application. Invariant: every request that reached a provider's path is counted in `received`, whatever
    became of it.

    `log_limit` bounds how many requests are kept; 0 keeps none, for load tests. All members are for tests to read and
    set when the server runs in their own process.
    """

    def __init__(self, behaviour: Behaviour | None = None, *, log_limit: int = 1000) -> None:
        self.script = Script({"*": behaviour} if behaviour else {})
        self.log: deque[Received] = deque(maxlen=log_limit)
        self.received = 0
        self.disconnects = 0
        self.in_flight = 0
        self._changed = asyncio.Event()
        routes = [Route(made.path, Endpoint(self, made), methods=["POST"]) for made in FORMATS]
        routes += [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/_control", self.control, methods=["POST", "DELETE"]),
            Route("/_log", self.read_log, methods=["GET", "DELETE"]),
        ]
        self._app = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def behave(self, *queue: Behaviour, provider: str = "*", always: Behaviour | None = None) -> None:
        """Replace what `provider` ("*": all) does next (`queue`, once each) and then (`always`; None: well)."""
        self.script.queued[provider] = deque(queue)
        self.script.standing.pop(provider, None)
        if always:
            self.script.standing[provider] = always

    async def until(self, holds: Callable[[FakeProviders], bool]) -> None:
        """Wait until a condition on the counts holds; it is asked again whenever one of them changes."""
        while not holds(self):
            await self._changed.wait()

    def count(self, *, received: int = 0, disconnects: int = 0, in_flight: int = 0) -> None:
        """Add to the counts and wake who waits for them."""
        self.received += received
        self.disconnects += disconnects
        self.in_flight += in_flight
        self._changed.set()
        self._changed = asyncio.Event()

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fake", "object": "model", "owned_by": "fake"}]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def control(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.script.clear()
            return Response(status_code=204)
        try:
            command = TypeAdapter(Command).validate_json(await request.body())
        except ValidationError as error:
            places = [{"field": ".".join(map(str, one["loc"])), "problem": one["msg"]} for one in error.errors()]
            return JSONResponse({"error": places}, status_code=400)
        self.behave(*command.queue, provider=command.provider, always=command.always)
        return Response(status_code=204)

    async def read_log(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.log.clear()
            self.received = self.disconnects = 0
            return Response(status_code=204)
        counts = {"received": self.received, "disconnects": self.disconnects, "in_flight": self.in_flight}
        return JSONResponse({"requests": [asdict(one) for one in self.log], **counts})


class Endpoint:
    """One provider's path. Invariant: a client that goes away before its answer is whole ends the answer at once and is
    counted once."""

    def __init__(self, server: FakeProviders, wire: Format) -> None:
        self._server = server
        self._format = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        server = self._server
        server.count(received=1, in_flight=1)
        try:
            await self._until_disconnect(scope, receive, send)
        finally:
            server.count(in_flight=-1)

    async def _until_disconnect(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            raw = await request.body()
        except ClientDisconnect:
            self._server.count(disconnects=1)
            return
        body = self._keep(request, raw)
        behaviour = self._server.script.next(self._format.name)
        answer = asyncio.ensure_future(Performance(self._format, behaviour, scope, send).give(body))
        gone = asyncio.ensure_future(receive())
        done, _ = await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        for task in (answer, gone):
            task.cancel()
        if answer in done:
            answer.result()
        else:
            self._server.count(disconnects=1)

    def _keep(self, request: Request, raw: bytes) -> Json | None:
        """The body as an object, or None where it is none; what arrived is kept either way."""
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            body = raw.decode(errors="replace")
        if self._server.log.maxlen:
            kept = Received(self._format.name, request.url.path, dict(request.headers), body)
            self._server.log.append(kept)
        return body if isinstance(body, dict) else None


class Performance:
    """One answer being given. Invariant: a fault strikes exactly after the number of events that the behaviour says."""

    def __init__(self, wire: Format, behaviour: Behaviour, scope: Scope, send: Send) -> None:
        self._format = wire
        self._behaviour = behaviour
        self._scope = scope
        self._send = send

    async def give(self, body: Json | None) -> None:
        """Answer as the behaviour says."""
        behaviour = self._behaviour
        if behaviour.delay:
            await asyncio.sleep(behaviour.delay)
        if behaviour.status is not None:
            error = self._format.error(behaviour.status, behaviour.message, behaviour.code)
            await self._whole(behaviour.status, error, behaviour.retry_after)
        elif body is None:
            await self._whole(400, self._format.error(400, "The body is not a JSON object."))
        elif refusal := self._format.refusal(body):
            await self._whole(*refusal)
        else:
            reply = reply_to(body, self._format.name, behaviour.chunks, behaviour.echo)
            stream = body.get("stream") is True
            parts = self._format.events(reply) if stream else [orjson.dumps(self._format.plain(reply))]
            await self._perform(parts, stream=stream)

    async def _perform(self, parts: list[bytes], *, stream: bool) -> None:
        fault, pace = self._behaviour.fault, self._behaviour.chunk_delay
        sound, broken = (parts, False) if fault is None else (parts[: self._behaviour.after], True)
        if broken and not sound:
            await self._strike(started=False, stream=stream)
            return
        await self._start(200, "text/event-stream" if stream else "application/json")
        for part in sound:
            if pace:
                await asyncio.sleep(pace)
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
        if broken:
            await self._strike(started=True, stream=stream)
        else:
            await self._send({"type": "http.response.body", "body": b""})

    async def _strike(self, *, started: bool, stream: bool) -> None:
        """The fault itself. Resets and silences end with the connection; the others end the answer."""
        fault = self._behaviour.fault
        if fault == "reset":
            reset(self._scope)
        elif fault == "silence":
            await asyncio.Event().wait()
        elif fault == "content_type":
            page = b"<html><body>Bad gateway</body></html>"
            if not started:
                await self._start(200, "text/html")
            await self._send({"type": "http.response.body", "body": page})
        else:
            broken = b'data: {"choices": [{"del\n\n' if stream else b'{"choices": [{"mess'
            if not started:
                await self._start(200, "text/event-stream" if stream else "application/json")
            await self._send({"type": "http.response.body", "body": broken if fault == "malformed" else b""})

    async def _whole(self, status: int, body: Json, retry_after: str | None = None) -> None:
        await self._start(status, "application/json", retry_after)
        await self._send({"type": "http.response.body", "body": orjson.dumps(body)})

    async def _start(self, status: int, content_type: str, retry_after: str | None = None) -> None:
        headers = [(b"content-type", content_type.encode())]
        if retry_after is not None:
            headers.append((b"retry-after", retry_after.encode()))
        start: Message = {"type": "http.response.start", "status": status, "headers": headers}
        await self._send(start)


def reply_to(body: Json, provider: str, chunks: int | None, echo: int | None = None) -> Reply:
    """The deterministic answer to a request: names the provider and the model, and says how much was asked. Honours
    `max_tokens`."""
    messages = [one for one in body.get("messages", []) if isinstance(one, dict)]
    model = str(body.get("model", "unknown"))
    asked = sum(len(text_of(one.get("content"))) for one in messages)
    words = f"{provider} {model} answers: I was sent {asked} characters in {len(messages)} message(s).".split(" ")
    pieces = [word if index == 0 else f" {word}" for index, word in enumerate(words)]
    if chunks is not None:
        pieces = (pieces + [f" {number}" for number in range(chunks)])[:chunks]
    call = tool_call(body)
    if echo is not None and messages:
        said = text_of(messages[-1].get("content"))
        pieces = [said[start : start + echo] for start in range(0, len(said), echo)]
        call = call and replace(call, arguments=orjson.dumps({"text": said}).decode())
    limit = body.get("max_tokens") or body.get("max_completion_tokens")
    finish: Finish = "tool" if call else "stop"
    if isinstance(limit, int) and 0 < limit < len(pieces):
        pieces, finish = pieces[:limit], "tool" if call else "length"
    options = body.get("stream_options")
    include_usage = isinstance(options, dict) and options.get("include_usage") is True
    return Reply(model, () if call else tuple(pieces), finish, max(1, asked // 4), call, include_usage)


def reset(scope: Scope) -> None:
    """Reset the TCP connection of a request: no linger, then abort, so that the peer sees ECONNRESET instead of an
    orderly end."""
    transport = cast(asyncio.Transport, scope["extensions"][TRANSPORT])
    peer: socket.socket = transport.get_extra_info("socket")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class ResettableProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol that also shows the application its transport."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions = cast(dict[str, dict[object, object]], {TRANSPORT: self.transport})
        self.scope["extensions"] = extensions


@asynccontextmanager
async def serving(app: FakeProviders, port: int = 0) -> AsyncIterator[str]:
    """Serve on 127.0.0.1 (`port` 0: a free one) in the running loop; yields the base URL, without a trailing slash, and
    stops on exit."""
    listener = socket.create_server(("127.0.0.1", port))
    config = uvicorn.Config(
        app, http=ResettableProtocol, log_level="critical", lifespan="off", timeout_graceful_shutdown=1
    )
    with listener:
        async with embedded(config, listener) as server:
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}"
            finally:
                server.force_exit = True
        for unfinished in server.server_state.tasks:
            unfinished.cancel()


async def _run(port: int, behaviour: Behaviour, log_limit: int) -> None:
    async with serving(FakeProviders(behaviour, log_limit=log_limit), port) as url:
        print(f"fake providers on {url}", flush=True)  # noqa: T201 - the command line of this module
        await asyncio.Event().wait()


def main() -> None:
    """Command line: serve until interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m gateway.demo.providers", description="Fake model providers on 127.0.0.1."
    )
    parser.add_argument("--port", type=int, default=9000, help="0 takes a free one (default: 9000)")
    parser.add_argument("--chunks", type=int, help="pieces of every answer (default: its words)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before the headers")
    parser.add_argument("--chunk-delay-ms", type=float, default=0.0, help="before each event of a stream")
    parser.add_argument("--log-limit", type=int, default=1000, help="how many requests /_log keeps")
    given = parser.parse_args()
    behaviour = Behaviour(given.delay_ms / 1000, given.chunk_delay_ms / 1000, given.chunks)
    try:
        asyncio.run(_run(given.port, behaviour, given.log_limit))
    except KeyboardInterrupt:
        return
    except OSError as error:
        parser.exit(1, f"cannot serve on 127.0.0.1:{given.port}: {error.strerror}; choose another --port\n")


if __name__ == "__main__":
    main()
