"""What is kept of one request for the invoice: who, where, how much, and what each attempt cost. Pure.

Owns the written form, which only ever gains fields. Refuses content: an entry holds names of the policy and of the
keys' file, numbers and ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from gateway.telemetry import Record

VERSION = 1


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt: what was booked of it, in tokens and nano-dollars, however it ended. `outcome` is `ok`, `cut`,
    `client_gone` or `failed`. `estimated`: the deployment did not say how much it was."""

    deployment: str
    outcome: str
    tokens: int
    cost_nusd: int
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One request. `id` is its decision's, by which an entry that was written twice is one; `at` seconds since 1970,
    when it ended. `tokens` and `cost_nusd` are sums over all attempts; `prompt_tokens`, `completion_tokens` and
    `cached_tokens` are of the one that answered. `cache`: whether the answer came from the response cache."""

    id: str
    at: float
    tenant: str
    key: str
    outcome: str
    status: int
    deployment: str = ""
    model: str = ""
    zone: str = ""
    rule: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cache: str = "off"
    attempts: tuple[Tried, ...] = ()

    @property
    def tokens(self) -> int:
        """Booked, over all attempts."""
        return sum(tried.tokens for tried in self.attempts)

    @property
    def cost_nusd(self) -> int:
        """Booked, over all attempts."""
        return sum(tried.cost_nusd for tried in self.attempts)

    def to_json(self) -> bytes:
        """One line, without its end."""
        written: dict[str, Any] = {
            "v": VERSION,
            "id": self.id,
            "at": datetime.fromtimestamp(self.at, UTC).isoformat(timespec="milliseconds"),
            "tenant": self.tenant,
            "key": self.key,
            "outcome": self.outcome,
            "status": self.status,
        }
        if self.deployment:
            written |= {
                "deployment": self.deployment,
                "model": self.model,
                "zone": self.zone,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cached_tokens": self.cached_tokens,
            }
        if self.rule:
            written["rule"] = self.rule
        if self.cache != "off":
            written["cache"] = self.cache
        if self.attempts:
            written |= {
                "tokens": self.tokens,
                "cost_nusd": self.cost_nusd,
                "attempts": [_tried(t) for t in self.attempts],
            }
        return orjson.dumps(written)


def _tried(tried: Tried) -> dict[str, Any]:
    written: dict[str, Any] = {
        "deployment": tried.deployment,
        "outcome": tried.outcome,
        "tokens": tried.tokens,
        "cost_nusd": tried.cost_nusd,
    }
    return written | {"estimated": True} if tried.estimated else written


def entry_from_json(line: bytes | str) -> Entry:
    """The entry that was written. Raises ValueError where it is none."""
    try:
        told = orjson.loads(line)
        attempts = tuple(
            Tried(
                str(one["deployment"]),
                str(one["outcome"]),
                _count(one["tokens"]),
                _count(one["cost_nusd"]),
                bool(one.get("estimated")),
            )
            for one in told.get("attempts", ())
        )
        return Entry(
            id=str(told["id"]),
            at=datetime.fromisoformat(told["at"]).timestamp(),
            tenant=str(told["tenant"]),
            key=str(told["key"]),
            outcome=str(told["outcome"]),
            status=_count(told["status"]),
            deployment=str(told.get("deployment", "")),
            model=str(told.get("model", "")),
            zone=str(told.get("zone", "")),
            rule=str(told.get("rule", "")),
            prompt_tokens=_count(told.get("prompt_tokens", 0)),
            completion_tokens=_count(told.get("completion_tokens", 0)),
            cached_tokens=_count(told.get("cached_tokens", 0)),
            cache=str(told.get("cache", "off")),
            attempts=attempts,
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no usage record: {type(error).__name__}") from None


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a count is needed")
    return value


def entry_of(record: Record, at: float) -> Entry | None:
    """What is kept of a request that ended at `at` (seconds since 1970); None where nobody was let in."""
    if record.status == 401:
        return None
    usage, decision = record.usage, record.decision
    return Entry(
        id=record.decision_id,
        at=at,
        tenant=record.tenant,
        key=record.key,
        outcome=record.outcome,
        status=record.status,
        deployment=record.deployment or "",
        model=record.model,
        zone=record.zone or "",
        rule=decision.rule if decision is not None else "",
        prompt_tokens=usage.prompt_tokens if usage is not None else 0,
        completion_tokens=usage.completion_tokens if usage is not None else 0,
        cached_tokens=usage.cached_tokens if usage is not None else 0,
        cache=record.cache or "off",
        attempts=_attempts(record),
    )


def _attempts(record: Record) -> tuple[Tried, ...]:
    failed = [Tried(o.attempt.deployment, "failed", o.tokens, o.nusd) for o in record.failed]
    if record.given_up is not None:
        last = record.given_up
        failed.append(Tried(last.attempt.deployment, record.outcome, last.tokens, last.nusd))
    if record.deployment is None or record.usage is None or record.cache == "hit":  # a stored answer costs nothing
        return tuple(failed)
    usage, booked = record.usage, record.booked
    tokens = usage.prompt_tokens + usage.completion_tokens if booked is None else booked.tokens
    cost = record.cost_nusd or 0 if booked is None else booked.nusd
    return (*failed, Tried(record.deployment, record.outcome, tokens, cost))
