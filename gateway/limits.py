"""What an operator limits: how much of which kind, whose, and what counts while nobody can count together. Pure.

Owns the kinds of limits. Refuses to count (the ledger does) and text (policyfile/limiting.py reads it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, tzinfo
from typing import Literal

Counted = Literal[
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "tokens_per_day",
    "usd_per_day",
    "usd_per_month",
]
OnDown = Literal["local_share", "closed", "open"]


@dataclass(frozen=True, slots=True)
class Allowance:
    """At most `most` of what is counted: requests, tokens (prompt and answer), or nano-dollars. `on_down` says what
    counts while the store that replicas share does not answer: each replica's share, nothing at all (`closed`), or
    anything (`open`)."""

    counted: Counted
    most: int
    on_down: OnDown = "local_share"


@dataclass(frozen=True, slots=True)
class Limits:
    """All of one subject: a key, a tenant, a deployment, a key on a deployment. `strict`: tokens and money are reserved
    at the most that a request can take, so that they never go over; otherwise at what it will probably take. Days and
    months begin in `time_zone`."""

    allowances: tuple[Allowance, ...]
    strict: bool = False
    time_zone: tzinfo = UTC


@dataclass(frozen=True, slots=True)
class CallerLimits:
    """What one caller is held to: as a key, as one of its tenant, and on single deployments. None where nothing is."""

    key: Limits | None = None
    tenant: Limits | None = None
    deployments: Mapping[str, Limits] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DeploymentLimits:
    """What one deployment is held to: by all callers together (the provider's own limits), and by each key."""

    all: Limits | None = None
    each_key: Limits | None = None
