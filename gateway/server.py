"""Serves the application until a signal ends it.

Owns uvicorn's settings, the admin port beside it, what a SIGHUP means, and the watch over files meanwhile.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import ceil

import uvicorn
import uvloop

from gateway.edge import Application
from gateway.embedded import embedded
from gateway.follow import Follower
from gateway.http1 import http1_for


@dataclass(frozen=True, slots=True)
class Served:
    """An application and the socket that it listens on."""

    app: Application
    listener: socket.socket


def serve_until_stopped(
    main: Served, admin: Served | None, followers: Sequence[Follower], drain_seconds: float
) -> None:
    """Serve callers, and operators as long as there are callers. Streams that are open at the end may go on for
    `drain_seconds`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(main, admin, followers, drain_seconds))


async def _serve(main: Served, admin: Served | None, followers: Sequence[Follower], drain_seconds: float) -> None:
    def ask() -> None:
        for follower in followers:
            follower.ask()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, ask)
    watching = asyncio.gather(*(follower.watch() for follower in followers))
    async with AsyncExitStack() as stack:
        if admin is not None:
            await stack.enter_async_context(embedded(config_of(admin.app, 1.0), admin.listener))
        try:
            await uvicorn.Server(config_of(main.app, drain_seconds)).serve(sockets=[main.listener])
        finally:
            for follower in followers:
                follower.stop()
            await watching


def config_of(app: Application, drain_seconds: float) -> uvicorn.Config:
    """How uvicorn serves an application here: without its own logs and headers, and without believing a proxy's."""
    return uvicorn.Config(
        app.asgi,
        http=http1_for(app.endpoints, app.otherwise),
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=ceil(drain_seconds),
    )
