"""Owns what is around every endpoint: request ids, the optional token, and the last word on errors; refuses what the
endpoints do.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from local_engine.answer import error_response
from local_engine.errors import (
    GenerationFailed,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RequestError,
    Unauthorized,
)
from local_engine.protocol import parse_request_id

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/health", "/metrics"})
"""What probes and scrapers read without the token: neither says anything of a request."""


class Edge:
    """The outermost app.

    Invariants: every response carries an x-request-id, the caller's if it is fit; nothing is answered twice; nothing
    that a caller sent is logged; with a token, nothing but `OPEN_PATHS` is answered to who does not send it, and none
    of a body is read before.
    """

    def __init__(self, app: ASGIApp, token: str | None = None) -> None:
        self._app = app
        self._bearer = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = parse_request_id(headers) or f"req-{uuid.uuid4().hex}"
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(raw=message["headers"])["x-request-id"] = request_id
            await send(message)

        try:
            if not self._may(scope, headers):
                await error_answer(Unauthorized())(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # the drain is over, and what was asked for has not even come whole
            if not started:
                await error_answer(NotReady("the engine is shutting down"))(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the ASGI edge
            frames = "; ".join(
                f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)[-5:]
            )
            log.error("request %s failed: %s at %s", request_id, type(error).__name__, frames)
            if not started:
                await (await unexpected(Request(scope), error))(scope, receive, send_with_id)

    def _may(self, scope: Scope, headers: Headers) -> bool:
        if self._bearer is None or scope["path"] in OPEN_PATHS:
            return True
        return hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self._bearer)


def error_answer(error: RequestError) -> Response:
    """The error in OpenAI's shape."""
    status, headers, body = error_response(error)
    return Response(body, status, headers, media_type="application/json")


async def request_error(request: Request, error: Exception) -> Response:
    """An error of our own tree."""
    assert isinstance(error, RequestError)
    return error_answer(error)


async def unexpected(request: Request, error: Exception) -> Response:
    """A defect."""
    return error_answer(GenerationFailed("the engine failed to answer"))


async def http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals (no such path, wrong method) in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        return error_answer(MethodNotAllowed(f"this path takes {allow}", allow))
    if error.status_code == 404:
        return error_answer(NotFound("no such path"))
    return error_answer(InvalidRequest(error.detail))
