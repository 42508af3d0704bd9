"""What goes back to a caller: status, headers, chunks. Refuses to know where they come from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from urllib.parse import quote

from gateway.backends.base import Chunk

EVENT_STREAM = b"text/event-stream; charset=utf-8"


@dataclass(slots=True)
class Reply:
    """What goes back: status, headers, and chunks until the last one. `close` is idempotent and must be called."""

    status: int
    headers: list[tuple[bytes, bytes]]
    chunks: AsyncIterator[Chunk]
    close: Callable[[], Awaitable[None]]
    content_type: bytes = b"application/json"

    @classmethod
    def whole(
        cls, status: int, headers: list[tuple[bytes, bytes]], chunk: Chunk, content_type: bytes = b"application/json"
    ) -> Reply:
        """A reply that is complete and holds nothing open."""
        return cls(status, headers, _One(chunk), _nothing, content_type)


class _One:
    """A reply's only chunk."""

    def __init__(self, chunk: Chunk) -> None:
        self._chunk: Chunk | None = chunk

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk, self._chunk = self._chunk, None
        if chunk is None:
            raise StopAsyncIteration
        return chunk


async def _nothing() -> None:
    return None


def header_bytes(text: str) -> bytes:
    """Header bytes for a name of the policy: ASCII stays readable, the rest is percent-encoded."""
    return quote(text, safe=" !#$&'()*+,/:;=?@[]{}|~<>\"").encode("ascii")
