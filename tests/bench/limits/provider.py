"""The provider that the limits are judged by: a process of its own, which says what it saw.

Owns the times, tokens and money of every call. What it bills is what it was asked to make, whether or not anybody read
it: a gateway that is killed does not make it cheaper. Refuses to be a model.

    POST anything   a question "NUMBER [fault]": PROMPT_TOKENS and between max_tokens - SPREAD and max_tokens more,
                    after `--delay` seconds; faults are `fail` (500), `full` (429), `drop` (it hangs up), `cut` (a
                    stream that breaks off before its usage)
    GET  /log       all calls so far, as JSON
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from typing import Any, cast

import orjson
import uvloop

NUSD_A_TOKEN = 50_000  # 50 USD a million, prompt or answer
PROMPT_TOKENS = 20
SPREAD = 20
FREE = ("fail", "full")  # nobody bills an error


@dataclass(slots=True)
class Open:
    """One call; see `judge.Seen`."""

    name: str
    at: float
    until: float
    tokens: int
    how: str

    def told(self) -> dict[str, Any]:
        """As `/log` says it."""
        tokens = 0 if self.how in FREE else self.tokens
        return {
            "name": self.name,
            "at": self.at,
            "until": self.until or time.time(),
            "tokens": tokens,
            "nusd": tokens * NUSD_A_TOKEN,
            "how": self.how,
        }


class Provider:
    """Everything that arrived."""

    def __init__(self, delay: float) -> None:
        self.delay = delay
        self.calls: list[Open] = []

    def begun(self, name: str, tokens: int) -> Open:
        """A call has arrived."""
        call = Open(name, time.time(), 0.0, tokens, "open")
        self.calls.append(call)
        return call


def whole(status: bytes, document: object) -> bytes:
    """A plain HTTP answer."""
    body = orjson.dumps(document)
    head = b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    return head + body


_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"


def _event(delta: object, finish: str | None = None, usage: object = None) -> bytes:
    choices = [] if usage else [{"index": 0, "delta": delta, "finish_reason": finish}]
    told = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
    return b"data: " + orjson.dumps(told | ({"usage": usage} if usage else {})) + b"\n\n"


class Connection(asyncio.Protocol):
    """One connection of a gateway: one call at a time."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider
        self._buffer = b""
        self._call: Open | None = None
        self._answer: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Whoever hangs up before the end has gone."""
        if self._answer is not None:
            self._answer.cancel()
        self._end("gone")

    def data_received(self, data: bytes) -> None:
        """Begin as soon as the request is whole."""
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        if head.startswith(b"GET"):
            self._buffer = b""
            self._transport.write(whole(b"200 OK", [call.told() for call in self._provider.calls]))
            return
        at = head.lower().find(b"content-length:")
        if at < 0 or len(body) < int(head[at + 15 :].split(b"\r\n", 1)[0]):
            return
        self._buffer = b""
        asked = orjson.loads(body)
        name, _, fault = str(asked["messages"][0]["content"]).partition(" ")
        made = int(asked["max_tokens"]) - int(name) % (SPREAD + 1)
        self._call = self._provider.begun(name, PROMPT_TOKENS + made)
        self._answer = asyncio.ensure_future(self._give(fault.strip(), made, bool(asked.get("stream"))))

    async def _give(self, fault: str, made: int, stream: bool) -> None:
        usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": made, "total_tokens": PROMPT_TOKENS + made}
        if stream and fault not in FREE:
            self._transport.write(_STREAM + _event({"role": "assistant", "content": "so"}))
        await asyncio.sleep(self._provider.delay)
        self._end(fault or "ok")
        if fault in FREE:
            status = b"500 Internal Server Error" if fault == "fail" else b"429 Too Many Requests"
            self._transport.write(whole(status, {"error": {"message": "as asked", "type": "e", "code": "e"}}))
        elif fault:
            self._transport.close()
        elif stream:
            self._transport.write(_event({}, "stop") + _event(None, None, usage) + b"data: [DONE]\n\n")
            self._transport.close()
        else:
            message = {"role": "assistant", "content": "so it is"}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            told = {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
            self._transport.write(whole(b"200 OK", told | {"usage": usage}))

    def _end(self, how: str) -> None:
        if self._call is not None:
            self._call.until, self._call.how = time.time(), how
            self._call = None


async def serve(port: int, delay: float) -> None:
    """Serve on 127.0.0.1 until cancelled."""
    provider = Provider(delay)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(provider), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


def main() -> None:
    """`python -m tests.bench.limits.provider --port PORT`"""
    parser = argparse.ArgumentParser(description="The provider that limits are judged by.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--delay", type=float, default=0.2, help="seconds that an answer takes")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.delay))


if __name__ == "__main__":
    main()
