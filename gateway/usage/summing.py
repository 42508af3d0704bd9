"""Entries to sums: by tenant, key, deployment, model, rule, day or month. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, tzinfo
from typing import Literal

from gateway.usage.entry import Entry

Key = Literal["tenant", "key", "deployment", "model", "zone", "rule", "day", "month", "hour"]

_FORMS = {"day": "%Y-%m-%d", "month": "%Y-%m", "hour": "%Y-%m-%d %H:00"}


@dataclass(slots=True)
class Total:
    """Sums over entries. `answered` of the `requests` have `ok` as their outcome; `cached` of them came from the
    response cache. `prompt_tokens` and `completion_tokens` are of the deployments that answered, `tokens` what was
    booked over all attempts; `failed_nusd` is the part of `cost_nusd` that bought no answer."""

    requests: int = 0
    answered: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens: int = 0
    cost_nusd: int = 0
    failed_nusd: int = 0

    def add(self, entry: Entry) -> None:
        """Count one entry."""
        self.requests += 1
        self.answered += entry.outcome == "ok"
        self.cached += entry.cache == "hit"
        self.prompt_tokens += entry.prompt_tokens
        self.completion_tokens += entry.completion_tokens
        self.tokens += entry.tokens
        self.cost_nusd += entry.cost_nusd
        self.failed_nusd += sum(tried.cost_nusd for tried in entry.attempts if tried.outcome == "failed")

    def include(self, other: Total) -> None:
        """Count what another sum counts."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def total_by(entries: Iterable[Entry], by: Sequence[Key], zone: tzinfo = UTC) -> dict[tuple[str, ...], Total]:
    """Sums by the values of `by`, in their order. Days and the like are of the time zone. An entry counts once, however
    often it was written. With `deployment` or `model`, a request without an answer counts under an empty name; what its
    attempts cost stays with it."""
    totals: dict[tuple[str, ...], Total] = {}
    seen: set[str] = set()
    for entry in entries:
        if entry.id in seen:
            continue
        seen.add(entry.id)
        group = tuple(_value(entry, key, zone) for key in by)
        totals.setdefault(group, Total()).add(entry)
    return dict(sorted(totals.items()))


def _value(entry: Entry, key: Key, zone: tzinfo) -> str:
    match key:
        case "tenant":
            return entry.tenant
        case "key":
            return entry.key
        case "deployment":
            return entry.deployment
        case "model":
            return entry.model
        case "zone":
            return entry.zone
        case "rule":
            return entry.rule
        case _:
            return datetime.fromtimestamp(entry.at, zone).strftime(_FORMS[key])
