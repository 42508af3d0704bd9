"""Owns what goes back to a caller: OpenAI's JSON and SSE shapes, written as deltas come; refuses to know HTTP requests.

A plain answer and a stream are consumed by the same loop and differ in how deltas become bytes.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from local_engine.errors import RequestError
from local_engine.output import Delta, Output
from local_engine.sequence import FinishReason

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Identity:
    """What every chunk of one answer repeats; `created` is in seconds since the epoch."""

    id: str
    created: int
    model: str
    chat: bool
    prompt_tokens: int

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        }


class Form(Protocol):
    """How deltas become the bytes of a response."""

    content_type: bytes

    def add(self, delta: Delta) -> bytes:
        """The bytes to send for this delta, perhaps none yet."""


class Whole:
    """One JSON body at the end. Invariant: nothing before the final delta."""

    content_type = b"application/json"

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._texts: list[str] = []

    def add(self, delta: Delta) -> bytes:
        """Nothing, or the whole body with the final delta."""
        self._texts.append(delta.text)
        if delta.finish is None:
            return b""
        text = "".join(self._texts)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": delta.finish.value}
        choice |= {"message": {"role": "assistant", "content": text}} if self._identity.chat else {"text": text}
        return orjson.dumps(
            {
                "id": self._identity.id,
                "object": "chat.completion" if self._identity.chat else "text_completion",
                "created": self._identity.created,
                "model": self._identity.model,
                "choices": [choice],
                "usage": self._identity.usage(delta.completion_tokens),
            }
        )


class Events:
    """Server-sent events, one a delta. Invariant: `[DONE]` is sent only behind a complete answer."""

    content_type = b"text/event-stream; charset=utf-8"

    def __init__(self, identity: Identity, *, include_usage: bool) -> None:
        self._identity = identity
        self._include_usage = include_usage
        self._role = identity.chat
        head = orjson.dumps(
            {
                "id": identity.id,
                "object": "chat.completion.chunk" if identity.chat else "text_completion",
                "created": identity.created,
                "model": identity.model,
            }
        )
        # Everything but the choice is the same in each chunk, so it is encoded once.
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = (b'],"usage":null' if include_usage else b"]") + b"}\n\n"

    def add(self, delta: Delta) -> bytes:
        """One event; with the final delta also usage, if asked for, and the end mark."""
        if delta.error is not None:
            return b"data: " + orjson.dumps(delta.error.body()) + b"\n\n"
        choice: dict[str, Any] = {"index": 0, "logprobs": None}
        if self._identity.chat:
            choice["delta"] = ({"role": "assistant"} if self._role else {}) | (
                {"content": delta.text} if delta.text or self._role else {}
            )
            self._role = False
        else:
            choice["text"] = delta.text
        choice["finish_reason"] = delta.finish.value if delta.finish else None
        event = self._head + orjson.dumps(choice) + self._tail
        return event if delta.finish is None else event + self._end(delta)

    def _end(self, delta: Delta) -> bytes:
        if not self._include_usage:
            return DONE
        return (
            self._head + b'],"usage":' + orjson.dumps(self._identity.usage(delta.completion_tokens)) + b"}\n\n" + DONE
        )


class Answer:
    """An ASGI response over one request's deltas.

    Invariants: the status line is sent with the first bytes, so an error before them is a status of its own; a client
    that goes away ends the request in the engine, whether it streams or not.
    """

    def __init__(self, output: Output, form: Form) -> None:
        self._output = output
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_close_when_gone(receive, self._output))
        started = False
        try:
            async for deltas in self._output:
                final = deltas[-1]
                if final.finish is FinishReason.ABORT:
                    return
                if final.error is not None and not started:
                    raise final.error
                body = b"".join([self._form.add(delta) for delta in deltas])
                if body and not started:
                    started = True
                    await send(_start(self._form.content_type, len(body) if final.finish is not None else None))
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": final.finish is None})
        finally:
            watcher.cancel()
            self._output.close()


def _start(content_type: bytes, length: int | None) -> dict[str, Any]:
    """The response's head; `length` in bytes, where the whole body is there already."""
    headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}


async def _close_when_gone(receive: Receive, output: Output) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    output.close()


def error_response(error: RequestError) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error."""
    return error.status, error.headers(), orjson.dumps(error.body())
