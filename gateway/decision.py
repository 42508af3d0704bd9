"""What is decided of a request: which deployments may answer, what is predicted of each, and why the others may not.

Owns these nouns and how they read. Refuses to decide (`routing.py`). Units as in `types.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from gateway.types import usd

Gate = Literal["unconfigured", "caller", "zone", "capability", "window", "cost_cap", "require", "limit", "available"]


class Miss(NamedTuple):
    """What a candidate is predicted to miss of a requirement: `what` it is about (one of a time's names, or `cost`),
    the prediction (nano-dollars or milliseconds; None: not known), who asks and for how much at most."""

    what: str
    predicted: float | None
    who: str
    limit: float

    def __str__(self) -> str:
        if self.what == "cost":
            cost = "unknown" if self.predicted is None else f"{usd(int(self.predicted))} USD"
            return f"cost {cost}, required at most {usd(int(self.limit))} USD"
        time = "not measured" if self.predicted is None else f"{self.predicted:.0f} ms"
        return f"{self.what} p95 {time}, {self.who} requires {self.limit:g} ms"


class Candidate(NamedTuple):
    """A deployment that may answer, with what is predicted of it. None: not known. (A tuple, because it is made up to
    twenty times a request, and a frozen dataclass takes longer to make.)

    `cost_nusd` is what one more request costs there; `congestion_nusd` comes on top where others want the engine more.
    Latencies are 95th percentiles. `engine_s` are the seconds of the engine that the request takes, None where nobody
    counts them. `misses` are what it does not meet of the rule's requirement; `masked`: it gets placeholders.
    """

    deployment: str
    cost_nusd: int | None
    first_token_ms: float | None
    meets: bool
    misses: tuple[Miss, ...] = ()
    congestion_nusd: int = 0
    total_ms: float | None = None
    per_token_ms: float | None = None
    engine_s: float | None = None
    masked: bool = False

    @property
    def note(self) -> str:
        """What is to be said of it, as a sentence made only for who reads it; empty where nothing is."""
        return "; ".join((*(("masked",) if self.masked else ()), *map(str, self.misses)))

    @property
    def price_nusd(self) -> int | None:
        """What `order_by: marginal_cost` compares."""
        return None if self.cost_nusd is None else self.cost_nusd + self.congestion_nusd


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a deployment may not answer: the gate that removed it and a sentence that quotes nothing of the request."""

    deployment: str
    gate: Gate
    reason: str
    retry_after: float = 0.0


CacheWhen = Literal["deterministic", "always"]
CacheScope = Literal["tenant", "shared"]


@dataclass(frozen=True, slots=True)
class Caching:
    """That answers may be stored for `ttl` seconds and given again: of requests that ask for the same answer each time,
    or of all; to the same tenant, or to every one where the request carries no label."""

    ttl: float
    when: CacheWhen = "deterministic"
    scope: CacheScope = "tenant"


_NONE: Mapping[str, float] = MappingProxyType({})


class Decision(NamedTuple):
    """Which deployments may answer, in order, and why the others may not. The order is the failover chain. (A tuple
    for the same reason as a candidate.)

    `slo` is the class that counted: the request's, else the rule's. `timeouts`, in seconds, replace the deployments',
    each by itself. `priority` is for engines that order their work: lower goes first. `first_token_by_ms` is when the
    first token is wanted, by the class or the rule's requirement; None where neither says. `caching` is the rule's;
    None where it has none. `late`: nobody is in time, and the priority is that of a class that can still be met.
    """

    rule: str
    because: str
    candidates: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    labels: frozenset[str]
    policy_hash: str
    slo: str | None = None
    timeouts: Mapping[str, float] = _NONE
    priority: int = 0
    first_token_by_ms: float | None = None
    caching: Caching | None = None
    late: bool = False
