"""Answers under way to clients, and what is told of a request once it has ended.

Owns that an answer ends exactly once, however it does: with the usage known by then, told to the fleet, the log and the
metrics. Refuses to open one (chat.py does) and to know HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

from gateway.backends import Backends
from gateway.backends.base import Answer, Chunk
from gateway.backends.sse import error_event
from gateway.errors import GatewayError, UpstreamCut
from gateway.fleet import Fleet, Flight
from gateway.held import Holding
from gateway.telemetry import FleetRecord, Record
from gateway.types import Deployment, Usage

CLIENT_GONE = 499  # nginx's status for a client that closed the request; only ever logged


class Log(Protocol):
    """Where decision records go."""

    def info(self, event: str, **fields: object) -> object: ...

    def error(self, event: str, **fields: object) -> object: ...


@dataclass(slots=True)
class Books:
    """Where a request's end is told: the fleet, the log, the metrics. `clock` is in monotonic seconds."""

    fleet: Fleet
    log: Log
    observe: Callable[[Record], None]
    clock: Callable[[], float]
    _written: FleetRecord = field(default_factory=FleetRecord)

    def book(self, record: Record, started: float, status: int, outcome: str) -> None:
        """The request that began at `started` is over. To be told once."""
        record.status, record.outcome = status, outcome
        record.total_ms = (self.clock() - started) * 1000
        self.log.info("request", **record.fields(self._written))
        self.observe(record)


class OpenAnswer:
    """An answer under way to a client. Owns the upstream connection, and leaves `backends` when that is closed.
    Invariant: it ends exactly once, with the usage known by then."""

    __slots__ = (
        "_answer",
        "_backends",
        "_books",
        "_deployment",
        "_first",
        "_flight",
        "_held",
        "_open",
        "_record",
        "_started",
        "_tokens",
    )

    def __init__(
        self,
        books: Books,
        backends: Backends,
        record: Record,
        started: float,
        deployment: Deployment,
        flight: Flight,
        answer: Answer,
        first: Chunk,
        held: Holding,
    ) -> None:
        self._books = books
        self._backends: Backends | None = backends
        self._record = record
        self._started = started
        self._deployment = deployment
        self._flight = flight
        self._held = held
        self._answer = answer
        self._first: Chunk | None = first
        self._tokens = 0
        self._open = True

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if not self._open:
            raise StopAsyncIteration
        chunk, self._first = self._first, None
        if chunk is None:
            try:
                chunk = await anext(self._answer)
            except (StopAsyncIteration, GatewayError) as error:
                cut = error if isinstance(error, GatewayError) else UpstreamCut("the deployment's answer broke off")
                self._end("cut", cut)
                return Chunk(error_event(cut), last=True)
        self._tokens += chunk.tokens
        if chunk.usage is not None:
            self._record.usage = chunk.usage
        if chunk.last:
            self._end("ok", None)
        return chunk

    async def close(self) -> None:
        """End the upstream's work. A client that left before the last chunk is booked with what it was sent."""
        self._end("client_gone", None)
        backends, self._backends = self._backends, None
        try:
            await self._answer.close()
        finally:
            if backends is not None:
                backends.leave()

    def _end(self, outcome: str, error: GatewayError | None) -> None:
        if not self._open:
            return
        self._open = False
        record, books = self._record, self._books
        known = record.usage is not None
        if record.usage is None:
            record.usage = Usage(self._flight.prompt_tokens, self._tokens)
        deployment = self._deployment
        if deployment.price is not None and deployment.bill is not None:
            record.cost_nusd = deployment.bill.cost(record.usage)
            record.marginal_nusd = deployment.price.cost(record.usage)
        record.booked = self._held.settle(record.usage, known=known)
        books.fleet.ended(self._flight, error, books.clock(), record.usage if outcome == "ok" else None)
        books.book(record, self._started, CLIENT_GONE if outcome == "client_gone" else 200, outcome)
