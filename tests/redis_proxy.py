"""A TCP proxy between a test and its Redis that is as slow as it is told to be, says nothing, or hangs up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Proxy:
    """`delay`: seconds that each answer waits. `silent`: answers are kept for good. `refuses`: whoever connects is hung
    up on, and whoever is connected. `passed` counts what clients have sent, in pieces."""

    url: str = ""
    delay: float = 0.0
    silent: bool = False
    refuses: bool = False
    passed: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    def hang_up(self) -> None:
        """End every connection, and take no other until `refuses` is false."""
        self.refuses = True
        for writer in self._open:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int) -> None:
        if self.refuses:
            writer.close()
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # the server itself is gone
            writer.close()
            return
        both = {writer, back}
        self._open |= both
        try:
            await asyncio.gather(self._copy(reader, back, 0), self._copy(there, writer, 1))
        finally:
            self._open -= both
            for one in both:
                one.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: int) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                self.passed += not answers
                if answers and self.delay:
                    await asyncio.sleep(self.delay)
                if not (answers and self.silent):
                    writer.write(data)
        writer.close()


@asynccontextmanager
async def proxied(url: str) -> AsyncIterator[Proxy]:
    """In front of the Redis at `url`, until the block ends."""
    proxy = Proxy()
    port = urlsplit(url).port
    assert port is not None

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            await proxy._serve(reader, writer, port)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    proxy.url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        proxy.hang_up()
        await asyncio.sleep(0.01)
