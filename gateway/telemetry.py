"""The decision record: one JSON line a request, at INFO.

Owns what may be said about a request. A record is built from names of the policy, numbers and ids; it has no field that
could hold a prompt, an answer, a header beyond the pairs that a rule asks for, or a key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, BinaryIO, Literal

import orjson

from gateway.decision import Candidate, Decision, Rejection
from gateway.ledger import Spent
from gateway.record import facts_to_record, status_to_record
from gateway.snapshot import DeploymentStatus, Snapshot
from gateway.types import Outcome, RequestFacts, Usage, usd

SHORTEST_WAIT_MS = 0.1  # what is less is not worth a field: nobody was asked
_AS_LINE = orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE


class FleetRecord:
    """The statuses of a snapshot as JSON. Invariant: what is written for a status is what `status_to_record` says; a
    status that does not change is written once."""

    def __init__(self) -> None:
        self._written: dict[str, tuple[DeploymentStatus, orjson.Fragment | None]] = {}

    def of(self, snapshot: Snapshot) -> dict[str, orjson.Fragment]:
        """By deployment; those of which nothing is known and that are up are left out."""
        told: dict[str, orjson.Fragment] = {}
        for name, status in snapshot.deployments.items():
            known = self._written.get(name)
            if known is not None and known[0] is status and status.backlog is None:
                fragment = known[1]
            else:
                written = status_to_record(status, snapshot.now)
                fragment = orjson.Fragment(orjson.dumps(written)) if written else None
                self._written[name] = (status, fragment)
            if fragment is not None:
                told[name] = fragment
        return told


@dataclass(frozen=True, slots=True)
class Moved:
    """A replica, by its ordinal, that failed before the first token, after which another one of the deployment got the
    request."""

    deployment: str
    replica: int
    reason: str


@dataclass(slots=True)
class Record:
    """What is said about one request once it is over. Filled along the request path; `outcome` is `ok`, an error's
    code, or `client_gone`. `snapshot` is what the first decision was made from, `decision` the last one. `attempts`
    counts the replicas that were tried in vain, too; `replica` is the ordinal of the one that answered, None where the
    deployment has one address."""

    request_id: str
    decision_id: str
    status: int = 0
    outcome: str = "ok"
    stream: bool = False
    tenant: str = ""
    key: str = ""
    facts: RequestFacts | None = None
    snapshot: Snapshot | None = None
    decision: Decision | None = None
    deployment: str | None = None
    model: str = ""  # of the deployment
    zone: str | None = None
    attempts: int = 0
    masked: int | None = None  # values that the deployment got placeholders for; None where it got the request as it is
    replica: int | None = None
    moved: list[Moved] = field(default_factory=list)
    failed: list[Outcome] = field(default_factory=list)
    full: Mapping[str, Rejection] = field(default_factory=dict)  # what limits kept the request from, by the end
    limits_ms: float | None = None  # that it waited for whoever counts them; None where nothing is limited
    booked: Spent | None = None  # what its limits hold of the answer; None where nothing is limited
    given_up: Outcome | None = None  # the last attempt, where it gave no answer and no other was made
    usage: Usage | None = None
    cost_nusd: int | None = None
    marginal_nusd: int | None = None  # what rules compare; the cost is what is billed
    decided_ms: float | None = None  # from the request's arrival to its first decision
    first_token_ms: float | None = None
    total_ms: float = 0.0
    cache: Literal["hit", "miss"] | None = None  # None where it was not asked
    dropped: tuple[str, ...] = ()  # parameters that the deployment did not get; not for the log
    shared: bool = False  # the call is made for others as well, and books this record when it ends

    @property
    def predicted(self) -> Candidate | None:
        """What was predicted of the deployment that answered."""
        if self.decision is None or self.deployment is None:
            return None
        return next((c for c in self.decision.candidates if c.deployment == self.deployment), None)

    def fields(self, fleet: FleetRecord) -> dict[str, Any]:
        """The record as the logged JSON object; what is not known is left out."""
        line: dict[str, Any] = {
            "request_id": self.request_id,
            "decision": self.decision_id,
            "status": self.status,
            "outcome": self.outcome,
            "stream": self.stream,
            "total_ms": round(self.total_ms, 2),
        }
        if self.tenant:
            line["tenant"], line["key"] = self.tenant, self.key
        if self.decision is not None:
            line["rule"] = self.decision.rule
            line["policy"] = self.decision.policy_hash
            line["labels"] = sorted(self.decision.labels)
            line["candidates"] = [candidate.deployment for candidate in self.decision.candidates]
            line["rejected"] = {rejection.deployment: rejection.gate for rejection in self.decision.rejections}
        if self.facts is not None and self.snapshot is not None:
            line["facts"] = facts_to_record(self.facts)
            line["draw"], line["wall"] = self.snapshot.draw, round(self.snapshot.wall, 3)
            line["fleet"] = fleet.of(self.snapshot)
        if self.full:
            line["full"] = {name: [r.reason, round(r.retry_after, 3)] for name, r in self.full.items()}
        if self.deployment is not None:
            line["deployment"], line["zone"], line["attempts"] = self.deployment, self.zone, self.attempts
        if self.replica is not None:
            line["replica"] = self.replica
        if self.moved:
            line["moved"] = [
                {"deployment": moved.deployment, "replica": moved.replica, "reason": moved.reason}
                for moved in self.moved
            ]
        if (predicted := self.predicted) is not None:
            line["predicted"] = _predicted(predicted)
        line |= {name: told for name, told in (("cache", self.cache), ("masked", self.masked)) if told is not None}
        if self.failed:
            line["failed"] = {outcome.attempt.deployment: outcome.reason for outcome in self.failed}
        self._add_taken(line)
        return line

    def _add_taken(self, line: dict[str, Any]) -> None:
        """What the answer took: tokens, money, time."""
        if self.usage is not None:
            line["prompt_tokens"] = self.usage.prompt_tokens
            line["completion_tokens"] = self.usage.completion_tokens
            if self.usage.cached_tokens:
                line["cached_tokens"] = self.usage.cached_tokens
        if self.cost_nusd is not None:
            line["cost_usd"] = usd(self.cost_nusd)
        if self.limits_ms is not None and self.limits_ms >= SHORTEST_WAIT_MS:
            line["limits_ms"] = round(self.limits_ms, 2)
        if self.first_token_ms is not None:
            line["first_token_ms"] = round(self.first_token_ms, 2)


def _predicted(candidate: Candidate) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if candidate.cost_nusd is not None:
        told["cost_usd"] = usd(candidate.cost_nusd)
    if candidate.congestion_nusd:
        told["congestion_usd"] = usd(candidate.congestion_nusd)
    if candidate.first_token_ms is not None:
        told["first_token_ms"] = round(candidate.first_token_ms, 2)
    if candidate.total_ms is not None:
        told["total_ms"] = round(candidate.total_ms, 2)
    if candidate.per_token_ms is not None:
        told["per_token_ms"] = round(candidate.per_token_ms, 2)
    return told


class JsonLog:
    """JSON lines on a stream, each written when it is told. Invariant: a line that cannot be written harms no request;
    the first one that is lost is told, and the first one after it that is not."""

    def __init__(self, stream: BinaryIO, tell: Callable[[str], None]) -> None:
        """`tell` is told, on the terminal, when writing fails and when it does again."""
        self._stream = stream
        self._tell = tell
        self._losing = False

    def info(self, event: str, **fields: object) -> None:
        self._write(event, "info", fields)

    def error(self, event: str, **fields: object) -> None:
        self._write(event, "error", fields)

    def _write(self, event: str, level: str, line: dict[str, Any]) -> None:
        line["event"], line["level"], line["timestamp"] = event, level, datetime.now(UTC)
        try:
            self._stream.write(orjson.dumps(line, option=_AS_LINE))
            self._stream.flush()
        except OSError as error:
            self._say(f"log records are lost: they cannot be written ({error.strerror})", losing=True)
        else:
            if self._losing:
                self._say("log records are written again", losing=False)

    def _say(self, what: str, *, losing: bool) -> None:
        if losing is not self._losing:
            self._losing = losing
            self._tell(what)
