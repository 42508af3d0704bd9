"""Several processes that answer on one port, for a machine with several cores: what `--workers N` starts.

Owns their lives: each is started again when it ends, with a growing pause, told to drain on SIGTERM, and ends by itself
when this process is gone. This process answers no requests. It keeps the engines running, so that a worker's death ends
none, and has the admin port, which tells of all workers. Refuses to balance: each worker has a socket of its own on the
port (SO_REUSEPORT), among which Linux deals connections out. (Of one socket that all share, whoever wakes first takes
all connections that are waiting, and a client that opens a hundred at once would keep one core busy.) A worker listens
once it can answer, and no longer than it lives; connections that it had not accepted by then are lost with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import httpx
import uvloop

from gateway.embedded import embedded
from gateway.follow import Follower
from gateway.running import Gateway, Tell
from gateway.server import Served, config_of
from gateway.settings import PREFIX, Settings

FIRST_BACKOFF = 0.5  # seconds until a worker that did not live long is started again; doubles
LONGEST_BACKOFF = 30.0
LONG = 10.0  # seconds: one that lived so long is started again at once
TO_END = 10.0  # seconds beyond the drain's after which a worker is killed
TIMEOUT = 5.0  # seconds for one worker's answer
LONG_TIMEOUT = 30.0  # where files are read, or stored answers counted or forgotten


def socket_of(folder: Path, index: int) -> Path:
    """Where a worker's own admin endpoints are, for its parent alone."""
    return folder / f"worker-{index}.sock"


class _InTurn(io.FileIO):
    """A stream that several processes write to, one line at a time."""

    def __init__(self, fd: int, lock: Path) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._turn = lock.open("ab")

    def write(self, line: Any, /) -> int:
        """Returns once all is written."""
        fcntl.flock(self._turn, fcntl.LOCK_EX)  # whoever dies gives it back
        try:
            return super().write(line)
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)

    def close(self) -> None:
        """The stream itself stays open."""
        super().close()
        self._turn.close()


def in_turn(stream: BinaryIO, folder: Path) -> BinaryIO:
    """The stream for all processes of a folder, so that their lines stay whole: those of more than 4,096 bytes mix on a
    pipe that is full. A file takes a write as one."""
    fd = stream.fileno()
    return stream if stat.S_ISREG(os.fstat(fd).st_mode) else _InTurn(fd, folder / "log.lock")


def shared(address: Any, family: int) -> socket.socket:
    """A socket on an address that others have as well; it does not listen yet. Raises OSError."""
    made = socket.socket(family)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def environment_of(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that tell a worker the same as this process was told, by variables or flags."""
    told = {name: value for name, value in environ.items() if not name.startswith(PREFIX) or not _is_setting(name)}
    for one in fields(settings):
        value = getattr(settings, one.name)
        if value != one.default:
            told[f"{PREFIX}{one.name.upper()}"] = str(value)
    return told


def _is_setting(name: str) -> bool:
    return name.removeprefix(PREFIX).lower() in Settings.__dataclass_fields__


@dataclass
class Worker:
    """One place for a process. `restarts` counts those after the first."""

    index: int
    process: asyncio.subprocess.Process | None = None
    restarts: int = 0

    @property
    def pid(self) -> int | None:
        """While it lives."""
        return self.process.pid if self.process is not None and self.process.returncode is None else None

    def send(self, what: signal.Signals) -> None:
        """A signal, if it lives."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(what)


@dataclass(frozen=True, slots=True)
class Start:
    """How to start one: its command, by its index and the descriptor of its socket; its variables; a socket that keeps
    the port for all, and takes no connections; and the folder of the sockets on which workers answer us."""

    command: Callable[[int, int], Sequence[str]]
    environ: Mapping[str, str]
    kept: socket.socket
    folder: Path


class Workers:
    """The workers of one gateway. Invariant: at most one process lives in each place, and none outlives `run`."""

    def __init__(self, many: int, start: Start, tell: Tell) -> None:
        self.all = [Worker(index) for index in range(many)]
        self._start = start
        self._tell = tell
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Keep them running until `stop`, and then until the last has ended."""
        await asyncio.gather(*(self._keep(worker) for worker in self.all))

    def stop(self) -> None:
        """Let them end what they have begun."""
        self._stopping.set()
        self._start.kept.close()
        self.send(signal.SIGTERM)

    def send(self, what: signal.Signals) -> None:
        """A signal to each."""
        for worker in self.all:
            worker.send(what)

    async def asked(self, path: str, method: str = "GET", timeout: float = TIMEOUT) -> list[httpx.Response | None]:
        """Each worker's answer; None where there is none, as from one that is still starting."""

        async def one(index: int) -> httpx.Response | None:
            # No TLS on a Unix socket: the certificates that httpx reads otherwise would hold this process up.
            transport = httpx.AsyncHTTPTransport(uds=str(socket_of(self._start.folder, index)), verify=False)
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://worker", timeout=timeout) as client:
                    return await client.request(method, path)
            except httpx.HTTPError:
                return None

        return await asyncio.gather(*(one(worker.index) for worker in self.all))

    async def reload(self) -> list[httpx.Response | None]:
        """Let each read its files now. They are asked, not sent a signal: that would end one that is still starting,
        which reads them anyway."""
        return await self.asked("/reload", "POST", LONG_TIMEOUT)

    async def _keep(self, worker: Worker) -> None:
        backoff = FIRST_BACKOFF
        while not self._stopping.is_set():
            began = time.monotonic()
            ended = await self._one_life(worker)
            if self._stopping.is_set():
                return
            lived = time.monotonic() - began
            wait, backoff = (0.0, FIRST_BACKOFF) if lived >= LONG else (backoff, min(2 * backoff, LONGEST_BACKOFF))
            worker.restarts += 1
            self._tell(f"worker {worker.index} {ended}; started again in {wait:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait)

    async def _one_life(self, worker: Worker) -> str:
        """Start one and see it end: how it did."""
        try:
            with shared(self._start.kept.getsockname(), self._start.kept.family) as listener:
                worker.process = await asyncio.create_subprocess_exec(
                    *self._start.command(worker.index, listener.fileno()),
                    stdin=asyncio.subprocess.PIPE,  # its end of file tells the worker that we are gone
                    env=self._start.environ,
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # a Ctrl-C on the terminal is for us, and we tell it
                )
        except OSError as error:
            return f"cannot be started ({error.strerror})"
        if self._stopping.is_set():  # while it was being started, when there was nobody yet to tell
            worker.send(signal.SIGTERM)
        status = await worker.process.wait()
        return f"was ended by signal {-status}" if status < 0 else f"exited with status {status}"


@dataclass(frozen=True, slots=True)
class Keeping:
    """What the parent has besides its workers: the gateway that keeps engines, what follows files, and the admin port.
    A worker that has not ended after `drain` seconds and some is killed."""

    gateway: Gateway
    followers: Sequence[Follower]
    admin: Served | None
    drain: float


def serve_workers_until_stopped(workers: Workers, keeping: Keeping) -> None:
    """Serve until a signal, and then until the last worker has ended."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(workers, keeping))


async def _serve(workers: Workers, keeping: Keeping) -> None:
    loop = asyncio.get_running_loop()
    late: list[asyncio.TimerHandle] = []
    reloading: set[asyncio.Task[Any]] = set()

    def stop() -> None:
        if not late:
            keeping.gateway.stop_soon()
            late.append(loop.call_later(keeping.drain + TO_END, workers.send, signal.SIGKILL))
        workers.stop()

    def reload() -> None:
        for follower in keeping.followers:
            follower.ask()
        task = asyncio.create_task(workers.reload())
        reloading.add(task)
        task.add_done_callback(reloading.discard)

    for signal_number, act in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, reload)):
        loop.add_signal_handler(signal_number, act)
    async with keeping.gateway.lifespan(None), _followed(keeping.followers), contextlib.AsyncExitStack() as stack:
        if keeping.admin is not None:
            await stack.enter_async_context(embedded(config_of(keeping.admin.app, 1.0), keeping.admin.listener))
        try:
            await workers.run()
        finally:
            workers.send(signal.SIGKILL)
            for timer in late:
                timer.cancel()


@contextlib.asynccontextmanager
async def _followed(followers: Sequence[Follower]) -> AsyncIterator[None]:
    watching = asyncio.gather(*(follower.watch() for follower in followers))
    try:
        yield
    finally:
        for follower in followers:
            follower.stop()
        await watching
