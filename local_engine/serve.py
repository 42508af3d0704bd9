"""Owns the engine's process: listening socket, event loop, signals, draining; refuses requests' content.

The socket is open before the model loads, so that whoever starts this process can ask how far it is.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import uvicorn
import uvloop
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from local_engine.config import Settings
from local_engine.engine import Engine, Model
from local_engine.errors import ConfigError
from local_engine.server import create_app

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection (aiohttp: 15 s), so that it is they who close, never mid-request."""

BACKLOG = 2048
"""Connections that may wait to be accepted, as many as uvicorn asks for."""

MAX_FILES = 65_536
"""Open connections and files, if the system permits so many."""

MAX_HEAD_BYTES = 1024 * 1024
"""Of a request line and headers, as they come in; a chunk of a body before them may be counted along."""

FLUSH_SECONDS = 2.0
"""Time for the last error events to reach their clients, after the drain's end."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a Unix socket where `uds` is given, else TCP."""

    host: str = "127.0.0.1"
    port: int = 8081
    uds: str | None = None

    def __str__(self) -> str:
        return f"unix:{self.uds}" if self.uds else f"http://{self.host}:{self.port}"


def serve(
    settings: Settings,
    address: Address,
    load: Callable[[], Model],
    *,
    exit_with_parent: bool,
    say: Callable[[str], None],
    token: str | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or, with `exit_with_parent`, the end of standard input; the exit status.

    Without `exit_with_parent` a model that cannot be loaded ends the process with status 1; with it, the process stays
    and /health says why, for the parent to read. With a `token`, only who sends it is served. Raises ConfigError where
    the address cannot be listened on, or standard input cannot be watched.
    """
    if exit_with_parent:
        _check_standard_input()
    _allow_connections()
    with _listening(address) as listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        status, ended = runner.run(_Process(settings, address, load, exit_with_parent, say, token).run(listener))
    if not ended:
        # The engine's thread is inside a load or a forward that takes long; interpreter exit would wait or crash in it.
        sys.stderr.flush()
        os._exit(status)
    return status


def _allow_connections() -> None:
    """Let this process have as many files as the system permits it: each connection is one, and the 1,024 that many
    systems begin with would end the next ones without an answer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with suppress(OSError, ValueError):  # macOS permits fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _QuietServer(uvicorn.Server):
    """uvicorn without signal handlers of its own, because SIGTERM has to drain the engine first."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Process:
    """One run. Invariant: the server ends only when no request is open, or the drain's time is over."""

    def __init__(
        self,
        settings: Settings,
        address: Address,
        load: Callable[[], Model],
        exit_with_parent: bool,
        say: Callable[[str], None],
        token: str | None,
    ) -> None:
        self._settings = settings
        self._address = address
        self._exit_with_parent = exit_with_parent
        self._say = say
        self._token = token
        self._engine = Engine(load, on_change=self._changed)
        self._ending = asyncio.Event()
        self._status = 0
        self._started = 0.0

    async def run(self, listener: socket.socket) -> tuple[int, bool]:
        """The exit status, and whether the engine's thread has ended."""
        loop = asyncio.get_running_loop()
        self._started = loop.time()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._ending.set)
        if self._exit_with_parent:
            await loop.connect_read_pipe(lambda: _UntilEof(self._ending.set), sys.stdin)
        self._say(f"listening on {self._address}, loading {self._settings.model} …")
        self._engine.start()
        server = _QuietServer(self._configured(create_app(self._engine, self._settings, token=self._token)))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        ending = asyncio.create_task(self._ending.wait())
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        self._engine.drain()
        expiry = loop.call_later(self._settings.drain_seconds, self._engine.abort_all)
        server.should_exit = True  # closes the listener, then waits for the open requests
        await serving
        expiry.cancel()
        return self._status, self._engine.stop()

    def _configured(self, app: ASGIApp) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=_BoundedHead,
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(self._settings.drain_seconds + FLUSH_SECONDS) + 1,
        )

    def _changed(self) -> None:
        seconds = asyncio.get_running_loop().time() - self._started
        if self._engine.failure is None:
            if not self._ending.is_set():
                self._say(f"ready in {seconds:.1f} s: {self._engine.model.description}")
            return
        self._say(f"error: {self._engine.failure}")
        self._status = 1
        if not self._exit_with_parent:
            self._ending.set()


class _BoundedHead(HttpToolsProtocol):
    """Refuses a head that grows without an end, which httptools would keep in memory."""

    _head_bytes: int | None = None  # since it began; None outside of a head

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too long.")


class _UntilEof(asyncio.Protocol):
    """Calls `ended` when the pipe's other end is closed; what comes before is ignored."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()


def _check_standard_input() -> None:
    """Raise ConfigError unless its end can be waited for; libuv ends the process over a file or /dev/null."""
    if sys.stdin is not None:
        descriptor = sys.stdin.fileno()
        kind = os.fstat(descriptor).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or os.isatty(descriptor):
            return
    raise ConfigError(
        [
            "--exit-with-parent watches standard input, which is neither a pipe nor a terminal: "
            "start the engine with a pipe, or leave the flag away"
        ]
    )


@contextmanager
def _listening(address: Address) -> Iterator[socket.socket]:
    """A bound socket, and its file removed afterwards. Raises ConfigError with the reason."""
    try:
        listener = _bound_path(address.uds) if address.uds else _bound_port(address.host, address.port)
    except OSError as error:
        fix = {
            errno.EADDRINUSE: "stop whoever listens there, or give another --port or --uds",
            errno.EACCES: "choose a port above 1023 or a directory that you may write to",
        }.get(error.errno or 0, "give another --host, --port or --uds")
        raise ConfigError([f"cannot listen on {address}: {error.strerror or error}; {fix}"]) from error
    made = os.stat(address.uds) if address.uds else None
    try:
        # From here on a connection waits instead of being refused, so that nobody takes this for a dead socket.
        listener.listen(BACKLOG)
        yield listener
    finally:
        listener.close()
        if address.uds and made and _is_still(made, address.uds):
            Path(address.uds).unlink(missing_ok=True)


def _is_still(made: os.stat_result, path: str) -> bool:
    """Whether the path is the file that was made; a successor may have put its own there while this one drained."""
    try:
        return os.path.samestat(made, os.stat(path))
    except FileNotFoundError:
        return False


def _bound_port(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
    except OSError:
        listener.close()
        raise
    return listener


def _bound_path(path: str) -> socket.socket:
    """A Unix socket that only this user may use; one left over from a dead process is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o600)
    except OSError:
        listener.close()
        raise
    return listener
