"""Serves the application until a signal ends it.

Owns uvicorn's settings, what a SIGHUP means, and the watch over the policy's files while the server runs.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from math import ceil

import uvicorn
import uvloop
from starlette.types import ASGIApp

from gateway.http1 import Http1
from gateway.reload import Reloader


def serve_until_stopped(app: ASGIApp, listener: socket.socket, reloader: Reloader, drain_seconds: float) -> None:
    """Serve on `listener`. Streams that are open at the end may go on for `drain_seconds`."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(app, listener, reloader, drain_seconds))


async def _serve(app: ASGIApp, listener: socket.socket, reloader: Reloader, drain_seconds: float) -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloader.ask)
    watching = asyncio.create_task(reloader.watch())
    try:
        await uvicorn.Server(config_of(app, drain_seconds)).serve(sockets=[listener])
    finally:
        reloader.stop()
        await watching


def config_of(app: ASGIApp, drain_seconds: float) -> uvicorn.Config:
    """How uvicorn serves an application here: without its own logs and headers, and without believing a proxy's."""
    return uvicorn.Config(
        app,
        http=Http1,
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=ceil(drain_seconds),
    )
