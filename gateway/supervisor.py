"""The engine child process: start it, wait until it is healthy, restart it when it dies or fails, stop it with us.

Owns one child per deployment that is served locally, and the Unix socket on which it listens. Refuses to import the
engine: it is another program, and a fault of it ends in an exit status here.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import httpx

PROBE_EVERY = 0.1  # seconds between two looks at an engine that is starting
WATCH_EVERY = 1.0  # and at one that is up
PROBE_TIMEOUT = 2.0
MISSED_LOOKS = 2  # of an engine that another process watches: one that is dead is restarted soon
MISSED_PROBES = 10  # an engine that is up but silent for this many looks is killed
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
_LINE_LIMIT = 400


class Reports(Protocol):
    """Who is told what became of an engine. All reasons are fit for callers' eyes; `said` is the engine's own output,
    for the terminal alone."""

    def engine_down(self, name: str, reason: str, retry_after: float) -> None: ...

    async def engine_up(self, name: str, described: Mapping[str, Any]) -> None:
        """The engine answers, and says this of its model. Raises ValueError where nobody can make use of that."""

    def engine_said(self, name: str, line: str) -> None: ...


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What to start: the deployment's name, its model, and the path of the Unix socket on which it shall listen.

    `program` is the engine's command; `serve` and its options are added to it.
    """

    name: str
    model: str
    uds: str
    start_seconds: float = 600.0
    quantization: str = "none"
    speculation: str = "off"
    draft_model: str | None = None
    program: tuple[str, ...] = (sys.executable, "-m", "local_engine")

    def command(self) -> Sequence[str]:
        """The child's command line."""
        named = ["--model", self.model, "--quantization", self.quantization]
        if self.speculation != "off":
            named += ["--speculation", self.speculation]
        if self.draft_model is not None:
            named += ["--draft-model", self.draft_model]
        return [*self.program, "serve", *named, "--uds", self.uds, "--exit-with-parent"]


class Supervised(Protocol):
    """An engine that is kept running, whoever does that."""

    @property
    def spec(self) -> EngineSpec: ...

    @property
    def pid(self) -> int | None: ...

    def start(self) -> None: ...

    async def stop(self, grace: float = 10.0) -> None: ...


class Supervisor:
    """Keeps one engine running. Invariant: at most one child lives at a time, and none outlives `stop` (or us: it
    watches its stdin)."""

    def __init__(
        self,
        spec: EngineSpec,
        reports: Reports,
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self.spec = spec
        self._reports = reports
        self._sleep = sleep
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id while it lives."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    def start(self) -> None:
        """Begin, in the background. Needs a running event loop."""
        self._reports.engine_down(self.spec.name, "its engine is starting", 2.0)
        self._task = asyncio.create_task(self._run())

    async def stop(self, grace: float = 10.0) -> None:
        """SIGTERM, then SIGKILL after the grace period. Until `start` the deployment is down."""
        self._reports.engine_down(self.spec.name, "its engine is stopped", 5.0)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), grace)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _run(self) -> None:
        backoff = FIRST_BACKOFF
        while True:
            was_up, ended = await self._one_life()
            wait = 0.0 if was_up else backoff  # what had worked is started again at once
            backoff = FIRST_BACKOFF if was_up else min(backoff * 2, LONGEST_BACKOFF)
            what = (
                "its engine stopped and is being restarted"
                if was_up
                else "its engine failed to start and is tried again"
            )
            self._reports.engine_said(self.spec.name, f"{ended}; restarting in {wait:g} s")
            self._reports.engine_down(self.spec.name, what, max(wait, 2.0))
            await self._sleep(wait)

    async def _one_life(self) -> tuple[bool, str]:
        """Start a child and see it end: whether it had been up, and how it ended."""
        try:
            process = self._process = await asyncio.create_subprocess_exec(
                *self.spec.command(),
                stdin=asyncio.subprocess.PIPE,  # its end of file tells the child that we are gone
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # a Ctrl-C on the terminal is for us: we drain first, then stop the engine
            )
        except OSError as error:
            return False, f"cannot be started ({error.strerror})"
        echo = asyncio.create_task(self._echo(process))
        was_up = await self._watch(process)
        if process.returncode is None:
            process.kill()
        status = await process.wait()
        await echo
        return was_up, f"exited with status {status}"

    async def _echo(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:  # longer than the reader's buffer, as a progress bar is: it has been dropped
                continue
            if not line:
                return
            self._reports.engine_said(self.spec.name, line.decode(errors="replace").rstrip()[:_LINE_LIMIT])

    async def _watch(self, process: asyncio.subprocess.Process) -> bool:
        """Return when the child has died or must be killed; whether it had been up."""
        async with _client(self.spec) as client:
            exited = asyncio.create_task(process.wait())
            try:
                if not await self._until_ready(client, exited):
                    return False
                described = await client.get("/tokenizer")
                await self._reports.engine_up(self.spec.name, described.json())
                await self._while_healthy(client, exited)
                return True
            except httpx.HTTPError:  # it died between two questions
                return False
            except ValueError as error:
                self._reports.engine_said(self.spec.name, f"what it says of itself cannot be used: {error}")
                return False
            finally:
                exited.cancel()

    async def _until_ready(self, client: httpx.AsyncClient, exited: asyncio.Task[int]) -> bool:
        looks = int(self.spec.start_seconds / PROBE_EVERY)
        for _ in range(looks):
            if exited.done():
                return False
            health = await _health(client)
            if health in ("ready", "failed"):
                return health == "ready"
            await asyncio.wait({exited}, timeout=PROBE_EVERY)
        self._reports.engine_said(self.spec.name, f"not ready after {self.spec.start_seconds:g} s")
        return False

    async def _while_healthy(self, client: httpx.AsyncClient, exited: asyncio.Task[int]) -> None:
        missed = 0
        while not exited.done() and missed < MISSED_PROBES:
            await asyncio.wait({exited}, timeout=WATCH_EVERY)
            health = await _health(client)
            if health == "failed":  # which it stays, however long it lives
                self._reports.engine_said(self.spec.name, "says that it has failed; it is killed")
                return
            missed = 0 if health == "ready" else missed + 1
        if not exited.done():
            self._reports.engine_said(self.spec.name, "does not answer any more; it is killed")


class Onlooker:
    """Looks at an engine that another process of this gateway keeps running, and tells the same of it. Invariant: it
    starts nothing and ends nothing."""

    def __init__(self, spec: EngineSpec, reports: Reports) -> None:
        self.spec = spec
        self._reports = reports
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """It is not ours."""
        return None

    def start(self) -> None:
        """Begin, in the background. Needs a running event loop."""
        self._reports.engine_down(self.spec.name, "its engine is starting", 2.0)
        self._task = asyncio.create_task(self._run())

    async def stop(self, grace: float = 0.0) -> None:
        """Look no more. Until `start` the deployment is down."""
        self._reports.engine_down(self.spec.name, "its engine is stopped", 5.0)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            async with _client(self.spec) as client:
                while await _health(client) != "ready":  # noqa: ASYNC110 - another process' event
                    await asyncio.sleep(PROBE_EVERY)
                with contextlib.suppress(httpx.HTTPError, ValueError):  # what it says, its supervisor tells
                    described = await client.get("/tokenizer")
                    await self._reports.engine_up(self.spec.name, described.json())
                    await self._while_healthy(client)
                    self._reports.engine_down(self.spec.name, "its engine stopped and is being restarted", 2.0)
            await asyncio.sleep(PROBE_EVERY)

    async def _while_healthy(self, client: httpx.AsyncClient) -> None:
        missed = 0
        while missed < MISSED_LOOKS:
            await asyncio.sleep(WATCH_EVERY)
            missed = 0 if await _health(client) == "ready" else missed + 1


def _client(spec: EngineSpec) -> httpx.AsyncClient:
    """For an engine's own pages. No TLS on a Unix socket: the certificates that httpx reads otherwise would hold
    requests up."""
    transport = httpx.AsyncHTTPTransport(uds=spec.uds, verify=False)
    return httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=PROBE_TIMEOUT)


async def _health(client: httpx.AsyncClient) -> str:
    """What the engine says of itself: ready, loading, failed, or silent."""
    try:
        told = (await client.get("/health")).json()
    except (httpx.HTTPError, ValueError):
        return "silent"
    return str(told.get("status", "silent")) if isinstance(told, dict) else "silent"
