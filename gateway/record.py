"""What a decision was made from, as JSON in its record, and back: so that a log can be decided again by another policy.

Owns the written form of facts and of what was known of the fleet. Both hold names of the policy, numbers and flags, and
of what a caller wrote only the tags, which the request path looks through before. What is as it is by default is left
out. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from operator import attrgetter
from typing import Any, get_args

from gateway.decision import Rejection
from gateway.snapshot import Backlog, CircuitState, DeploymentStatus, Snapshot
from gateway.types import RequestFacts, TokenCount, Usage

_DEFAULT = RequestFacts("auto")
_FLAGS = ("stream", "tools", "images", "schema")
_SETS = ("key_tags", "tags", "labels", "masked_labels", "deployments")
_PLAIN = ("tenant", "key_id", "max_tokens", "n", "slo", "max_cost_nusd", "likely_output")

_LATENCIES = ("first_token_p95_ms", "per_token_p95_ms", "busy", "engine_second_nusd", "dearest_nusd")
_BACKLOG = (
    "tokens",
    "prefill_tokens_per_s",
    "step_s",
    "sequences",
    "running",
    "hold_s",
    "free_blocks",
    "used_blocks",
    "block_size",
    "free_places",
    "token_s",
    "step_tokens",
    "ahead",
    "margins",
    "cached_token_s",
)
_of_backlog = attrgetter(*_BACKLOG)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One line of a log of decisions, as far as deciding again and comparing need it.

    `facts` and `snapshot` are what was decided from; the rest is what came of it: the rule and the policy's hash, the
    candidates in order, who answered (None: nobody did) and how that went. `failed` are the deployments that were tried
    in vain, `rejected` the gate of each that was removed, `predicted_first_token_ms` what was predicted of the one that
    answered. `masked`: it got placeholders. `stored`: it had answered an equal request before.
    """

    decision_id: str
    facts: RequestFacts
    snapshot: Snapshot
    policy_hash: str
    rule: str
    candidates: tuple[str, ...]
    outcome: str
    deployment: str | None = None
    zone: str | None = None
    usage: Usage | None = None
    cost_nusd: int | None = None
    first_token_ms: float | None = None
    total_ms: float = 0.0
    status: int = 200
    failed: frozenset[str] = frozenset()
    rejected: Mapping[str, str] = field(default_factory=dict)
    predicted_first_token_ms: float | None = None
    masked: bool = False
    stored: bool = False

    def snapshot_of(self, names: Iterable[str]) -> Snapshot:
        """The snapshot for a policy with these deployments: one of which nothing was written is up and not measured."""
        unknown = DeploymentStatus()
        known = self.snapshot.deployments
        return replace(self.snapshot, deployments={name: known.get(name, unknown) for name in names})


def recorded(line: Mapping[str, Any]) -> Recorded | None:
    """A line of a log; None where it is no record of a decision (an engine's state, a request that was refused before
    it was decided). Raises ValueError where it should be one and cannot be read."""
    if line.get("event") != "request" or "facts" not in line:
        return None
    try:
        tokens = (line["prompt_tokens"], line["completion_tokens"]) if "prompt_tokens" in line else None
        full = {name: Rejection(name, "limit", *told) for name, told in line.get("full", {}).items()}
        snapshot = Snapshot(0.0, line["draw"], fleet_from(line["fleet"]), line["wall"], full)
        return Recorded(
            decision_id=line["decision"],
            facts=facts_from_record(line["facts"]),
            snapshot=snapshot,
            policy_hash=line["policy"],
            rule=line["rule"],
            candidates=tuple(line["candidates"]),
            outcome=line["outcome"],
            deployment=line.get("deployment"),
            zone=line.get("zone"),
            usage=None if tokens is None else Usage(*tokens, line.get("cached_tokens", 0)),
            cost_nusd=round(float(line["cost_usd"]) * 1e9) if "cost_usd" in line else None,
            first_token_ms=line.get("first_token_ms"),
            total_ms=line["total_ms"],
            status=line["status"],
            failed=frozenset(line.get("failed", {})),
            rejected=dict(line.get("rejected", {})),
            predicted_first_token_ms=line.get("predicted", {}).get("first_token_ms"),
            masked="masked" in line,
            stored=line.get("cache") == "hit",
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"the record cannot be read: {type(error).__name__} {error}") from None


def facts_to_record(facts: RequestFacts) -> dict[str, Any]:
    """The facts as a JSON object. `prompt` is bound and estimate; `is` lists the flags that hold."""
    prompt = facts.prompt
    written: dict[str, Any] = {"model": facts.model, "prompt": [prompt.bound, prompt.estimate]}
    if prompt.exact:
        written["exact"] = dict(prompt.exact)
    if prompt.open:
        written["open"] = True
    flags = [name for name in _FLAGS if getattr(facts, name)]
    if flags:
        written["is"] = flags
    for name in _SETS:
        items = getattr(facts, name)
        if items or (items is not None and getattr(_DEFAULT, name) is None):
            written[name] = sorted(items)
    for name in _PLAIN:
        value = getattr(facts, name)
        if value != getattr(_DEFAULT, name):
            written[name] = value
    if facts.headers:
        written["headers"] = sorted(facts.headers)
    return written


def facts_from_record(written: Mapping[str, Any]) -> RequestFacts:
    """The facts that were written. Raises KeyError, TypeError or ValueError where they cannot be read."""
    bound, estimate = written["prompt"]
    flags = frozenset(written.get("is", ()))
    values: dict[str, Any] = {name: name in flags for name in _FLAGS}
    values |= {name: frozenset(written[name]) for name in _SETS if name in written}
    values |= {name: written[name] for name in _PLAIN if name in written}
    return RequestFacts(
        model=written["model"],
        prompt=TokenCount(bound, estimate, written.get("exact", {}), bool(written.get("open"))),
        headers=frozenset((name, value) for name, value in written.get("headers", ())),
        **values,
    )


def status_to_record(status: DeploymentStatus, now: float) -> dict[str, Any]:
    """What is known of a deployment as a JSON object; empty where nothing is and it is up. `backlog` is a list: seconds
    since it was brought up to date, then its fields in the order of `_BACKLOG`; `margins` and `rooms` are lists of
    lists that begin with a priority."""
    written: dict[str, Any] = {}
    if status.down is not None:
        written["down"] = status.down
    if status.circuit != "closed":
        written["circuit"] = status.circuit
    for name in _LATENCIES:
        value = getattr(status, name)
        if value and value < inf:
            written[name] = round(value, 3)
    if status.first_token_p95_ms_by_size:
        written["first_token_p95_ms_by_size"] = [round(value, 1) for value in status.first_token_p95_ms_by_size]
    backlog = status.backlog
    if backlog is not None and now <= backlog.good_until:
        told = [None if value == inf else value for value in _of_backlog(backlog)]
        written["backlog"] = [round(now - backlog.at, 4), *told]
        margins = backlog.margins_by_priority
        if margins:
            written["margins"] = [[known, *[round(each, 3) for each in margins[known]]] for known in sorted(margins)]
    if status.rooms:
        written["rooms"] = status.rooms
    return written


def fleet_from(written: Mapping[str, Mapping[str, Any]]) -> dict[str, DeploymentStatus]:
    """The statuses that were written, at the time 0; deployments of which nothing was known are not among them. Raises
    KeyError, TypeError or ValueError where they cannot be read."""
    return {name: _status(told) for name, told in written.items()}


def _status(told: Mapping[str, Any]) -> DeploymentStatus:
    circuit = told.get("circuit", "closed")
    if circuit not in get_args(CircuitState):
        raise ValueError("circuit")
    values: dict[str, Any] = {name: told[name] for name in _LATENCIES if name in told}
    backlog = told.get("backlog")
    return DeploymentStatus(
        down=told.get("down"),
        circuit=circuit,
        first_token_p95_ms_by_size=tuple(told.get("first_token_p95_ms_by_size", ())),
        backlog=None if backlog is None else _backlog(backlog, told.get("margins", ())),
        rooms=tuple((priority, seconds, any(bound)) for priority, seconds, *bound in told.get("rooms", ())),
        **values,
    )


def _backlog(told: Sequence[Any], margins: Sequence[Any]) -> Backlog:
    age, *values = told
    known = {name: value for name, value in zip(_BACKLOG, values, strict=True) if value is not None}
    known["ahead"] = tuple((priority, share) for priority, share in known["ahead"])
    known["margins"] = tuple(known["margins"])
    known["margins_by_priority"] = {priority: tuple(by_size) for priority, *by_size in margins}
    return Backlog(at=-age, good_until=inf, **known)
