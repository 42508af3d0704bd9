"""Serves the application until a signal ends it.

Owns uvicorn's settings, the admin port beside it, what a SIGHUP and a SIGTERM mean, and the watch over files meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from math import ceil
from types import FrameType
from typing import cast

import uvicorn
import uvloop

from gateway.edge import Application
from gateway.embedded import embedded
from gateway.follow import Follower
from gateway.http1 import Http1, http1_for


@dataclass(frozen=True, slots=True)
class Served:
    """An application and the socket that it listens on."""

    app: Application
    listener: socket.socket


@dataclass(frozen=True, slots=True)
class Ending:
    """How serving ends, in seconds. On a signal `announce` is called, requests are taken for another `delay`, during
    which balancers learn that none should come, and what is open then may go on for `drain`."""

    announce: Callable[[], None]
    delay: float
    drain: float


def serve_until_stopped(
    main: Served, admin: Served | None, followers: Sequence[Follower], ending: Ending, parent: int | None = None
) -> None:
    """Serve callers, and operators as long as there are callers. `parent` is a descriptor whose end of file says that
    whoever started this process is gone, which is as a signal to stop."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(main, admin, followers, ending, parent))


class _Server(uvicorn.Server):
    """uvicorn's server, which takes requests for a while after the first signal to stop. A second one ends that."""

    def __init__(self, config: uvicorn.Config, ending: Ending) -> None:
        super().__init__(config)
        self._ending = ending
        self._announced = False
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal came: between any two instructions, so the event loop does what is to be done."""
        if self._announced:
            super().handle_exit(sig, frame)
            return
        self._announced = True
        self._loop.call_soon_threadsafe(self._begin_to_end, sig)

    def _begin_to_end(self, sig: int) -> None:
        self._ending.announce()
        for connection in self.server_state.connections:
            cast(Http1, connection).leave()  # so that its client opens the next one elsewhere
        self._loop.call_later(self._ending.delay, super().handle_exit, sig, None)


async def _serve(
    main: Served, admin: Served | None, followers: Sequence[Follower], ending: Ending, parent: int | None
) -> None:
    def ask() -> None:
        for follower in followers:
            follower.ask()

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, ask)
    if parent is not None:
        loop.add_reader(parent, _orphaned, loop, parent)
    watching = asyncio.gather(*(follower.watch() for follower in followers))
    async with AsyncExitStack() as stack:
        if admin is not None:
            await stack.enter_async_context(embedded(config_of(admin.app, 1.0), admin.listener))
        try:
            await _Server(config_of(main.app, ending.drain), ending).serve(sockets=[main.listener])
        finally:
            for follower in followers:
                follower.stop()
            await watching


def _orphaned(loop: asyncio.AbstractEventLoop, parent: int) -> None:
    if not os.read(parent, 1):
        loop.remove_reader(parent)
        os.kill(os.getpid(), signal.SIGTERM)


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
