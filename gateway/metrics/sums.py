"""The sums of requests in this process. A request costs one dictionary look-up and some additions; everything else
happens when somebody asks. Refuses labels that a caller chooses (keys, models asked for): their number has no bound.
Tenants are named by the file of keys, and only so many are told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from gateway.cache import Counts
from gateway.errors import EgressDenied
from gateway.metrics.described import (
    COST,
    DECIDED,
    DURATION,
    EGRESS_DENIED,
    FAILOVERS,
    FIRST_TOKEN,
    FORECASTS,
    LABELLED,
    MARGINAL_COST,
    PER_TOKEN,
    PREDICTED_COST,
    REPLICA_ANSWERS,
    REPLICA_MOVES,
    REQUESTS,
    SLO,
    TENANT_COST,
    TENANT_REQUESTS,
    TENANT_TOKENS,
    TOKENS,
)
from gateway.metrics.figures import (
    FINE_BUCKETS,
    DeploymentFigures,
    Histogram,
    KeyFigures,
    PolicyFigures,
    StoreFigures,
    UsageFigures,
    counted,
    histogram,
    of_cache,
    of_deployments,
    of_keys,
    of_policy,
    of_store,
    of_usage,
)
from gateway.telemetry import Record
from gateway.types import NUSD_PER_USD

MOST_ROWS = 2_000  # combinations of deployment, rule and outcome; what is beyond is counted as rule and outcome `other`
MOST_TENANTS = 200  # what is beyond is counted as the tenant `other`
OTHER = "other"


@dataclass(slots=True)
class _Row:
    """The sums of one combination of deployment, rule and outcome."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost_nusd: int = 0
    marginal_nusd: int = 0
    predicted_nusd: int = 0
    within: int = 0
    above: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    duration: Histogram = field(default_factory=Histogram)
    per_token: Histogram = field(default_factory=lambda: Histogram(FINE_BUCKETS))

    def merge(self, other: _Row) -> None:
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.cost_nusd += other.cost_nusd
        self.marginal_nusd += other.marginal_nusd
        self.predicted_nusd += other.predicted_nusd
        self.within += other.within
        self.above += other.above
        self.first_token.merge(other.first_token)
        self.duration.merge(other.duration)
        self.per_token.merge(other.per_token)


@dataclass(slots=True)
class _Tenant:
    """The sums of one tenant."""

    requests: int = 0
    tokens: int = 0
    cost_nusd: int = 0


class Metrics(Collector):
    """The sums of one process. Invariant: for the event loop's thread alone, so that nothing is locked.

    `keys`, `cache` (what was counted, entries, bytes), `store` and `usage` are asked at each scrape; None where there
    is none.
    """

    def __init__(self, now: Callable[[], tuple[PolicyFigures, Iterable[DeploymentFigures]]]) -> None:
        """`now` is asked at each scrape."""
        self.keys: Callable[[], KeyFigures] | None = None
        self.cache: Callable[[], tuple[Counts, int, int]] | None = None
        self.store: Callable[[], StoreFigures | None] = lambda: None
        self.usage: Callable[[], UsageFigures] | None = None
        self._tenants: dict[str, _Tenant] = {}
        self._decided = Histogram(FINE_BUCKETS)
        self._now = now
        self._rows: dict[tuple[str, str, str], _Row] = {}
        self._labels: Counter[str] = Counter()
        self._failovers: Counter[str] = Counter()
        self._classes: Counter[tuple[str, str]] = Counter()
        self._answers: Counter[tuple[str, int]] = Counter()
        self._moves: Counter[tuple[str, int]] = Counter()
        self._egress_denied = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        for common in (ProcessCollector, PlatformCollector, GCCollector):
            common(registry=self._registry)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format, version 0.0.4."""
        return generate_latest(self._registry)

    def request(self, record: Record) -> None:
        """Count a request that is over."""
        decision = record.decision
        hit = record.cache == "hit"
        deployment = "" if hit or record.deployment is None else record.deployment
        key = (deployment, decision.rule if decision is not None else "", record.outcome)
        row = self._rows.get(key)
        if row is None:
            row = self._new_row(key)
        row.requests += 1
        row.duration.add(record.total_ms / 1000)
        if record.decided_ms is not None:
            self._decided.add(record.decided_ms / 1000)
        if record.tenant:
            self._of_tenant(record)
        if decision is not None and decision.labels:
            self._labels.update(decision.labels)
        for outcome in record.failed:
            self._failovers[outcome.attempt.deployment] += 1
        if record.moved:
            self._moves.update((moved.deployment, moved.replica) for moved in record.moved)
        if record.replica is not None:
            self._answers[deployment, record.replica] += 1
        if deployment:
            self._answered(row, record)
        elif record.outcome == EgressDenied.code:
            self._egress_denied += 1

    def _new_row(self, key: tuple[str, str, str]) -> _Row:
        if len(self._rows) >= MOST_ROWS:
            key = (key[0] if any(known[0] == key[0] for known in self._rows) else OTHER, OTHER, OTHER)
        return self._rows.setdefault(key, _Row())

    def _of_tenant(self, record: Record) -> None:
        tenant = self._tenants.get(record.tenant)
        if tenant is None:
            name = record.tenant if len(self._tenants) < MOST_TENANTS else OTHER
            tenant = self._tenants.setdefault(name, _Tenant())
        tenant.requests += 1
        if record.usage is not None and record.cache != "hit":
            tenant.tokens += record.usage.prompt_tokens + record.usage.completion_tokens
            tenant.cost_nusd += record.cost_nusd or 0

    def _answered(self, row: _Row, record: Record) -> None:
        usage = record.usage
        if usage is not None:
            row.prompt_tokens += usage.prompt_tokens
            row.cached_tokens += usage.cached_tokens
            row.completion_tokens += usage.completion_tokens
        predicted = record.predicted
        if record.cost_nusd is not None:
            row.cost_nusd += record.cost_nusd
        if record.marginal_nusd is not None and predicted is not None and predicted.cost_nusd is not None:
            row.marginal_nusd += record.marginal_nusd
            row.predicted_nusd += predicted.cost_nusd
        if record.first_token_ms is not None:
            row.first_token.add(record.first_token_ms / 1000)
            if usage is not None and usage.completion_tokens > 1:
                after = (record.total_ms - record.first_token_ms) / 1000
                row.per_token.add(max(0.0, after) / (usage.completion_tokens - 1))
            self._classed(record, record.first_token_ms)
            if predicted is not None and predicted.first_token_ms is not None and not (record.failed or record.moved):
                if record.first_token_ms <= predicted.first_token_ms:
                    row.within += 1
                else:
                    row.above += 1

    def _classed(self, record: Record, first_token_ms: float) -> None:
        decision = record.decision
        if decision is not None and decision.slo is not None and decision.first_token_by_ms is not None:
            met = first_token_ms <= decision.first_token_by_ms
            self._classes[decision.slo, "met" if met else "missed"] += 1

    def collect(self) -> Iterator[Metric]:
        """All metrics, for a scrape."""
        yield counted(REQUESTS, {key: row.requests for key, row in self._rows.items()})
        yield counted(LABELLED, {(label,): count for label, count in self._labels.items()})
        yield counted(FAILOVERS, {(name,): count for name, count in self._failovers.items()})
        yield counted(EGRESS_DENIED, {(): self._egress_denied})
        yield from self._by_deployment()
        yield counted(SLO, {(slo, result): count for (slo, result), count in self._classes.items()})
        yield histogram(DECIDED, {"": self._decided})
        yield counted(TENANT_REQUESTS, {(name,): tenant.requests for name, tenant in self._tenants.items()})
        yield counted(TENANT_TOKENS, {(name,): tenant.tokens for name, tenant in self._tenants.items()})
        costs: dict[tuple[str, ...], float] = {
            (name,): tenant.cost_nusd / NUSD_PER_USD for name, tenant in self._tenants.items()
        }
        yield counted(TENANT_COST, costs)
        policy, deployments = self._now()
        yield from of_deployments(list(deployments))
        yield counted(REPLICA_ANSWERS, {(name, str(number)): n for (name, number), n in self._answers.items()})
        yield counted(REPLICA_MOVES, {(name, str(number)): n for (name, number), n in self._moves.items()})
        yield from of_policy(policy)
        if self.cache is not None:
            yield from of_cache(*self.cache())
        if self.keys is not None:
            yield from of_keys(self.keys())
        if (store := self.store()) is not None:
            yield from of_store(store)
        if self.usage is not None:
            yield from of_usage(self.usage())

    def _by_deployment(self) -> Iterator[Metric]:
        sums: dict[str, _Row] = {}
        for (deployment, _, _), row in self._rows.items():
            sums.setdefault(deployment, _Row()).merge(row)
        answered = {name: row for name, row in sums.items() if name}
        kinds = ("prompt", "cached", "completion")
        tokens: dict[tuple[str, ...], int] = {}
        for name, row in answered.items():
            counts = (row.prompt_tokens, row.cached_tokens, row.completion_tokens)
            tokens |= {(name, kind): count for kind, count in zip(kinds, counts, strict=True)}
        yield counted(TOKENS, tokens)
        yield counted(COST, {(name,): row.cost_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield counted(MARGINAL_COST, {(name,): row.marginal_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield counted(PREDICTED_COST, {(name,): row.predicted_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield histogram(FIRST_TOKEN, {name: row.first_token for name, row in answered.items()})
        yield histogram(PER_TOKEN, {name: row.per_token for name, row in answered.items()})
        yield histogram(DURATION, {name: row.duration for name, row in sums.items()})
        results: dict[tuple[str, ...], int] = {(name, "within"): row.within for name, row in answered.items()}
        yield counted(FORECASTS, results | {(name, "above"): row.above for name, row in answered.items()})
