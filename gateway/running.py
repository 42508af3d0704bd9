"""The running gateway: what a policy needs besides itself (backends, engines, detectors, token counters), from start to
stop and from one policy to the next.

Owns their lives. `adopt` makes what is new, swaps `ChatPath.serving` whole, and closes what is no longer named when the
last request that may call it has ended. Refuses to read policy files (reload.py does) and to answer requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

from gateway.access import Access
from gateway.admission import Limiter
from gateway.answers import Books, Log
from gateway.backends.base import Backend
from gateway.backends.build import backend_of
from gateway.backends.cloud import CloudLibrary
from gateway.backends.replicated import ReplicatedBackend
from gateway.cache import Counts
from gateway.chat import ChatPath
from gateway.encodings import load_encoding
from gateway.engines import Engine, EngineRoom, Known
from gateway.fleet import Fleet
from gateway.generation import Generation, Prepared, is_moved, prepared_for
from gateway.keeping import answers_of, journal_of, store_of
from gateway.keys import Keys
from gateway.ledger import MemoryLedger
from gateway.ledger.redis_ledger import RedisLedger
from gateway.ledger.shared import Damage, SharedLedger
from gateway.loads import Loads
from gateway.metrics import DeploymentFigures, KeyFigures, Metrics, PolicyFigures, StoreFigures, UsageFigures
from gateway.policy import Policy
from gateway.policyfile import Problem, first_of
from gateway.replicas import Replicas, Resolve
from gateway.revocations import Revocations
from gateway.serving import Serving
from gateway.settings import Settings
from gateway.store import StoreState
from gateway.supervisor import EngineSpec, Supervised, Supervisor
from gateway.telemetry import Record
from gateway.tokens import TiktokenCounter, TokenCounter
from gateway.types import Deployment, Replica

Tell = Callable[[str], None]

FIRST_LOOK = 3.0  # seconds


def new_id() -> str:
    """16 hexadecimal digits of the operating system's chance."""
    return os.urandom(8).hex()


@dataclass(frozen=True, slots=True)
class PolicyState:
    """Which policy is in use since when (`loaded_at`), and what is wrong with its files as they stand now: nothing
    where they are what is in use. `loads` and `refusals` count since start."""

    path: str
    hash: str
    loaded_at: datetime
    problems: tuple[Problem, ...] = ()
    loads: int = 1
    refusals: int = 0


class Gateway:
    """The running gateway. Invariant: what is started is stopped, engines, connections and the sockets' folder alike,
    and nothing that a request in flight may call is closed before it has ended."""

    def __init__(
        self,
        settings: Settings,
        policy: Policy,
        log: Log,
        tell: Tell,
        keys: Keys | None = None,
        resolve: Resolve | None = None,
        room: EngineRoom | None = None,
    ) -> None:
        """`keys` are those of the file that the settings name; without, callers need none. `resolve` looks names of
        deployments up; the system does without. `room` is where engines are that other processes use as well. Raises
        OSError where the temporary folder cannot be made or a `ca_file` cannot be read; `SettingsError` where an
        address is none."""
        self._settings = settings
        self._log = log
        self._tell = tell
        self._room = room
        self._folder = Path(tempfile.mkdtemp(prefix="hybridgate-"))
        self._sockets = count()
        self._library = CloudLibrary()
        self._last_engines: dict[str, Engine] = {}
        self._background: set[asyncio.Task[None]] = set()  # may be cancelled
        self._closing: set[asyncio.Task[None]] = set()  # must be awaited
        self._warm_lock = asyncio.Lock()
        self.fleet = Fleet(policy.deployments)
        self.metrics = Metrics(self._figures)
        self.policy_state = PolicyState(policy.path, policy.hash, datetime.now(UTC))
        self.stopping = False
        prepared = prepared_for(policy, None)
        self._generation = self._generation_of(policy, prepared, [])
        self._live = [self._generation]
        self._loads = Loads(self.fleet, self._described, time.monotonic)
        self._replicas = Replicas(self._found, resolve)
        serving = Serving(policy, prepared.scanner, {}, self._generation.backends)
        self.store = store_of(settings, self._store_changed)
        self.journal = journal = journal_of(settings, self.store, tell)
        if journal is not None:
            self.metrics.usage = lambda: UsageFigures(journal.lost, journal.waiting)
        books = Books(self.fleet, log, self._observed, time.monotonic)
        self.answers = answers_of(settings, self.store, new_id)
        self.metrics.cache = self._cache_figures
        self.shared = None if self.store is None else SharedLedger(self.store, RedisLedger(self.store), self._damaged)
        self.metrics.store = self._store_figures
        self.limiter = Limiter(self.shared or MemoryLedger(), self.fleet, time.monotonic, time.time)
        self.path = ChatPath(
            serving, self.fleet, books, self.limiter, time.monotonic, time.time, new_id, answers=self.answers
        )
        self.access: Access | None = None
        if keys is not None:
            self.access = Access(settings.keys, keys, self.path, log, tell)
            self.metrics.keys = self._key_figures

    def _store_changed(self, state: StoreState) -> None:
        self._log.info("redis", state="up" if state.up else "down", reason=state.reason, replicas=state.replicas)
        self._tell(f"redis: {'it answers again' if state.up else state.reason}")

    def _store_figures(self) -> StoreFigures | None:
        if self.store is None or self.shared is None:
            return None
        return StoreFigures(self.store.state, len(self.shared.damaged))

    def _damaged(self, damage: Damage) -> None:
        if damage.mended:
            self._log.info("ledger", state="mended", kind=damage.kind, redis_key=damage.key)
            self._tell(f"limits: {damage.key} can be read again")
            return
        self._log.error("ledger", state="damaged", kind=damage.kind, redis_key=damage.key)
        self._tell(
            f"limits: what Redis holds under {damage.key} is no counter ({damage.kind}) that a gateway wrote, so "
            "requests that it concerns are treated as if Redis did not answer (on_redis_down): delete the key to count "
            "from nothing, and find out who wrote to it"
        )

    def _observed(self, record: Record) -> None:
        self.metrics.request(record)
        if self.journal is not None:
            self.journal.observe(record)

    def stop_soon(self) -> None:
        """Say on /readyz that no more requests should come. Those that come all the same are answered."""
        self.stopping = True
        self._log.info("gateway", state="stopping")
        self._tell("stopping: open requests are finished first")

    @property
    def supervisors(self) -> Mapping[str, Supervised]:
        """Of the engines in use, by deployment."""
        return {name: engine.supervisor for name, engine in self._generation.engines.items()}

    def _figures(self) -> tuple[PolicyFigures, Iterable[DeploymentFigures]]:
        """What metrics say of this moment."""
        state = self.policy_state
        policy = PolicyFigures(
            state.path, state.hash, state.loaded_at.timestamp(), state.loads, state.refusals, len(state.problems)
        )
        now = time.monotonic()
        snapshot = self.fleet.snapshot(now, 0.0)
        deployments = self.path.serving.policy.deployments.values()
        statuses = ((d, snapshot.deployments[d.name]) for d in deployments)
        return policy, (
            DeploymentFigures(
                d.name, d.zone, d.unavailable is None and status.down is None, status, self.fleet.members(d.name, now)
            )
            for d, status in statuses
        )

    def _cache_figures(self) -> tuple[Counts, int, int]:
        memory = self.answers.memory
        return self.answers.counts, memory.entries, memory.size

    def _key_figures(self) -> KeyFigures:
        assert self.access is not None
        state = self.access.state
        return KeyFigures(self.access.standings(), state.loads, state.refusals, len(state.problems))

    @contextlib.asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Start engines and warm what is slow the first time; stop all of it in the end."""
        _spawn(self._background, self._start_up())
        _spawn(self._background, self.limiter.renew())
        if self.store is not None:
            self.store.start()
            if self.access is not None:
                _spawn(self._background, Revocations(self.store).watch(self.access.revoke))
        if self.journal is not None:
            self.journal.start()
        for engine in self._generation.engines.values():
            engine.start()
        self._look_elsewhere(self._generation)
        await self._first_look()
        try:
            yield
        finally:
            for task in self._background:
                task.cancel()
            await asyncio.gather(self._replicas.stop(), self._loads.stop(), *self._background, return_exceptions=True)
            await self.answers.flights.settled()
            await asyncio.gather(self._close(self._live), *self._closing)
            await self.limiter.close()
            if self.journal is not None:
                await self.journal.close()
            if self.store is not None:
                await self.store.close()
            shutil.rmtree(self._folder, ignore_errors=True)

    # From one policy to the next.

    async def adopt(self, policy: Policy) -> None:
        """Serve by this policy from now on; requests in flight end under theirs. Raises OSError where a `ca_file`
        cannot be read, and then nothing has changed."""
        prepared = await asyncio.to_thread(prepared_for, policy, self.path.serving)
        before = self._generation
        generation = self._generation_of(policy, prepared, self._live)
        self._live.append(generation)
        self._generation = generation
        known = before.deployments
        self.fleet.adopt(policy.deployments, [n for n, d in policy.deployments.items() if is_moved(known.get(n), d)])
        counters = {n: c for n, c in self.path.serving.counters.items() if not n.startswith("deployment:")}
        self.path.serving = Serving(policy, prepared.scanner, counters, generation.backends)
        for name, engine in generation.engines.items():
            if before.engines.get(name) is engine:
                self._apply(name, engine.known)
            else:
                self._engine_changed(engine)
                engine.start()
        self._look_elsewhere(generation)
        for name, replicas in self._replicas.known.items():
            self._lead(name, replicas)
        for name, elsewhere in self._loads.known.items():
            self._apply(name, elsewhere)
        state = self.policy_state
        self.policy_state = PolicyState(
            policy.path, policy.hash, datetime.now(UTC), loads=state.loads + 1, refusals=state.refusals
        )
        self._log.info("policy", state="loaded", path=policy.path, policy=policy.hash, previous=state.hash)
        self._tell(f"{policy.path} is loaded: {policy.hash} instead of {state.hash}")
        _spawn(self._background, self._warm())
        _spawn(self._background, self._end(before))

    def refuse(self, problems: tuple[Problem, ...]) -> None:
        """Go on as before: the files as they stand now cannot be used, for these reasons."""
        state = self.policy_state
        self.policy_state = replace(state, problems=problems, refusals=state.refusals + 1)
        for p in first_of(problems):
            place = {"file": p.file, "line": p.line, "column": p.column}
            self._log.error("policy", state="invalid", policy=state.hash, message=p.message, **place)
            self._tell(str(p))
        self._tell(f"{state.path} is not loaded; the policy {state.hash} stays in use")

    def keep(self) -> None:
        """Go on as before: the files say what is in use already."""
        state = self.policy_state
        self.policy_state = replace(state, problems=(), loads=state.loads + 1)
        self._log.info("policy", state="unchanged", path=state.path, policy=state.hash)

    async def _first_look(self) -> None:
        """Where others keep the engines running, those that run already are known before the first request."""
        if self._room is None or self._room.keeps:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK):
                while any(engine.known is None for engine in self._generation.engines.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)

    def _look_elsewhere(self, generation: Generation) -> None:
        """At what this policy's deployments say of themselves; not where others answer requests."""
        if self._room is None or not self._room.keeps:
            self._replicas.follow(generation.watched())
            self._loads.follow(generation.sources(self._replicas.known))

    def _generation_of(self, policy: Policy, prepared: Prepared, live: list[Generation]) -> Generation:
        """What the policy calls: from the live generations what is the same there, else new."""
        reachable = [d for d in policy.deployments.values() if d.unavailable is None]
        engines = {d.name: self._engine_of(d, live) for d in reachable if d.served_locally}
        opened: dict[str, Backend] = {}
        for deployment in reachable:
            name, engine = deployment.name, engines.get(deployment.name)
            same = next(
                (
                    generation.opened[name]
                    for generation in reversed(live)
                    if generation.deployments.get(name) == deployment and generation.engines.get(name) is engine
                ),
                None,
            )
            uds = engine.supervisor.spec.uds if engine is not None else None
            opened[name] = same or backend_of(deployment, uds, prepared.authorities[name], self._library)
        return Generation(policy.deployments, opened, engines, prepared.authorities)

    def _engine_of(self, deployment: Deployment, live: list[Generation]) -> Engine:
        name = deployment.name
        uds = "" if self._room is not None else str(self._folder / f"{next(self._sockets)}.sock")
        spec = EngineSpec(
            name,
            deployment.model,
            uds,
            self._settings.engine_start_seconds,
            deployment.quantization,
            deployment.speculation,
            deployment.draft_model,
        )
        if self._room is not None:
            spec = self._room.placed(spec)
        for generation in reversed(live):
            engine = generation.engines.get(name)
            if engine is not None and engine.serves(spec):
                self._last_engines[name] = engine
                return engine
        supervised = Supervisor if self._room is None else self._room.supervised
        engine = Engine(spec, self._last_engines.get(name), self._engine_changed, self._engine_said, supervised)
        self._last_engines[name] = engine
        return engine

    async def _end(self, generation: Generation) -> None:
        await generation.backends.unused()
        _spawn(self._closing, self._close([generation]))

    async def _close(self, ended: list[Generation]) -> None:
        """Close what only these generations hold."""
        live = [generation for generation in self._live if generation not in ended]
        held = {id(o) for generation in live for o in (*generation.opened.values(), *generation.engines.values())}
        engines = {id(e): e for generation in ended for e in generation.engines.values() if id(e) not in held}
        opened = {id(b): b for generation in ended for b in generation.opened.values() if id(b) not in held}
        names = {name for generation in ended for name in generation.deployments}
        self._live = live
        if live:
            self.fleet.forget(names.difference(*(generation.deployments for generation in live)))
        await asyncio.gather(*(engine.stop() for engine in engines.values()))
        await asyncio.gather(*(backend.close() for backend in opened.values()))

    # What is slow the first time.

    async def _start_up(self) -> None:
        await self._warm()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: a later collection need not look at it again

    async def _warm(self) -> None:
        async with self._warm_lock:
            deployments = [d for d in self.path.serving.policy.deployments.values() if d.unavailable is None]
            encodings = {d.tokenizer for d in deployments if d.tokenizer.startswith("tiktoken:")}
            for name in sorted(encodings - self.path.serving.counters.keys()):
                counter = TiktokenCounter(await asyncio.to_thread(load_encoding, name.removeprefix("tiktoken:")))
                self._with_counter(name, counter)
            if any(d.backend == "litellm" for d in deployments):
                await self._library.start()

    def _with_counter(self, name: str, counter: TokenCounter) -> None:
        serving = self.path.serving
        self.path.serving = replace(serving, counters={**serving.counters, name: counter})

    # What the engines report.

    def _engine_changed(self, engine: Engine) -> None:
        name = engine.name
        if self._generation.engines.get(name) is not engine:
            return  # a former policy's
        self._apply(name, engine.known)
        if engine.down is not None:
            self.fleet.set_down(name, engine.down.reason, time.monotonic(), engine.down.retry_after)
            self._log.info("engine", deployment=name, state="down", reason=engine.down.reason)
        elif engine.known is not None:
            deployment, window = self.path.serving.policy.deployments[name], engine.known.window
            self.fleet.set_up(name, time.monotonic())
            self._log.info("engine", deployment=name, state="up", context_window=window)
            self._tell(f"{name}: {deployment.model} is ready (window {window} tokens)")

    def _found(self, name: str, replicas: tuple[Replica, ...]) -> None:
        """A deployment answers at these addresses now."""
        self._lead(name, replicas)
        self._loads.follow(self._generation.sources(self._replicas.known))
        self._log.info("replicas", deployment=name, known=len(replicas))
        self._tell(f"{name}: {len(replicas)} replica{'s' if len(replicas) > 1 else ''}")

    def _lead(self, name: str, replicas: tuple[Replica, ...]) -> None:
        backend = self._generation.opened[name]
        if isinstance(backend, ReplicatedBackend):
            backend.follow(replicas)
            self.fleet.follow(name, replicas)

    def _described(self, name: str, known: Known) -> None:
        """An engine elsewhere said what it serves."""
        self._apply(name, known)
        self._log.info("engine", deployment=name, state="described", context_window=known.window)

    def _apply(self, name: str, known: Known | None) -> None:
        """Let an engine's own window, tokenizer and capabilities count, once it has said what they are. What the file
        leaves out of the capabilities stays out."""
        if known is None:
            return
        serving = self.path.serving
        before = serving.policy.deployments[name]
        able = before.capabilities if known.capabilities is None else before.capabilities & known.capabilities
        own = replace(before, window=known.window, tokenizer=f"deployment:{name}", capabilities=able)
        self.path.serving = replace(serving, policy=serving.policy.with_deployment(own))
        self._with_counter(own.tokenizer, known.counter)

    def _engine_said(self, name: str, line: str) -> None:
        self._tell(f"{name}: {line}")


def _spawn(tasks: set[asyncio.Task[None]], work: Coroutine[None, None, None]) -> None:
    task = asyncio.create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
