"""Owns what goes back to a caller: OpenAI's JSON and SSE shapes, written as deltas come; refuses to know HTTP requests.

A plain answer and a stream are consumed by the same loop and differ in how deltas become bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.types import Receive, Scope, Send

from local_engine.calls import Arguments, CallBegins, CallReader, Content, Family, Said, new_id
from local_engine.errors import RequestError
from local_engine.output import Delta, Output
from local_engine.sequence import FinishReason, Likelihood

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Identity:
    """What every chunk of one answer repeats; `created` is in seconds since the epoch, `choices` how many there are."""

    id: str
    created: int
    model: str
    chat: bool
    prompt_tokens: int
    choices: int = 1

    def usage(self, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": min(cached_tokens, self.prompt_tokens)},
        }


Piece = Callable[[int], bytes]
"""A token's text in UTF-8, perhaps a part of a character."""


@dataclass(frozen=True, slots=True)
class Calling:
    """How to tell tool calls from an answer's text."""

    family: Family
    names: frozenset[str]
    parallel: bool

    def reader(self) -> CallReader:
        """For one choice."""
        return CallReader(self.family, self.names, parallel=self.parallel)


class Form(Protocol):
    """How deltas become the bytes of a response."""

    content_type: bytes

    def add(self, index: int, delta: Delta, *, last: bool) -> bytes:
        """The bytes to send for this delta of a choice, perhaps none yet; `last`: no delta of any choice follows."""


class Whole:
    """One JSON body at the end. Invariant: nothing before the final delta."""

    content_type = b"application/json"

    def __init__(self, identity: Identity, piece: Piece, *, calling: Calling | None = None) -> None:
        self._identity = identity
        self._piece = piece
        self._calling = calling
        self._texts: list[list[str]] = [[] for _ in range(identity.choices)]
        self._told: list[list[Likelihood]] = [[] for _ in range(identity.choices)]
        self._ends: list[Delta | None] = [None] * identity.choices

    def add(self, index: int, delta: Delta, *, last: bool) -> bytes:
        """Nothing, or the whole body with the final delta."""
        self._texts[index].append(delta.text)
        self._told[index] += delta.likelihoods
        if delta.finish is not None:
            self._ends[index] = delta
        if not last:
            return b""
        ends = [end for end in self._ends if end is not None]
        return orjson.dumps(
            {
                "id": self._identity.id,
                "object": "chat.completion" if self._identity.chat else "text_completion",
                "created": self._identity.created,
                "model": self._identity.model,
                "choices": [self._choice(index, end) for index, end in enumerate(ends)],
                "usage": self._identity.usage(
                    sum(end.completion_tokens for end in ends), max(end.cached_tokens for end in ends)
                ),
            }
        )

    def _choice(self, index: int, end: Delta) -> dict[str, Any]:
        assert end.finish is not None
        text, chat = "".join(self._texts[index]), self._identity.chat
        message: dict[str, Any] = {"role": "assistant", "content": text}
        finish = end.finish.value
        if self._calling is not None:
            reader = self._calling.reader()
            said = [*reader.add(text), *reader.end()]
            calls = called(said, self._identity.id, index, self._calling.family)
            message["content"] = _content(said) or (None if calls else "")
            if calls:
                message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
                finish = _finish(end.finish, called=True)
        choice = {
            "index": index,
            "logprobs": logprobs(self._told[index], self._piece, chat=chat),
            "finish_reason": finish,
        }
        return choice | ({"message": message} if chat else {"text": text})


class Events:
    """Server-sent events, one a delta. Invariant: `[DONE]` is sent only behind a complete answer."""

    content_type = b"text/event-stream; charset=utf-8"

    def __init__(
        self, identity: Identity, piece: Piece, *, include_usage: bool, calling: Calling | None = None
    ) -> None:
        self._identity = identity
        self._piece = piece
        self._calling = calling
        self._readers = [] if calling is None else [calling.reader() for _ in range(identity.choices)]
        self._include_usage = include_usage
        self._silent = set(range(identity.choices)) if identity.chat else set[int]()  # whose role has not been told
        self._completion_tokens = 0
        self._cached_tokens = 0
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

    def add(self, index: int, delta: Delta, *, last: bool) -> bytes:
        """One event; with the final delta also usage, if asked for, and the end mark."""
        if delta.error is not None:
            return b"data: " + orjson.dumps(delta.error.body()) + b"\n\n"
        told = logprobs(delta.likelihoods, self._piece, chat=self._identity.chat)
        choice: dict[str, Any] = {"index": index, "logprobs": told}
        finish = delta.finish.value if delta.finish else None
        if self._identity.chat:
            first = index in self._silent
            shown, finish = self._shown(index, delta)
            if not (shown or told or finish or first):
                return b""
            if first:
                shown = {"role": "assistant", "content": ""} | shown
            self._silent.discard(index)
            choice["delta"] = shown
        else:
            choice["text"] = delta.text
        choice["finish_reason"] = finish
        event = self._head + orjson.dumps(choice) + self._tail
        if delta.finish is not None:
            self._completion_tokens += delta.completion_tokens
            self._cached_tokens = max(self._cached_tokens, delta.cached_tokens)
        return event + self._end() if last else event

    def _shown(self, index: int, delta: Delta) -> tuple[dict[str, Any], str | None]:
        """A chat's delta and finish reason: text, and calls where there may be any."""
        finish = delta.finish.value if delta.finish else None
        if self._calling is None:
            return ({"content": delta.text} if delta.text else {}), finish
        reader = self._readers[index]
        said = reader.add(delta.text)
        if delta.finish is not None:
            said += reader.end()
            finish = _finish(delta.finish, called=reader.calls > 0)
        shown: dict[str, Any] = {"content": text} if (text := _content(said)) else {}
        if calls := called(said, self._identity.id, index, self._calling.family):
            shown["tool_calls"] = calls
        return shown, finish

    def _end(self) -> bytes:
        if not self._include_usage:
            return DONE
        usage = self._identity.usage(self._completion_tokens, self._cached_tokens)
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n" + DONE


def called(said: Sequence[Said], answer_id: str, choice: int, family: Family) -> list[dict[str, Any]]:
    """OpenAI's `tool_calls` of a stream's delta: id and name where a call begins, its arguments as they come."""
    made: dict[int, dict[str, Any]] = {}
    for one in said:
        match one:
            case CallBegins(index, name):
                made[index] = {
                    "index": index,
                    "id": new_id(answer_id, choice, index, family),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            case Arguments(index, text):
                call = made.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
            case Content():
                pass
    return list(made.values())


def _content(said: Sequence[Said]) -> str:
    return "".join(one.text for one in said if isinstance(one, Content))


def _finish(reason: FinishReason, *, called: bool) -> str:
    """An answer that was cut is not over, whatever it called."""
    return "tool_calls" if called and reason is FinishReason.STOP else reason.value


def logprobs(told: Sequence[Likelihood], piece: Piece, *, chat: bool) -> dict[str, Any] | None:
    """OpenAI's `logprobs` object, in the shape of chats or of completions; None where there is nothing to tell."""
    if not told:
        return None
    if not chat:
        return {
            "tokens": [_readable(piece(one.token)) for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [{_readable(piece(token)): log for token, log in one.top} for one in told],
        }

    def entry(token: int, log: float) -> dict[str, Any]:
        own = piece(token)
        return {"token": _readable(own), "logprob": log, "bytes": list(own)}

    return {
        "content": [
            entry(one.token, one.logprob) | {"top_logprobs": [entry(token, log) for token, log in one.top]}
            for one in told
        ]
    }


def _readable(piece: bytes) -> str:
    return piece.decode(errors="replace")


class Answer:
    """An ASGI response over the deltas of one request's choices.

    Invariants: the status line is sent with the first bytes, so an error before them is a status of its own; a client
    that goes away ends all choices in the engine, whether it streams or not; one that fails ends the others.
    """

    def __init__(self, outputs: Sequence[Output], form: Form) -> None:
        self._outputs = outputs
        self._form = form

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._close_when_gone(receive))
        started, open_choices = False, len(self._outputs)
        try:
            async for index, deltas in merged(self._outputs):
                final = deltas[-1]
                if final.finish is FinishReason.ABORT:
                    return
                if final.error is not None and not started:
                    raise final.error
                open_choices -= final.finish is not None
                last = open_choices == 0 or final.error is not None
                body = b"".join([self._form.add(index, delta, last=last and delta is final) for delta in deltas])
                if body and not started:
                    started = True
                    await send(_start(self._form.content_type, len(body) if last else None))
                if body:
                    await send({"type": "http.response.body", "body": body, "more_body": not last})
                if last:
                    return
        finally:
            watcher.cancel()
            self._close()

    def _close(self) -> None:
        for output in self._outputs:
            output.close()

    async def _close_when_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._close()


async def merged(outputs: Sequence[Output]) -> AsyncIterator[tuple[int, list[Delta]]]:
    """The deltas of all outputs as they come, each with its output's index."""
    if len(outputs) == 1:
        async for deltas in outputs[0]:
            yield 0, deltas
        return
    waiting = {asyncio.ensure_future(anext(output)): index for index, output in enumerate(outputs)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index, deltas = waiting.pop(task), task.result()
                if deltas[-1].finish is None:
                    waiting[asyncio.ensure_future(anext(outputs[index]))] = index
                yield index, deltas
    finally:
        for task in waiting:
            task.cancel()


def _start(content_type: bytes, length: int | None) -> dict[str, Any]:
    """The response's head; `length` in bytes, where the whole body is there already."""
    headers = [(b"content-type", content_type), (b"cache-control", b"no-store")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    return {"type": "http.response.start", "status": 200, "headers": headers}


def error_response(error: RequestError) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of an error."""
    return error.status, error.headers(), orjson.dumps(error.body())
