"""Owns the load: streaming chats over HTTP, each checked and timed; refuses to start servers.

The load is closed: so many clients, each sending its next request when the last one's answer has ended.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httptools
import orjson

from local_engine.bench.program import BenchError, Launch

READ_BYTES = 65_536
TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer: seconds to its first text and to its end, and the text."""

    first: float
    total: float
    text: str


@dataclass(slots=True)
class _Stream:
    """The events of one response, as its bytes come. Called by httptools."""

    began: float
    first: float | None = None
    done: bool = False
    texts: list[str] = field(default_factory=list)
    tokens: int | None = None
    error: str | None = None
    _rest: bytes = b""

    def on_body(self, body: bytes) -> None:
        *lines, self._rest = (self._rest + body).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                self._event(line[6:])

    def on_message_complete(self) -> None:
        self.done = True

    def _event(self, data: bytes) -> None:
        event = orjson.loads(data)
        if "error" in event:
            self.error = orjson.dumps(event["error"]).decode()[:200]  # raising here would lose it in the parser
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            if text := choice["delta"].get("content"):
                if self.first is None:
                    self.first = time.perf_counter() - self.began
                self.texts.append(text)


async def ask(launch: Launch, prompt: str, tokens: int) -> Answered:
    """One chat, greedy, of exactly so many tokens. Raises BenchError where the answer is another."""
    body = orjson.dumps(
        {
            "model": launch.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{launch.port}\r\nconnection: close\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    stream = _Stream(time.perf_counter())
    parser = httptools.HttpResponseParser(stream)
    reader, writer = await asyncio.open_connection("127.0.0.1", launch.port)
    try:
        writer.write(head.encode() + body)
        while not stream.done and (data := await reader.read(READ_BYTES)):
            parser.feed_data(data)
    finally:
        writer.close()
    if parser.get_status_code() != 200:
        raise BenchError(f"{launch.name} answered {parser.get_status_code()}")
    if stream.error is not None:
        raise BenchError(f"{launch.name} ended a stream in an error: {stream.error}")
    if stream.first is None:
        raise BenchError(f"{launch.name} gave no text")
    if stream.tokens is not None and stream.tokens != tokens:
        raise BenchError(f"{launch.name} gave {stream.tokens} tokens, asked for {tokens}")
    return Answered(stream.first, time.perf_counter() - stream.began, "".join(stream.texts))


async def ask_all(launch: Launch, prompts: Sequence[str], streams: int, tokens: int) -> list[Answered]:
    """All prompts, so many at a time, in their order."""
    waiting = iter(enumerate(prompts))
    found: dict[int, Answered] = {}

    async def client() -> None:
        for index, prompt in waiting:
            found[index] = await ask(launch, prompt, tokens)

    async with asyncio.timeout(TIMEOUT_SECONDS), asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(client())
    return [found[index] for index in range(len(prompts))]
