"""What requests go to, and whether it may be called: a deployment at its one address, or one of its replicas.

Owns the circuit: when failures open it, for how long, and what closes it. Times come in as arguments. Refuses to know
names and to choose.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from gateway.backlogs import EngineBacklog
from gateway.balance import Reading
from gateway.errors import (
    GatewayError,
    Retryable,
    UpstreamCut,
    UpstreamLate,
    UpstreamOverloaded,
    UpstreamTimeout,
    UpstreamUnauthorized,
)
from gateway.snapshot import CircuitState
from gateway.types import Replica

FAILURES_TO_OPEN = 3
FIRST_COOL_OFF = 2.0
LONGEST_COOL_OFF = 60.0
UNAUTHORIZED_COOL_OFF = 60.0
SILENT_AFTER = 4  # readings that did not come: a replica is avoided until one comes


@dataclass(slots=True, eq=False)
class Target:
    """The mutable record. `born` counts how often it has come to be something else, and `life` how often what was
    measured has been forgotten. `missed` counts readings that did not come since the last that did. `answered_at` is
    when it last gave somebody a first token or an answer."""

    in_flight: int = 0
    failures: int = 0
    open_until: float | None = None
    open_reason: str = ""
    cool_off: float = FIRST_COOL_OFF
    trial: bool = False
    born: int = 0
    life: int = 0
    engine: EngineBacklog | None = None
    answered_at: float = -inf
    missed: int = 0

    @property
    def silent(self) -> bool:
        """Whether it has stopped to say how busy it is."""
        return self.missed >= SILENT_AFTER

    def heard(self, now: float) -> None:
        """A reading came."""
        self.missed = 0

    def forget(self) -> None:
        """After an outage the past says nothing."""
        self.life += 1
        if self.engine is not None:
            self.engine.forget()

    def able(self, now: float) -> bool:
        """Whether its circuit lets a request pass."""
        return self.open_until is None or (now >= self.open_until and not self.trial)

    def state(self, now: float) -> CircuitState:
        """Of the circuit."""
        if self.open_until is None:
            return "closed"
        return "open" if now < self.open_until else "half_open"

    def circuit(self, now: float) -> tuple[str | None, float, CircuitState]:
        """Why its circuit keeps requests away, when to ask again, and what it is."""
        circuit = self.state(now)
        if self.open_until is None or self.able(now):
            return None, 0.0, circuit
        return f"circuit open after failures ({self.open_reason})", max(self.open_until - now, 1.0), circuit

    def judge(self, error: GatewayError | None, now: float, began: float) -> None:
        """What the end of an attempt that began then says of its health."""
        if error is None:
            self.answered_at = now
        if isinstance(error, UpstreamLate) or self._queues(error, now, began):
            return
        if isinstance(error, Retryable | UpstreamCut):
            self._failed(error, now)
        elif self.open_until is None or error is not None:
            self.failures = 0
        else:
            self.failures, self.open_until, self.cool_off = 0, None, FIRST_COOL_OFF
            self.forget()

    def _queues(self, error: GatewayError | None, now: float, began: float) -> bool:
        """Whether it is an engine with more to do than it can, which is no fault and no reason to keep others away,
        who may go before those that wait: it says how much, and it did not take this request, or gave others their
        first token while this one waited."""
        if self.engine is None or not self.engine.told(now):
            return False
        if isinstance(error, UpstreamTimeout):
            return self.answered_at > began
        return isinstance(error, UpstreamOverloaded)

    def _failed(self, error: GatewayError, now: float) -> None:
        cool_off: float | None = None
        self.failures += not isinstance(error, UpstreamOverloaded)
        if isinstance(error, UpstreamUnauthorized):
            cool_off = UNAUTHORIZED_COOL_OFF
        elif isinstance(error, UpstreamOverloaded):  # full is not broken: wait as long as it says, if it says
            cool_off = min(error.retry_after, LONGEST_COOL_OFF) if error.retry_after is not None else None
        elif self.open_until is not None and now < self.open_until:
            pass  # it was under way when the circuit opened, and is of the failures that opened it
        elif self.open_until is not None or self.failures >= FAILURES_TO_OPEN:
            cool_off = self.cool_off
            self.cool_off = min(self.cool_off * 2, LONGEST_COOL_OFF)
        if cool_off is not None:
            self.open_until, self.open_reason = now + cool_off, error.message


@dataclass(slots=True, eq=False, kw_only=True)
class Member(Target):
    """One of a deployment's replicas. `ordinal` is the least number that no other has, free again once the replica is
    gone; `key` stands for it when one is chosen."""

    replica: Replica
    ordinal: int
    key: int
    ours_then: int = 0  # our own attempts there when it last said how busy it is

    def heard(self, now: float) -> None:
        """A reading came. After a silence that is another life: what had opened the circuit is over, and the next
        request tries it."""
        if self.silent and self.open_until is not None:
            self.open_until = min(self.open_until, now)
        self.missed = 0
        self.ours_then = self.in_flight

    def reading(self, now: float) -> Reading:
        """How busy it is: with our own attempts as they are now, since many may have ended since it said, and those of
        others as they were then."""
        queued = None if self.engine is None else self.engine.queued(now)
        if queued is None:
            return Reading(self.in_flight)
        tokens, said, rate = queued
        return Reading(self.in_flight, tokens, max(0.0, said - self.ours_then) + self.in_flight, rate)
