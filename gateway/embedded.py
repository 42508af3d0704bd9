"""A uvicorn server inside a program that has its own signal handling and may have other servers.

Owns starting it, knowing that it has started, and stopping it. Refuses signals.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn


class EmbeddedServer(uvicorn.Server):
    """A uvicorn server inside another program, which keeps its own signal handling."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()
        self.stopping = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    async def main_loop(self) -> None:
        await self.stopping.wait()  # uvicorn's own loop looks ten times a second

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def embedded(config: uvicorn.Config, listener: socket.socket) -> AsyncIterator[EmbeddedServer]:
    """A server on a socket, in the running loop, from its start until the block ends."""
    server = EmbeddedServer(config)
    task = asyncio.create_task(server.serve([listener]))
    try:
        await server.ready.wait()
        yield server
    finally:
        server.stopping.set()
        await task
