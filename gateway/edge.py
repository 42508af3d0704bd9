"""The edge between HTTP and what is answered: nothing of a language model, nothing of a socket.

Owns sending a reply once, the shape of an error whatever goes wrong, and the last `except` of the program. Refuses to
know what a request means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.types import ASGIApp, Scope, Send

from gateway.answers import Log
from gateway.backends.sse import error_event
from gateway.errors import (
    BadRequest,
    GatewayError,
    NoCandidate,
    RequestError,
    TooLarge,
    Unauthenticated,
    body_of,
    status_of,
)
from gateway.exchange import Exchange
from gateway.facts import CHALLENGE, request_id_of
from gateway.reply import Reply

MOST_SMALL_BODY_BYTES = 64 * 1024

Admitting = Callable[[Mapping[str, str]], None]
Answering = Callable[[Mapping[str, str], bytes], Awaitable[Reply]]


class Edge:
    """What every endpoint does when something goes wrong."""

    def __init__(self, log: Log, new_id: Callable[[], str]) -> None:
        self._log = log
        self._new_id = new_id

    def refuse(self, exchange: Exchange, error: GatewayError) -> None:
        """Answer with an error in OpenAI's shape."""
        request_id = request_id_of(exchange.headers, self._new_id)
        exchange.answer(status_of(error), _headers_of_error(error, request_id), orjson.dumps(body_of(error)))

    def give_up(self, exchange: Exchange, error: GatewayError) -> None:
        """End the answer with an error: as one where nothing was sent yet, as the last event of a stream after that."""
        if not exchange.begun:
            self.refuse(exchange, error)
        elif exchange.streaming:
            exchange.end(error_event(error))

    def defect(self, exchange: Exchange, error: Exception) -> None:
        """A defect must not reach the client as a traceback."""
        self._log.info("defect", error=type(error).__name__, where=_where(error))
        self.give_up(exchange, GatewayError("internal error"))

    def stopping(self, exchange: Exchange) -> None:
        """The task was cancelled: by us, because the client left, or because the time to finish open requests is
        over."""
        if not exchange.gone:
            self.give_up(exchange, NoCandidate("the gateway is stopping: try again"))


class Endpoint:
    """One POST endpoint. Whoever `admit` turns away has nothing of a body read."""

    def __init__(self, admit: Admitting, answer: Answering, *, max_body_bytes: int, edge: Edge) -> None:
        """`admit` raises `Unauthenticated`."""
        self._admit = admit
        self._answer = answer
        self._limit = max_body_bytes
        self._edge = edge

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            self._admit(exchange.headers)
            body = await exchange.body(self._limit)
            if not body and "upgrade" in exchange.headers:  # the parser reads no body after it
                raise BadRequest("this server speaks HTTP/1.1 only: send the request without the header Upgrade")
            reply = await self._answer(exchange.headers, body)
            try:
                await send_reply(exchange, reply)
            except Exception as error:  # noqa: BLE001 - the edge, once the answer has begun
                self._edge.defect(exchange, error)
            finally:
                await reply.close()
        except RequestError as error:
            self._edge.refuse(exchange, error)
        except asyncio.CancelledError:
            self._edge.stopping(exchange)
        except Exception as error:  # noqa: BLE001 - the edge
            self._edge.defect(exchange, error)


class AsgiEndpoint:
    """Everything else, answered by an ASGI application."""

    def __init__(self, app: ASGIApp, edge: Edge) -> None:
        self._app = app
        self._edge = edge

    async def __call__(self, exchange: Exchange) -> None:
        """Answer one request."""
        try:
            await self._app(_scope_of(exchange), _Receiving(exchange), _Sending(exchange))
        except TooLarge as error:
            self._edge.give_up(exchange, error)
        except asyncio.CancelledError:
            self._edge.stopping(exchange)
        except Exception as error:  # noqa: BLE001 - the edge
            self._edge.defect(exchange, error)


@dataclass(frozen=True, slots=True)
class Application:
    """What is served: `endpoints` take POSTs on their paths, without middleware, which would wrap every event of every
    stream; `otherwise` takes all else. `asgi` is for its lifespan alone."""

    endpoints: Mapping[str, Endpoint]
    otherwise: AsgiEndpoint
    asgi: ASGIApp

    @classmethod
    def small(cls, app: ASGIApp, edge: Edge) -> Application:
        """An ASGI application and nothing beside it."""
        return cls({}, AsgiEndpoint(app, edge), app)


def headers_of(scope: Scope) -> dict[str, str]:
    """The headers of a request to an ASGI application; no name occurs twice."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


async def send_error(send: Send, error: GatewayError, request_id: str) -> None:
    """Answer a request to an ASGI application with an error in OpenAI's shape."""
    headers = _headers_of_error(error, request_id)
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(body_of(error))})


def _headers_of_error(error: GatewayError, request_id: str) -> list[tuple[bytes, bytes]]:
    headers = [(b"content-type", b"application/json"), (b"x-request-id", request_id.encode())]
    return [*headers, CHALLENGE] if isinstance(error, Unauthenticated) else headers


def _scope_of(exchange: Exchange) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": exchange.version,
        "method": exchange.method,
        "scheme": "http",
        "path": exchange.path,
        "raw_path": exchange.path.encode(),
        "query_string": exchange.query,
        "root_path": "",
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in exchange.headers.items()],
        "client": None,
        "server": None,
    }


class _Receiving:
    """ASGI's `receive`: the body, once; a client that leaves cancels the task instead."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._read = False

    async def __call__(self) -> dict[str, Any]:
        if self._read:
            await asyncio.get_running_loop().create_future()
        self._read = True
        body = await self._exchange.body(MOST_SMALL_BODY_BYTES)
        return {"type": "http.request", "body": body, "more_body": False}


class _Sending:
    """ASGI's `send`."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._status = 500
        self._headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, message: Any) -> None:
        exchange = self._exchange
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [header for header in message["headers"] if header[0] != b"content-length"]
            return
        data, more = message.get("body", b""), message.get("more_body", False)
        if not exchange.begun and not more:
            exchange.answer(self._status, self._headers, data)
        elif not exchange.begun:
            exchange.begin(self._status, self._headers, data)
        elif more:
            exchange.send(data)
        else:
            exchange.end(data)
        if exchange.blocked:
            await exchange.drained()


async def send_reply(exchange: Exchange, reply: Reply) -> None:
    """Send headers and chunks. An answer of one chunk gets a Content-Length, one of many is chunked."""
    chunk = await anext(reply.chunks)
    headers = [(b"content-type", reply.content_type), *reply.headers]
    if chunk.last:
        exchange.answer(reply.status, headers, chunk.data)
        return
    headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
    exchange.begin(reply.status, headers, chunk.data)
    while True:
        chunk = await anext(reply.chunks)
        if exchange.blocked:
            await exchange.drained()
        if chunk.last:
            break
        exchange.send(chunk.data)
    exchange.end(chunk.data)


def _where(error: BaseException) -> str:
    """File and line where a defect arose: enough to find it, nothing of the request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "unknown"
