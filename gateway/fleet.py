"""What is known of each deployment now: whether it is up, its circuit, what is in flight, how fast it has been of late.

Owns the state that the request path and the supervisor report into, and turns it into a `Snapshot` for the decision.
Times come in as arguments (seconds of a monotonic clock). Refuses to decide anything: a status is a fact with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

from gateway.backlogs import EngineBacklog
from gateway.demand import Demand
from gateway.errors import GatewayError, Retryable, UpstreamCut, UpstreamOverloaded, UpstreamUnauthorized
from gateway.estimate import saved_per_engine_second
from gateway.latencies import Latencies
from gateway.measures import OutputLengths
from gateway.types import CircuitState, Decision, DeploymentStatus, EngineLoad, Snapshot, Usage

FAILURES_TO_OPEN = 3
FIRST_COOL_OFF = 2.0
LONGEST_COOL_OFF = 60.0
UNAUTHORIZED_COOL_OFF = 60.0

LIKELY_OUTPUT = 0.6  # the quantile of a caller's answers that stands for the next one: about the mean of a lognormal

REFRESHED_EVERY = 1.0


@dataclass(slots=True, eq=False)
class Flight:
    """One attempt on one deployment, from `Fleet.started` until it has ended. `forecast_ms` is what the engine's
    backlog let expect of its first token, None without one; `waits` while it counts there."""

    deployment: str
    at: float
    prompt_tokens: int
    priority: int
    stream: bool
    asker: tuple[str, str, str] | None
    answers: int
    born: int
    life: int
    waits: bool = False
    forecast_ms: float | None = None
    first_token_at: float | None = None


@dataclass(slots=True)
class _Known:
    """The mutable record behind one deployment's status. `down` is set from outside (starting, stopped); the circuit is
    ours. `born` counts how often the name has come to stand for something else, and `life` how often what was measured
    has been forgotten."""

    down: str | None = None
    down_retry_after: float = 1.0
    in_flight: int = 0
    failures: int = 0
    open_until: float | None = None
    open_reason: str = ""
    cool_off: float = FIRST_COOL_OFF
    trial: bool = False
    born: int = 0
    life: int = 0
    latencies: Latencies = field(default_factory=Latencies)
    engine: EngineBacklog | None = None
    demand: Demand = field(default_factory=Demand)

    def forget(self) -> None:
        """After an outage the past says nothing."""
        self.life += 1
        self.latencies = Latencies()
        if self.engine is not None:
            self.engine.forget()


class Fleet:
    """The state of all deployments. Invariant: each flight that `started` gives is handed to exactly one of `ended` and
    `abandoned`, so that `in_flight` never drifts."""

    def __init__(self, deployments: Iterable[str]) -> None:
        self._known = {name: _Known() for name in deployments}
        self._statuses = {name: DeploymentStatus() for name in self._known}
        self._changed: set[str] = set()
        self._circuits_open: set[str] = set()
        self._outputs = OutputLengths(LIKELY_OUTPUT)
        self._refreshed_at = float("-inf")

    def adopt(self, names: Iterable[str], changed: Iterable[str]) -> None:
        """Know these deployments too. Of those that `changed` (they are something else under the old name) everything
        is forgotten; requests still in flight to what they were before are not held against them."""
        for name in changed:
            self._renew(name)
        for name in names:
            if name not in self._known:
                self._known[name] = _Known()
                self._statuses[name] = DeploymentStatus()

    def forget(self, names: Iterable[str]) -> None:
        """Know these no longer. Nothing is in flight to them."""
        for name in names:
            del self._known[name], self._statuses[name]
            self._circuits_open.discard(name)
            self._changed.discard(name)

    def snapshot(self, now: float, draw: float, wall: float = 0.0) -> Snapshot:
        """The fleet at `now`, which is `wall` seconds since 1970. Shares nothing that changes later."""
        if now - self._refreshed_at > REFRESHED_EVERY:  # what is not told any more is forgotten all the same
            self._refreshed_at = now
            self._changed.update(self._known)
        if self._changed or self._circuits_open:
            for name in self._changed | self._circuits_open:
                self._refresh(name, now)
            self._changed.clear()
        return Snapshot(now, draw, self._statuses.copy(), wall)

    # What is told from outside of the request path.

    def set_down(self, name: str, reason: str, now: float, retry_after: float = 1.0) -> None:
        """The deployment cannot be called, for a reason that callers and operators are told."""
        known = self._known[name]
        known.down, known.down_retry_after = reason, retry_after
        self._changed.add(name)

    def set_up(self, name: str, now: float) -> None:
        """The deployment can be called again; what was measured before is forgotten, and requests still in flight to
        what it was before are not held against it."""
        self._renew(name)

    def _renew(self, name: str) -> None:
        old = self._known[name]
        self._known[name] = _Known(in_flight=old.in_flight, born=old.born + 1, life=old.life + 1, demand=old.demand)
        self._circuits_open.discard(name)
        self._changed.add(name)

    def loaded(self, name: str, load: EngineLoad, asked_at: float, now: float) -> None:
        """An engine said what it has to do. It counts what was sent to it before `asked_at`."""
        known = self._known[name]
        if known.engine is None:
            known.engine = EngineBacklog()
        known.engine.loaded(load, asked_at, now)
        self._changed.add(name)

    def missed(self, name: str) -> None:
        """An engine was asked for its load and did not say: until it does, its latencies of late stand for it."""
        known = self._known[name]
        if known.engine is not None:
            known.engine.missed()
            self._changed.add(name)

    # What the request path tells.

    def likely_output(self, tenant: str, key_id: str, model: str) -> int | None:
        """Tokens of one answer to this caller's requests for a model: as they were of late, or else as everybody's
        were; None before the first."""
        likely = self._outputs.likely((tenant, key_id, model))
        if likely is None:
            likely = self._outputs.likely(model)
        return None if likely is None else round(likely)

    def decided(self, decision: Decision, now: float) -> None:
        """A request was decided: what it offers to the engines among its candidates goes into the price of their
        seconds. To be told once a request, whichever candidate answers."""
        by_ms = decision.first_token_by_ms
        for candidate in decision.candidates:
            if candidate.engine_s is not None and candidate.cost_nusd is not None:
                saved = saved_per_engine_second(candidate, decision.candidates)
                if saved is not None:
                    self._known[candidate.deployment].demand.offered(candidate.engine_s, saved, by_ms, now)

    def started(
        self,
        name: str,
        now: float,
        prompt_tokens: int = 0,
        *,
        priority: int = 0,
        stream: bool = True,
        asker: tuple[str, str, str] | None = None,
        answers: int = 1,
    ) -> Flight:
        """An attempt begins. Where the circuit is half open, it is the trial. `asker` is tenant, key and model of a
        request whose answers' length is to be learned."""
        known = self._known[name]
        known.in_flight += 1
        if known.open_until is not None:
            known.trial = True
        self._changed.add(name)
        flight = Flight(name, now, prompt_tokens, priority, stream, asker, answers, known.born, known.life)
        if known.engine is not None:
            flight.forecast_ms = known.engine.sent(prompt_tokens, priority, stream, now)
            flight.waits = stream
        return flight

    def first_token(self, flight: Flight, now: float) -> None:
        """A stream's first token came."""
        known = self._known[flight.deployment]
        flight.first_token_at = now
        if flight.life != known.life:
            return
        milliseconds = (now - flight.at) * 1000
        known.latencies.first_token(milliseconds, flight.prompt_tokens, now)
        if known.engine is not None and flight.waits:
            flight.waits = False
            known.engine.started(flight.prompt_tokens, flight.priority)
            if flight.forecast_ms is not None:
                known.engine.compared(flight.forecast_ms, milliseconds, now)
        self._changed.add(flight.deployment)

    def abandoned(self, flight: Flight) -> None:
        """The attempt was given up by us before its first token, which says nothing of the deployment: neither that it
        is well nor that it is broken."""
        known = self._known[flight.deployment]
        known.in_flight -= 1
        if flight.born == known.born:
            known.trial = False
        self._gone(known, flight)

    def ended(self, flight: Flight, error: GatewayError | None, now: float, usage: Usage | None = None) -> None:
        """The attempt is over; `error` is None where it answered. `usage` is that of a whole answer, None where it was
        cut or left."""
        name = flight.deployment
        known = self._known[name]
        known.in_flight -= 1
        if flight.born == known.born:
            known.trial = False
            self._judge(name, known, error, now)
        if error is None and usage is not None:
            self._learn(known, flight, usage, now)
        self._gone(known, flight)

    def _judge(self, name: str, known: _Known, error: GatewayError | None, now: float) -> None:
        """What an attempt's end says of the deployment's health."""
        if isinstance(error, Retryable | UpstreamCut):
            self._failed(name, known, error, now)
        elif known.open_until is None or error is not None:
            known.failures = 0
        else:
            known.failures, known.open_until, known.cool_off = 0, None, FIRST_COOL_OFF
            known.forget()
            self._circuits_open.discard(name)

    def _gone(self, known: _Known, flight: Flight) -> None:
        if known.engine is not None and flight.waits and flight.life == known.life:
            known.engine.started(flight.prompt_tokens, flight.priority)
        self._changed.add(flight.deployment)

    def _learn(self, known: _Known, flight: Flight, usage: Usage, now: float) -> None:
        if flight.asker is not None:
            length = usage.completion_tokens / flight.answers
            self._outputs.add(flight.asker, length, now)
            self._outputs.add(flight.asker[2], length, now)
        if flight.life != known.life:
            return
        each = max(1, round(usage.completion_tokens / flight.answers))
        began = flight.first_token_at
        if began is not None:
            known.latencies.rest((now - began) * 1000, each - 1, now)
        else:
            known.latencies.whole((now - flight.at) * 1000, flight.prompt_tokens, each, now)
            began = flight.at + (flight.forecast_ms or 0.0) / 1000
        if known.engine is not None:
            known.engine.held(max(now - began, 0.0), now)

    def _failed(self, name: str, known: _Known, error: GatewayError, now: float) -> None:
        cool_off: float | None = None
        known.failures += not isinstance(error, UpstreamOverloaded)
        if isinstance(error, UpstreamUnauthorized):
            cool_off = UNAUTHORIZED_COOL_OFF
        elif isinstance(error, UpstreamOverloaded):  # full is not broken: wait as long as it says, if it says
            cool_off = min(error.retry_after, LONGEST_COOL_OFF) if error.retry_after is not None else None
        elif known.open_until is not None and now < known.open_until:
            pass  # it was under way when the circuit opened, and is of the failures that opened it
        elif known.open_until is not None or known.failures >= FAILURES_TO_OPEN:
            cool_off = known.cool_off
            known.cool_off = min(known.cool_off * 2, LONGEST_COOL_OFF)
        if cool_off is not None:
            known.open_until, known.open_reason = now + cool_off, error.message
            self._circuits_open.add(name)

    def _refresh(self, name: str, now: float) -> None:
        known = self._known[name]
        down, retry_after = known.down, known.down_retry_after
        circuit: CircuitState = "closed"
        if known.open_until is not None:
            circuit = "open" if now < known.open_until else "half_open"
            if down is None and (circuit == "open" or known.trial):
                retry_after = max(known.open_until - now, 1.0)
                down = f"circuit open after failures ({known.open_reason})"
        engine, latencies = known.engine, known.latencies
        latencies.look_up(now)
        busy = None if engine is None else engine.busy(now)
        self._statuses[name] = DeploymentStatus(
            down,
            retry_after if down else 0.0,
            circuit,
            known.in_flight,
            latencies.first_token_p95_ms,
            busy,
            latencies.by_size,
            latencies.per_token_p95_ms,
            None if engine is None else engine.backlog(now),
            0.0 if engine is None else known.demand.price_nusd,
            inf if engine is None else known.demand.room_s,
        )
