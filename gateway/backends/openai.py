"""The relay: our engine and anything else on the OpenAI wire. The body goes out with another `model`, the answer comes
back as it is.

Owns what is added to a relayed request (credentials, ids, the request for usage) and what an HTTP status of the
upstream means. Refuses to forward a caller's own credentials or headers.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from gateway.backends import sse
from gateway.backends.base import Call, Chunk
from gateway.backends.upstream import Response, Upstream
from gateway.errors import (
    Retryable,
    UpstreamCut,
    UpstreamError,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamUnauthorized,
)
from gateway.types import Deployment, Price, Usage

_MAX_ERROR_BYTES = 64 * 1024
_MAX_MESSAGE = 300


class OpenAIBackend:
    """Implements `Backend` for one deployment on the OpenAI wire."""

    def __init__(self, deployment: Deployment, upstream: Upstream) -> None:
        self._deployment = deployment
        self._upstream = upstream
        self._headers = {"authorization": f"Bearer {deployment.api_key}"} if deployment.api_key else {}

    async def open(self, call: Call) -> RelayedAnswer:
        headers = {**self._headers, "x-request-id": call.request_id}
        if self._deployment.backend == "local":
            headers["x-hybridgate-priority"] = str(call.priority)
            if call.first_token_by_ms is not None:
                headers["x-hybridgate-first-token-by"] = f"{call.first_token_by_ms:.0f}"
        response = await self._upstream.post("/chat/completions", self._body(call), headers)
        if response.status != 200:
            raise await self._refusal(response)
        if call.chat.stream and "event-stream" not in (response.header("content-type") or ""):
            response.close()
            raise UpstreamFailed("the deployment did not answer with a stream")
        return RelayedAnswer(response, call, self._deployment.price)

    async def close(self) -> None:
        await self._upstream.close()

    def _body(self, call: Call) -> bytes:
        body: dict[str, Any] = {**call.chat.body, "model": self._deployment.model}
        if call.chat.stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        if call.imposed_max_tokens is not None:
            body["max_tokens"] = call.imposed_max_tokens
        return orjson.dumps(body)

    async def _refusal(self, response: Response) -> UpstreamError:
        status = response.status
        retry_after = _seconds(response.header("retry-after"))
        try:
            raw = await response.read() if status in (400, 413, 422) else b""
        except Retryable as error:
            return error
        finally:
            response.close()
        if status in (400, 413, 422):
            message, param = _error_in(raw[:_MAX_ERROR_BYTES])
            return UpstreamRejected(
                f"{self._deployment.name} refused the request: {message}", upstream_status=status, param=param
            )
        if status in (401, 403):
            return UpstreamUnauthorized("the deployment refused our credentials")
        if status in (
            429,
            503,
        ):  # our engine refuses single requests that it cannot start in time; others may still be welcome
            cool_off = None if self._deployment.backend == "local" else retry_after or 1.0
            return UpstreamOverloaded("the deployment is full", retry_after=cool_off)
        return UpstreamFailed(f"the deployment answered with status {status}", retry_after=retry_after)


class RelayedAnswer:
    """Implements `Answer`. Invariant: `last` is set only on the chunk with which the upstream's answer was proved
    complete."""

    dropped: tuple[str, ...] = ()

    def __init__(self, response: Response, call: Call, price: Price | None) -> None:
        self._response = response
        self._chunks = self._stream(call, price) if call.chat.stream else self._plain(price)

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self._chunks

    async def __anext__(self) -> Chunk:
        return await anext(self._chunks)

    async def close(self) -> None:
        self._response.close()

    async def _plain(self, price: Price | None) -> AsyncIterator[Chunk]:
        raw = await self._response.read()
        try:
            payload = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamFailed("the deployment's answer is not JSON") from None
        if not isinstance(payload, dict) or not payload.get("choices"):
            raise UpstreamFailed("the deployment's answer has no choices")
        usage = sse.usage_of(payload)
        data = orjson.dumps(sse.with_cost(payload, usage, price)) if usage else raw
        yield Chunk(data, usage=usage, last=True)

    async def _stream(self, call: Call, price: Price | None) -> AsyncIterator[Chunk]:
        reader = sse.StreamReader(choices=call.chat.n, pass_usage=call.chat.include_usage, price=price)
        passed_on = False  # until then a failure can still be mended by another deployment
        try:
            async for block in self._response.blocks():
                before = reader.events
                data = reader.feed(block)
                if reader.done:
                    yield Chunk(data, usage=_usage(reader, call), last=True)
                    return
                if data:
                    passed_on = True
                    yield Chunk(data, tokens=reader.events - before)
            if not reader.complete:
                raise UpstreamFailed("the deployment's stream ended before its answer was complete")
        except Retryable as error:
            raise UpstreamCut(error.message) if passed_on else error from None
        yield Chunk(sse.DONE, usage=_usage(reader, call), last=True)


def _usage(reader: sse.StreamReader, call: Call) -> Usage:
    """What the deployment counted, or else our own count: the prompt's estimate and one token an event."""
    return reader.usage or Usage(call.prompt_tokens, reader.events)


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After as seconds; the date form is rare and counts as absent."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None


def _error_in(raw: bytes) -> tuple[str, str | None]:
    """The upstream's own words about the caller's request, shortened, and the field at fault."""
    try:
        payload = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return "no reason given", None
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    if not isinstance(error, dict):
        return "no reason given", None
    message, param = error.get("message"), error.get("param")
    return str(message or "no reason given")[:_MAX_MESSAGE], param if isinstance(param, str) else None
