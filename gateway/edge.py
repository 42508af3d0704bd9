"""The ASGI edge: HTTP in, HTTP out, nothing of a language model.

Owns reading a body within its limit, noticing that a client has gone, sending a reply once, and the last `except` of
the program. Refuses to know what a request means.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import orjson
from starlette.types import Receive, Scope, Send

from gateway.backends.sse import error_event
from gateway.chat import Log, Reply
from gateway.errors import BadRequest, GatewayError, NoCandidate, TooLarge, Unauthenticated, body_of, status_of
from gateway.facts import CHALLENGE, request_id_of

_LINGER_SECONDS = 5.0

Admitting = Callable[[Mapping[str, str]], None]
Answering = Callable[[Mapping[str, str], bytes], Awaitable[Reply]]


def headers_of(scope: Scope) -> dict[str, str]:
    """Header names in lower case; one that was sent several times is joined with commas, so that none of its values is
    lost."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


async def read_body(headers: Mapping[str, str], receive: Receive, limit: int) -> bytes | None:
    """The whole body, or None where the client left. Raises `TooLarge` as soon as it is known, before the rest is
    read."""
    declared = headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limit:
        raise TooLarge(f"the body is larger than the limit of {limit} bytes")
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body is larger than the limit of {limit} bytes")
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


class _Connection:
    """Watches one client, and knows what it was sent. Invariant: the task that answers is cancelled by us at most once,
    only after its client has gone, never after it is done.

    `begun`: the head of the answer was sent. `streaming`: more of the answer is to follow.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._answering = asyncio.current_task()
        self.gone = False
        self.begun = False
        self.streaming = False
        self._done = False

    def watch(self) -> None:
        """From now on, when the body has been read."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        # uvicorn reports a disconnect also once the answer is complete, so this always returns.
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._done and self._answering is not None:
            self.gone = True
            self._answering.cancel()

    def done(self) -> None:
        """The answer is complete: from here on a disconnect means nothing."""
        self._done = True


class Endpoint:
    """One POST endpoint as an ASGI application. Whoever `admit` turns away has nothing of a body read."""

    def __init__(
        self, admit: Admitting, answer: Answering, *, max_body_bytes: int, log: Log, new_id: Callable[[], str]
    ) -> None:
        """`admit` raises `Unauthenticated`."""
        self._admit = admit
        self._answer = answer
        self._limit = max_body_bytes
        self._log = log
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = headers_of(scope)
        connection = _Connection(receive)
        try:
            self._admit(headers)
            body = await read_body(headers, receive, self._limit)
            if body is None:
                return
            if not body and "upgrade" in headers:  # the parser reads no body after it
                raise BadRequest("this server speaks HTTP/1.1 only: send the request without the header Upgrade")
            connection.watch()
            await self._reply(headers, body, send, connection)
        except BadRequest as error:
            await send_error(send, error, request_id_of(headers, self._new_id))
        except (TooLarge, Unauthenticated) as error:
            await self._turn_away(error, headers, receive, send)
        except asyncio.CancelledError:
            if not connection.gone:  # the time to finish open requests is over
                stopping = NoCandidate("the gateway is stopping: try again")
                await self._give_up(stopping, headers, send, connection)
        finally:
            connection.done()

    async def _reply(self, headers: Mapping[str, str], body: bytes, send: Send, connection: _Connection) -> None:
        try:
            reply = await self._answer(headers, body)
        except Exception as error:  # noqa: BLE001 - the edge: a defect must not reach the client as a traceback
            await self._defect(error, headers, send, connection)
            return
        try:
            await send_reply(send, reply, connection)
        except Exception as error:  # noqa: BLE001 - the same, once the answer has begun
            await self._defect(error, headers, send, connection)
        finally:
            connection.done()
            await reply.close()

    async def _defect(self, error: Exception, headers: Mapping[str, str], send: Send, connection: _Connection) -> None:
        self._log.info("defect", error=type(error).__name__, where=_where(error))
        await self._give_up(GatewayError("internal error"), headers, send, connection)

    async def _give_up(
        self, error: GatewayError, headers: Mapping[str, str], send: Send, connection: _Connection
    ) -> None:
        """End the answer with an error: as one where nothing was sent yet, as the last event of a stream after that."""
        if not connection.begun:
            await send_error(send, error, request_id_of(headers, self._new_id))
        elif connection.streaming:
            await send({"type": "http.response.body", "body": error_event(error)})

    async def _turn_away(self, error: GatewayError, headers: Mapping[str, str], receive: Receive, send: Send) -> None:
        """Answer at once, then read and forget some of what is still coming: a socket that is closed on unread data is
        reset, and many clients would then never see the answer. Both the bytes and the time are bounded; the connection
        is not used again."""
        await send_error(send, error, request_id_of(headers, self._new_id), linger=True)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_SECONDS):
                left = self._limit
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b""})


async def send_reply(send: Send, reply: Reply, connection: _Connection) -> None:
    """Send headers and chunks. An answer of one chunk gets a Content-Length, one of many is chunked."""
    chunk = await anext(reply.chunks)
    headers = [(b"content-type", reply.content_type), *reply.headers]
    if chunk.last:
        headers.append((b"content-length", b"%d" % len(chunk.data)))
    else:
        headers.append((b"cache-control", b"no-cache"))
        headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    connection.begun, connection.streaming = True, not chunk.last
    while not chunk.last:
        await send({"type": "http.response.body", "body": chunk.data, "more_body": True})
        chunk = await anext(reply.chunks)
    await send({"type": "http.response.body", "body": chunk.data})


async def send_error(send: Send, error: GatewayError, request_id: str, *, linger: bool = False) -> None:
    """Send an error in OpenAI's shape. With `linger` the caller still has to end the response, and the connection is
    closed after it."""
    body = orjson.dumps(body_of(error))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", request_id.encode()),
    ]
    if isinstance(error, Unauthenticated):
        headers.append(CHALLENGE)
    if linger:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status_of(error), "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": linger})


def _where(error: BaseException) -> str:
    """File and line where a defect arose: enough to find it, nothing of the request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace is not None else "unknown"
