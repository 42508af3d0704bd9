"""Everything at once, in virtual time: requests arrive, a router decides, engines step, clouds answer, or not.

Owns the order of events and what a request goes through, which is gateway/chat.py's path without sockets: decide, try
the next of the chain, tell the fleet how it went. Refuses clocks, and all chance but what was drawn before: the same
requests, fleet, weather and router give the same records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Literal

from gateway.decision import Decision
from gateway.errors import (
    GatewayError,
    Retryable,
    UpstreamFailed,
    UpstreamLate,
    UpstreamOverloaded,
    UpstreamTimeout,
    UpstreamWindowExceeded,
    status_of,
)
from gateway.fleet import Fleet, Flight
from gateway.policy import Policy
from gateway.routing import look_again, next_attempt, patience
from gateway.simulate.cloud import CloudModel, RateLimit, Weather
from gateway.simulate.engine import Engine
from gateway.simulate.engine import Sequence as InEngine
from gateway.simulate.fleetfile import FleetModel
from gateway.simulate.mix import Request
from gateway.simulate.routers import Router
from gateway.types import Attempt, Outcome, Patience, Timeouts, Usage

READ_EVERY = 0.25  # seconds between two readings of an engine's load, as the server asks
SAMPLED_EVERY = 1.0
_WITHOUT_END = 1 << 40


@dataclass(frozen=True, slots=True)
class World:
    """What all routers meet alike. `policy` has its deployments as the simulation has them; `began` is the first
    arrival in seconds since 1970."""

    policy: Policy
    fleet: FleetModel
    requests: Sequence[Request]
    weather: Weather
    began: float = 0.0


@dataclass(slots=True)
class Record:
    """What became of one request. `status` is 200 or the error's; times are in seconds from its arrival, None where it
    was not answered. `ran_on` are all deployments that were sent the request, whatever came of it, and `failed` those
    that did not answer. `predicted_ms` is the first decision's forecast for the first token."""

    index: int
    deployment: str | None = None
    status: int = 0
    code: str = ""
    first_s: float | None = None
    total_s: float | None = None
    rule: str = ""
    cost_nusd: int = 0
    billed_nusd: int = 0
    predicted_ms: float | None = None
    ran_on: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One engine at one moment: the share of the last interval that it computed, and what waits and runs."""

    at: float
    busy: float
    waiting: int
    running: int


@dataclass(frozen=True, slots=True)
class Run:
    """One router's world after its last request. `ended_s` is when the last one ended, `engine_busy_s` the seconds that
    each engine computed."""

    router: str
    records: Sequence[Record]
    ended_s: float
    engine_busy_s: Mapping[str, float]
    samples: Mapping[str, Sequence[Sample]]
    preempted: int
    steps: int


def simulate(world: World, router: Router) -> Run:
    """Let the world pass under a router's decisions, until the last request has ended."""
    return _Simulation(world, router).run()


_Kind = Literal["arrives", "steps", "reads", "samples", "first", "ends", "fails", "late", "leaves"]


@dataclass(slots=True, eq=False)
class _Trip:
    """One request under way. `attempt` counts its attempts, so that an event of an earlier one is known as past."""

    request: Request
    record: Record
    outcomes: list[Outcome] = field(default_factory=list)
    attempt: int = 0
    flight: Flight | None = None
    in_engine: InEngine | None = None
    decided: bool = False
    started: bool = False
    done: bool = False
    patience: Patience | None = None


class _Simulation:
    """One run. Invariant: each trip is done exactly once, and every flight that the fleet gave was handed back."""

    def __init__(self, world: World, router: Router) -> None:
        self._world = world
        self._router = router
        self._policy = world.policy
        self._fleet = Fleet(world.policy.deployments)
        self._engines = {
            name: Engine(replace(model, max_waiting=_WITHOUT_END, max_waiting_tokens=_WITHOUT_END))
            if router.queues
            else Engine(model)
            for name, model in world.fleet.engines.items()
        }
        self._limits = {name: RateLimit(cloud) for name, cloud in world.fleet.clouds.items()}
        self._trips = [_Trip(request, Record(request.index)) for request in world.requests]
        self._by_index = {trip.request.index: trip for trip in self._trips}
        self._open = len(self._trips)
        self._events: list[tuple[float, int, _Kind, object, int]] = []
        self._order = 0
        self._samples: dict[str, list[Sample]] = {name: [] for name in self._engines}
        self._busy_before = dict.fromkeys(self._engines, 0.0)
        self._ended_s = 0.0

    def run(self) -> Run:
        for trip in self._trips:
            self._at(trip.request.arrival_s, "arrives", trip)
        for name in self._engines:
            self._at(0.0, "reads", name)
            self._at(SAMPLED_EVERY, "samples", name)
        while self._open:
            now, _, kind, subject, attempt = heappop(self._events)
            if isinstance(subject, _Trip):
                self._trip_event(kind, subject, attempt, now)
            else:
                assert isinstance(subject, str)
                self._engine_event(kind, subject, now)
        return Run(
            router=self._router.name,
            records=[trip.record for trip in self._trips],
            ended_s=self._ended_s,
            engine_busy_s={name: engine.busy_s for name, engine in self._engines.items()},
            samples=self._samples,
            preempted=sum(engine.preempted for engine in self._engines.values()),
            steps=sum(engine.steps for engine in self._engines.values()),
        )

    def _at(self, when: float, kind: _Kind, subject: object, attempt: int = 0) -> None:
        self._order += 1
        heappush(self._events, (when, self._order, kind, subject, attempt))

    # What happens to requests.

    def _trip_event(self, kind: _Kind, trip: _Trip, attempt: int, now: float) -> None:
        if trip.done or attempt != trip.attempt:
            return
        match kind:
            case "arrives":
                self._try(trip, now)
            case "first":
                self._first_token(trip, now)
            case "ends":
                self._answered(trip, now)
            case "fails":
                self._attempt_failed(trip, UpstreamFailed("the deployment answered with an error"), now)
            case "leaves" if not trip.started:
                assert trip.in_engine is not None and trip.flight is not None and trip.patience is not None
                if not self._fleet.comes_soon(trip.flight, trip.patience.left_s, now):
                    self._engines[trip.flight.deployment].abort(trip.in_engine)
                    self._attempt_failed(trip, UpstreamLate(), now)
                elif (more := look_again(trip.patience)) is not None:
                    trip.patience = more
                    self._at(now + more.after_s, "leaves", trip, trip.attempt)
            case "late" if not trip.started:
                if trip.in_engine is not None and trip.flight is not None:
                    self._engines[trip.flight.deployment].abort(trip.in_engine)
                self._attempt_failed(trip, UpstreamTimeout("no first token in time"), now)

    def _try(self, trip: _Trip, now: float) -> None:
        """Decide, and send the request to the next deployment of the chain; again where that refuses at once."""
        request = trip.request
        likely = self._fleet.likely_output(request.facts.tenant, request.facts.key_id, request.facts.model)
        facts = replace(request.facts, likely_output=likely)
        while True:
            try:
                snapshot = self._fleet.snapshot(now, request.draw, self._world.began + now)
                decision = self._router.decide(facts, snapshot)
                if not trip.decided:
                    trip.decided = True
                    self._fleet.decided(decision, now)
                    trip.record.predicted_ms = decision.candidates[0].first_token_ms if decision.candidates else None
                trip.record.rule = decision.rule
                name = next_attempt(decision, trip.outcomes).deployment
            except GatewayError as error:
                self._done(trip, now, status_of(error), error.code)
                return
            trip.attempt += 1
            trip.record.ran_on += (name,)
            timeouts = self._policy.deployments[name].timeouts.replaced(decision.timeouts)
            trip.flight = self._fleet.started(
                name,
                now,
                request.prompt_tokens,
                priority=decision.priority,
                stream=facts.stream,
                asker=(facts.tenant, facts.key_id, facts.model),
            )
            refused = (
                self._to_engine(trip, name, decision, timeouts, now)
                if name in self._engines
                else self._to_cloud(trip, name, timeouts, now)
            )
            if refused is None:
                return
            if not self._book_failure(trip, refused, now):
                return

    def _to_engine(
        self, trip: _Trip, name: str, decision: Decision, timeouts: Timeouts, now: float
    ) -> GatewayError | None:
        """Queue at an engine; or what it answers at once. As in chat.py, a deadline is only sent while another
        candidate could still meet it."""
        request = trip.request
        others = len(decision.candidates) > 1 + len(trip.outcomes)
        by = decision.first_token_by_ms if others else None
        if by is not None:
            by = max(0.001, by / 1000 - (now - request.arrival_s))
        engine = self._engines[name]
        taken = engine.add(request.index, request.prompt_tokens, request.output_tokens, decision.priority, by)
        if taken == "window":
            return UpstreamWindowExceeded("it is longer than the deployment's window", upstream_status=400)
        if isinstance(taken, str):
            return UpstreamOverloaded("the deployment is full")
        trip.in_engine = taken
        if request.facts.stream and not self._router.queues:
            trip.patience = patience(decision, trip.outcomes, (now - request.arrival_s) * 1000)
            if trip.patience is not None:
                self._at(now + trip.patience.after_s, "leaves", trip, trip.attempt)
        if not self._router.queues:
            self._at(
                now + (timeouts.first_token if request.facts.stream else timeouts.total), "late", trip, trip.attempt
            )
        if engine.idle:
            self._step(name, now)
        return None

    def _to_cloud(self, trip: _Trip, name: str, timeouts: Timeouts, now: float) -> GatewayError | None:
        cloud: CloudModel = self._world.fleet.clouds[name]
        request = trip.request
        luck = self._world.weather[name][request.index]
        full_for = self._limits[name].admit(request.prompt_tokens + request.output_tokens, now)
        if full_for is not None:
            return UpstreamOverloaded("the deployment is full", retry_after=max(1.0, full_for))
        total = luck.total_s(request.output_tokens)
        first, patience = (luck.first_s, timeouts.first_token) if request.facts.stream else (total, timeouts.total)
        if luck.fails or cloud.down(now):
            self._at(now + cloud.fails_after_s, "fails", trip, trip.attempt)
        elif first > patience:
            self._at(now + patience, "late", trip, trip.attempt)
        else:
            self._at(now + luck.first_s, "first", trip, trip.attempt)
            self._at(now + total, "ends", trip, trip.attempt)
        return None

    def _first_token(self, trip: _Trip, now: float) -> None:
        trip.started = True
        assert trip.flight is not None
        if trip.request.facts.stream:
            trip.record.first_s = now - trip.request.arrival_s
            self._fleet.first_token(trip.flight, now)

    def _answered(self, trip: _Trip, now: float) -> None:
        flight, request, record = trip.flight, trip.request, trip.record
        assert flight is not None
        usage = Usage(request.prompt_tokens, request.output_tokens)
        self._fleet.ended(flight, None, now, usage)
        deployment = self._policy.deployments[flight.deployment]
        price, full = deployment.price, deployment.bill
        assert price is not None and full is not None
        record.deployment = flight.deployment
        record.total_s = now - request.arrival_s
        if record.first_s is None:
            record.first_s = record.total_s  # an answer in one piece is there when it is whole
        record.cost_nusd, record.billed_nusd = price.cost(usage), full.cost(usage)
        self._done(trip, now, 200, "")

    def _attempt_failed(self, trip: _Trip, error: GatewayError, now: float) -> None:
        if self._book_failure(trip, error, now):
            self._try(trip, now)

    def _book_failure(self, trip: _Trip, error: GatewayError, now: float) -> bool:
        """Tell the fleet; whether another deployment may be tried."""
        assert trip.flight is not None
        name = trip.flight.deployment
        self._fleet.ended(trip.flight, error, now)
        trip.flight = trip.in_engine = None
        trip.record.failed += (name,)
        if not isinstance(error, Retryable):
            self._done(trip, now, status_of(error), error.code)
            return False
        trip.attempt += 1  # what was to come of the failed attempt is past
        trip.outcomes.append(
            Outcome(Attempt(name, len(trip.outcomes) + 1), error.message, isinstance(error, UpstreamTimeout))
        )
        return True

    def _done(self, trip: _Trip, now: float, status: int, code: str) -> None:
        assert not trip.done
        trip.done = True
        trip.record.status, trip.record.code = status, code
        self._open -= 1
        self._ended_s = max(self._ended_s, now)

    # What happens to engines.

    def _engine_event(self, kind: _Kind, name: str, now: float) -> None:
        engine = self._engines[name]
        match kind:
            case "steps":
                came = engine.end()
                for key in came.first:
                    self._first_token(self._by_index[key], now)
                for key in came.ended:
                    self._answered(self._by_index[key], now)
                self._step(name, now)
            case "reads":
                self._fleet.loaded(name, engine.load(), now, now)
                self._at(now + READ_EVERY, "reads", name)
            case "samples":
                load, busy = engine.load(), engine.busy_s
                share = min(1.0, (busy - self._busy_before[name]) / SAMPLED_EVERY)
                self._busy_before[name] = busy
                self._samples[name].append(Sample(now, share, load.waiting, load.running))
                self._at(now + SAMPLED_EVERY, "samples", name)

    def _step(self, name: str, now: float) -> None:
        seconds = self._engines[name].begin()
        if seconds is not None:
            self._at(now + seconds, "steps", name)
