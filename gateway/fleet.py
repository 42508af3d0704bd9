"""What is known of each deployment now: whether it is up, its circuit, what is in flight, how fast it has been of late.

Owns the state that the request path and the supervisor report into, and turns it into a `Snapshot` for the decision.
Times come in as arguments (seconds of a monotonic clock). Refuses to decide anything: a status is a fact with a reason;
and what is known of one deployment alone (`standing.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

from gateway.backlogs import EngineBacklog
from gateway.balance import Affinity
from gateway.decision import Decision, Rejection
from gateway.errors import GatewayError, UpstreamLate
from gateway.estimate import saved_per_engine_second
from gateway.measures import OutputLengths
from gateway.snapshot import DeploymentStatus, EngineLoad, Snapshot
from gateway.standing import MemberStatus, Standing
from gateway.targets import Member, Target
from gateway.types import Replica, Usage

NONE_FULL: Mapping[str, Rejection] = MappingProxyType({})
LIKELY_OUTPUT = 0.6  # the quantile of a caller's answers that stands for the next one: about the mean of a lognormal

REFRESHED_EVERY = 1.0
SOON = 2.0  # a first token that is forecast to take so much less than there is time for is waited for


@dataclass(slots=True, eq=False)
class Flight:
    """One attempt on one deployment, from `Fleet.started` until it has ended. `forecast_ms` is what the engine's
    backlog let expect of its first token, None without one; `waits` while it counts there, under the number `queued`.
    `member` is the one of several replicas that it is on."""

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
    queued: int = 0
    first_token_at: float | None = None
    member: Member | None = None


class Fleet:
    """The state of all deployments. Invariant: each flight that `started` gives is handed to exactly one of `ended` and
    `abandoned`, so that `in_flight` never drifts."""

    def __init__(self, deployments: Iterable[str]) -> None:
        self._known = {name: Standing() for name in deployments}
        self._statuses = {name: DeploymentStatus() for name in self._known}
        self._changed: set[str] = set()
        self._circuits_open: set[str] = set()
        self._balanced: set[str] = set()
        self._outputs = OutputLengths(LIKELY_OUTPUT)
        self._refreshed_at = float("-inf")

    def adopt(self, names: Iterable[str], changed: Iterable[str]) -> None:
        """Know these deployments too. Of those that `changed` (they are something else under the old name) everything
        is forgotten; requests still in flight to what they were before are not held against them."""
        for name in changed:
            self._renew(name)
        for name in names:
            if name not in self._known:
                self._known[name] = Standing()
                self._statuses[name] = DeploymentStatus()

    def forget(self, names: Iterable[str]) -> None:
        """Know these no longer. Nothing is in flight to them."""
        for name in names:
            del self._known[name], self._statuses[name]
            self._circuits_open.discard(name)
            self._balanced.discard(name)
            self._changed.discard(name)

    def follow(self, name: str, replicas: Collection[Replica]) -> None:
        """The deployment answers at these addresses from now on; at one that is not told apart where there are none. A
        replica that is gone gets nothing new; what is in flight to it ends as it may."""
        known = self._known[name]
        if replicas:
            known.engine = None
            self._balanced.add(name)
        else:
            self._balanced.discard(name)
        known.follow(replicas)
        self._changed.add(name)

    @property
    def balances(self) -> bool:
        """Whether any deployment has replicas to choose from."""
        return bool(self._balanced)

    def members(self, name: str, now: float) -> list[MemberStatus]:
        """The deployment's replicas by ordinal; none where it has but one address."""
        return self._known[name].member_statuses(now)

    def answers(self, name: str) -> bool:
        """Whether somebody there has said of late how busy it is: one of its replicas, or its one address."""
        known = self._known[name]
        targets: list[Target] = [*known.members.values()] or [known]
        return any(target.engine is not None and not target.silent for target in targets)

    def snapshot(
        self,
        now: float,
        draw: float,
        wall: float = 0.0,
        affinity: Affinity | None = None,
        full: Mapping[str, Rejection] = NONE_FULL,
    ) -> Snapshot:
        """The fleet at `now`, which is `wall` seconds since 1970, for a request that limits keep from the `full`
        deployments. Shares nothing that changes later. A deployment of several replicas is as the one that a request
        of this affinity would get."""
        if now - self._refreshed_at > REFRESHED_EVERY:  # what is not told any more is forgotten all the same
            self._refreshed_at = now
            self._changed.update(self._known)
        if self._changed or self._circuits_open:
            for name in self._changed | self._circuits_open:
                self._refresh(name, now)
            self._changed.clear()
        statuses = self._statuses.copy()
        for name in self._balanced:
            statuses[name] = self._balanced_status(name, now, affinity or Affinity(draw))
        return Snapshot(now, draw, statuses, wall, full)

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
        for member in old.members.values():
            member.born, member.life = member.born + 1, member.life + 1
        self._balanced.discard(name)
        self._known[name] = Standing(in_flight=old.in_flight, born=old.born + 1, life=old.life + 1, demand=old.demand)
        self._circuits_open.discard(name)
        self._changed.add(name)

    def loaded(self, name: str, load: EngineLoad, asked_at: float, now: float, replica: Replica | None = None) -> None:
        """An engine said what it has to do. It counts what was sent to it before `asked_at`."""
        known = self._told(name, replica)
        if known is None:
            return
        if known.engine is None:
            known.engine = EngineBacklog()
        known.engine.loaded(load, asked_at, now)
        known.heard(now)
        self._changed.add(name)

    def missed(self, name: str, replica: Replica | None = None) -> None:
        """An engine was asked for its load and did not say: until it does, its latencies of late stand for it, and
        other replicas are taken before it."""
        known = self._told(name, replica)
        if known is None:
            return
        known.missed += 1
        if known.engine is not None:
            known.engine.missed()
            self._changed.add(name)

    def _told(self, name: str, replica: Replica | None) -> Target | None:
        """Whom a reading is of; None where that is not known any more, or no longer told apart in this way."""
        known = self._known[name]
        if replica is not None:
            return known.members.get(replica)
        return None if known.members else known

    # What the request path tells.

    def likely_output(self, tenant: str, key_id: str, model: str) -> int | None:
        """Tokens of one answer to this caller's requests for a model: as they were of late, or else as everybody's
        were; None before the first."""
        likely = self._outputs.likely((tenant, key_id, model))
        if likely is None:
            likely = self._outputs.likely(model)
        return None if likely is None else round(likely)

    def long_output(self, tenant: str, key_id: str, model: str) -> int | None:
        """Tokens that few answers to this caller's requests for a model exceed (19 of 20 do not), as they were of late,
        or else as everybody's were; None before the first."""
        high = self._outputs.high((tenant, key_id, model))
        if high is None:
            high = self._outputs.high(model)
        return None if high is None else ceil(high)

    def decided(self, decision: Decision, now: float) -> None:
        """A request was decided: what it offers to the engines among its candidates goes into the price of their
        seconds. To be told once a request, whichever candidate answers."""
        by_ms = decision.first_token_by_ms
        for candidate in decision.candidates:
            if candidate.engine_s is not None and candidate.cost_nusd is not None:
                saved = saved_per_engine_second(candidate, decision.candidates)
                if saved is not None:
                    self._known[candidate.deployment].demand.offered(
                        candidate.engine_s, saved, by_ms, decision.priority, now, late=decision.late
                    )

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
        affinity: Affinity | None = None,
        tried: Collection[Replica] = (),
    ) -> Flight:
        """An attempt begins. Where the circuit is half open, it is the trial. `asker` is tenant, key and model of a
        request whose answers' length is to be learned. `affinity` chooses among replicas, of which those that were
        `tried` are left out."""
        deployment = self._known[name]
        deployment.in_flight += 1
        known: Target = deployment
        member = None
        if deployment.members:
            known = member = deployment.chosen(now, affinity or Affinity(0.0), tried)
            member.in_flight += 1
        if known.open_until is not None:
            known.trial = True
        self._changed.add(name)
        born, life = known.born, known.life
        flight = Flight(name, now, prompt_tokens, priority, stream, asker, answers, born, life, member=member)
        if known.engine is not None:
            flight.forecast_ms = known.engine.sent(prompt_tokens, priority, stream, now)
            flight.queued, flight.waits = known.engine.number, stream
        return flight

    def first_token(self, flight: Flight, now: float) -> None:
        """A stream's first token came."""
        known = flight.member or self._known[flight.deployment]
        flight.first_token_at = now
        if flight.life != known.life:
            return
        known.answered_at = now
        milliseconds = (now - flight.at) * 1000
        self._known[flight.deployment].latencies.first_token(milliseconds, flight.prompt_tokens, now)
        if known.engine is not None and flight.waits:
            flight.waits = False
            known.engine.started(flight.queued, flight.priority)
            if flight.forecast_ms is not None:
                known.engine.compared(flight.forecast_ms, milliseconds, flight.priority, now)
        self._changed.add(flight.deployment)

    def comes_soon(self, flight: Flight, left_s: float, now: float) -> bool:
        """Whether a first token that has not come is so near that it will come within so many seconds: what goes before
        it at its engine has all but been computed."""
        known = flight.member or self._known[flight.deployment]
        if known.engine is None or not flight.waits or flight.life != known.life:
            return False
        needs_s = known.engine.needs_s(flight.queued, flight.priority, now)
        return needs_s is not None and SOON * needs_s <= left_s

    def abandoned(self, flight: Flight) -> None:
        """The attempt was given up by us before its first token, which says nothing of the deployment: neither that it
        is well nor that it is broken."""
        known = self._landed(flight)
        if flight.born == known.born:
            known.trial = False
        self._gone(known, flight)

    def ended(self, flight: Flight, error: GatewayError | None, now: float, usage: Usage | None = None) -> None:
        """The attempt is over; `error` is None where it answered. `usage` is that of a whole answer, None where it was
        cut or left."""
        known = self._landed(flight)
        if flight.born == known.born:
            known.trial = False
            known.judge(error, now, flight.at)
            if flight.member is None and known.open_until is not None:
                self._circuits_open.add(flight.deployment)
            elif flight.member is None:
                self._circuits_open.discard(flight.deployment)
        if isinstance(error, UpstreamLate):
            self._waited(known, flight, now)
        if error is None and usage is not None:
            self._learn(known, flight, usage, now)
        self._gone(known, flight)

    def another(self, name: str, now: float, tried: Collection[Replica]) -> bool:
        """Whether the deployment has a replica that could be called and was not tried."""
        return any(m.able(now) for replica, m in self._known[name].members.items() if replica not in tried)

    def _landed(self, flight: Flight) -> Target:
        """What the flight was on, with one less in flight."""
        known = self._known[flight.deployment]
        known.in_flight -= 1
        if flight.member is None:
            return known
        flight.member.in_flight -= 1
        return flight.member

    def _waited(self, known: Target, flight: Flight, now: float) -> None:
        """A queue was left: the first token would have taken longer than that."""
        waited_ms = (now - flight.at) * 1000
        forecast_ms = flight.forecast_ms
        if known.engine is None or flight.life != known.life or forecast_ms is None:
            return
        if waited_ms > forecast_ms:
            known.engine.compared(forecast_ms, waited_ms, flight.priority, now)

    def _gone(self, known: Target, flight: Flight) -> None:
        if known.engine is not None and flight.waits and flight.life == known.life:
            known.engine.started(flight.queued, flight.priority)
        self._changed.add(flight.deployment)

    def _learn(self, known: Target, flight: Flight, usage: Usage, now: float) -> None:
        if flight.asker is not None:
            length = usage.completion_tokens / flight.answers
            self._outputs.add(flight.asker, length, now)
            self._outputs.add(flight.asker[2], length, now)
        if flight.life != known.life:
            return
        each = max(1, round(usage.completion_tokens / flight.answers))
        began = flight.first_token_at
        latencies = self._known[flight.deployment].latencies
        if began is not None:
            latencies.rest((now - began) * 1000, each - 1, now)
        else:
            latencies.whole((now - flight.at) * 1000, flight.prompt_tokens, each, now)
            began = flight.at + (flight.forecast_ms or 0.0) / 1000
        if known.engine is not None:
            known.engine.held(max(now - began, 0.0), now)

    def _balanced_status(self, name: str, now: float, affinity: Affinity) -> DeploymentStatus:
        """As the replica is that would get the request; latencies are of all of them, since each of them may."""
        known = self._known[name]
        member = known.chosen(now, affinity, ())
        down, retry_after, circuit = member.circuit(now)
        if not member.able(now):  # and so is none
            retry_after = max(min(m.open_until or now for m in known.members.values()) - now, 1.0)
        return known.status(member.engine, down, retry_after, circuit, now)

    def _refresh(self, name: str, now: float) -> None:
        known = self._known[name]
        down, retry_after, circuit = known.circuit(now)
        if known.down is not None:
            down, retry_after = known.down, known.down_retry_after
        known.latencies.look_up(now)
        self._statuses[name] = known.status(known.engine, down, retry_after, circuit, now)
