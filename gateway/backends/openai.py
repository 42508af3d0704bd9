"""The relay: our engine and anything else on the OpenAI wire. The body goes out with another `model`, the answer comes
back as it is.

Owns what is added to a relayed request (credentials, ids, the request for usage) and what an HTTP status of the
upstream means. Refuses to forward a caller's own credentials or headers.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import orjson

from gateway.backends import sse
from gateway.backends.base import Call, Chunk
from gateway.backends.upstream import Response, Upstream
from gateway.errors import (
    Retryable,
    UpstreamCut,
    UpstreamError,
    UpstreamErrored,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
    UpstreamWindowExceeded,
)
from gateway.types import Deployment, Price, Usage

_MAX_ERROR_BYTES = 64 * 1024
_MAX_MESSAGE = 300
_MAX_PARAM = 100
_ADDRESS = re.compile(r"https?://\S+")
_BYTES_PER_TOKEN = 4  # of an answer whose deployment does not count; English text has about four
_END_SECONDS = 0.1  # how long the end of a body may come after its last event


class OpenAIBackend:
    """Implements `Backend` for one deployment on the OpenAI wire."""

    def __init__(self, deployment: Deployment, upstream: Upstream) -> None:
        self._deployment = deployment
        self._upstream = upstream
        self._headers = {"authorization": f"Bearer {deployment.api_key}"} if deployment.api_key else {}

    async def open(self, call: Call) -> PlainAnswer | StreamedAnswer:
        headers = {**self._headers, "x-request-id": call.request_id}
        if self._deployment.is_ours:
            headers["x-hybridgate-priority"] = str(call.priority)
            if call.first_token_by_ms is not None:
                headers["x-hybridgate-first-token-by"] = f"{call.first_token_by_ms:.0f}"
        limits = call.timeouts or self._deployment.timeouts
        # A plain answer is awaited whole, and whoever awaits it watches the time.
        silence = max(limits.first_token, limits.idle) if call.chat.stream else None
        response = await self._upstream.post("/chat/completions", self._body(call), headers, silence)
        if response.status != 200:
            raise await self._refusal(response)
        if call.chat.stream and "event-stream" not in (response.header("content-type") or ""):
            response.close()
            raise UpstreamFailed("the deployment did not answer with a stream")
        if not call.chat.stream:
            return PlainAnswer(response, call.prompt_tokens)
        return StreamedAnswer(response, call, self._deployment.bill, asyncio.get_running_loop().time() + limits.total)

    @property
    def at_rest(self) -> bool:
        """Whether no connection is open."""
        return self._upstream.at_rest

    def retire(self) -> None:
        """Take no more requests; those under way go on."""
        self._upstream.retire()

    async def close(self) -> None:
        await self._upstream.close()

    def _body(self, call: Call) -> bytes:
        body: dict[str, Any] = {**call.chat.body, "model": self._deployment.model}
        if call.chat.stream:
            body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
        if call.imposed_max_tokens is not None:
            body["max_tokens"] = call.imposed_max_tokens
        elif "max_tokens" in body and "max_completion_tokens" in body:  # the smaller one counts, wherever it is read
            body["max_tokens"] = body["max_completion_tokens"] = call.chat.max_tokens
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
            message, param = _error_in(raw[:_MAX_ERROR_BYTES], self._deployment.api_key)
            too_long = b'"context_length_exceeded"' in raw[:_MAX_ERROR_BYTES]
            refusal = UpstreamWindowExceeded if too_long else UpstreamRejected
            message = f"{self._deployment.name} refused the request: {message}"
            return refusal(message, upstream_status=status, param=param)
        if status in (401, 403):
            return UpstreamUnauthorized("the deployment refused our credentials")
        if status in (429, 503):
            # Our engine refuses single requests that it cannot start in time; others may still be welcome.
            cool_off = None if self._deployment.is_ours else retry_after or 1.0
            return UpstreamOverloaded("the deployment is full", retry_after=cool_off)
        return UpstreamErrored(f"the deployment answered with status {status}", retry_after=retry_after)


class PlainAnswer:
    """Implements `Answer` for a body of JSON: one chunk, which is the last. (No generator: one that is left before its
    end costs the event loop a task.)"""

    dropped: tuple[str, ...] = ()

    def __init__(self, response: Response, prompt_tokens: int) -> None:
        """`prompt_tokens`: our estimate, for a deployment that reports no usage."""
        self._response = response
        self._prompt_tokens = prompt_tokens

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        raw = await self._response.read()
        try:
            payload = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamFailed("the deployment's answer is not JSON") from None
        if not isinstance(payload, dict) or not sse.choices_of(payload, "message"):
            raise UpstreamFailed("the deployment's answer has no choices")
        usage = sse.usage_of(payload) or Usage(self._prompt_tokens, len(raw) // _BYTES_PER_TOKEN)
        return Chunk(raw, usage=usage, last=True)

    async def close(self) -> None:
        self._response.close()


class StreamedAnswer:
    """Implements `Answer` for a stream of events. Invariant: `last` is set only on the chunk with which the upstream's
    answer was proved complete, and nothing follows it."""

    dropped: tuple[str, ...] = ()

    def __init__(self, response: Response, call: Call, price: Price | None, deadline: float) -> None:
        """`deadline`: the event loop's time by which the answer must be whole."""
        self._response = response
        self._deadline = deadline
        self._prompt_tokens = call.prompt_tokens
        self._reader = sse.StreamReader(choices=call.chat.n, pass_usage=call.chat.include_usage, price=price)
        self._passed_on = False  # until then a failure can still be mended by another deployment
        self._complete = False

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        reader = self._reader
        before = reader.events
        try:
            while True:
                block = await self._response.some()
                if asyncio.get_running_loop().time() > self._deadline:
                    raise UpstreamTimeout("the deployment's answer takes longer than it may")
                data = reader.feed(block) if block else self._end()
                if reader.done:
                    self._complete = True
                    return Chunk(data, usage=self._usage(), last=True)
                if data:
                    self._passed_on = True
                    return Chunk(data, tokens=reader.events - before)
        except Retryable as error:
            raise UpstreamCut(error.message) if self._passed_on else error from None

    def _end(self) -> bytes:
        """The upstream closed its stream: well, if it had finished every choice, even without a `[DONE]`."""
        if not self._reader.complete:
            raise UpstreamFailed("the deployment's stream ended before its answer was complete")
        self._reader.done = True
        return sse.DONE

    def _usage(self) -> Usage:
        """What the deployment counted, or else our own count: the prompt's estimate and one token an event."""
        return self._reader.usage or Usage(self._prompt_tokens, self._reader.events)

    async def close(self) -> None:
        # `[DONE]` came; once the end of the body has come as well, the connection can be used again.
        if self._complete and not self._response.at_end:
            with suppress(Retryable, TimeoutError):
                async with asyncio.timeout(_END_SECONDS):
                    await self._response.some()
        self._response.close()


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After as seconds; the date form is rare and counts as absent."""
    return float(retry_after) if retry_after and retry_after.isascii() and retry_after.isdigit() else None


def _error_in(raw: bytes, key: str | None) -> tuple[str, str | None]:
    """The upstream's own words about the caller's request, shortened and without addresses and our key, and the field
    at fault."""
    try:
        payload = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return "no reason given", None
    error = payload.get("error", payload) if isinstance(payload, dict) else {}
    if not isinstance(error, dict):
        return "no reason given", None
    message, param = error.get("message"), error.get("param")
    if not isinstance(message, str) or not message:
        message = "no reason given"
    if key:
        message = message.replace(key, "[redacted]")
    field = param if isinstance(param, str) and len(param) <= _MAX_PARAM else None
    return _ADDRESS.sub("[redacted]", message)[:_MAX_MESSAGE], field
