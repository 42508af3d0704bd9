"""What is counted, and how Prometheus is told.

Owns every metric's name, labels and meaning (`METRICS`, from which the documentation is made), and the sums. A request
costs one dictionary look-up and some additions; everything else happens when somebody asks. Refuses labels that a
caller chooses (tenants, keys, models asked for): their number has no bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from gateway.cache import Counts
from gateway.errors import EgressDenied
from gateway.fleet import MemberStatus
from gateway.keys import Standing
from gateway.store import StoreState
from gateway.telemetry import Record
from gateway.types import NUSD_PER_USD, DeploymentStatus

# Seconds. The bounds of the shipped classes (50 ms, 100 ms, 1 s) are bounds of buckets, so that the share of requests
# within a class is a quotient of two series.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
MOST_ROWS = 2_000  # combinations of deployment, rule and outcome; what is beyond is counted as rule and outcome `other`
OTHER = "other"

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Described:
    """One metric, by the name that Prometheus stores."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str

    @property
    def family(self) -> str:
        """The name without what the format appends by itself."""
        return self.name.removesuffix("_total")


REQUESTS = Described(
    "hybridgate_requests_total",
    "counter",
    ("deployment", "rule", "outcome"),
    "Requests that have ended. `deployment` is empty where none answered, or a stored answer did; `outcome` is `ok`, "
    "an error's code, `cut` or `client_gone`.",
)
LABELLED = Described(
    "hybridgate_labelled_requests_total", "counter", ("label",), "Decided requests that carry a label of the policy."
)
FAILOVERS = Described(
    "hybridgate_failovers_total",
    "counter",
    ("deployment",),
    "Attempts on this deployment that failed before the first token, after which the next candidate was tried.",
)
EGRESS_DENIED = Described(
    "hybridgate_egress_denied_total",
    "counter",
    (),
    "Calls that the one door refused although a decision allowed them: a defect; nothing was sent.",
)
TOKENS = Described(
    "hybridgate_tokens_total",
    "counter",
    ("deployment", "kind"),
    "Tokens of answered requests; `kind` is `prompt`, `cached` (the part of prompts that the deployment had cached) or "
    "`completion`.",
)
COST = Described(
    "hybridgate_cost_usd_total", "counter", ("deployment",), "What answered requests cost, US dollars, as billed."
)
MARGINAL_COST = Described(
    "hybridgate_marginal_cost_usd_total",
    "counter",
    ("deployment",),
    "The same at the margin, which rules compare: what one more request costs.",
)
PREDICTED_COST = Described(
    "hybridgate_predicted_cost_usd_total",
    "counter",
    ("deployment",),
    "What decisions had predicted for those requests, US dollars at the margin.",
)
FIRST_TOKEN = Described(
    "hybridgate_first_token_seconds",
    "histogram",
    ("deployment",),
    "From a request's arrival to its first token, of streams.",
)
DURATION = Described(
    "hybridgate_request_duration_seconds", "histogram", ("deployment",), "From a request's arrival to its end."
)
FORECASTS = Described(
    "hybridgate_first_token_forecasts_total",
    "counter",
    ("deployment", "result"),
    "Streams whose first token was predicted and came at the first attempt: `within` the predicted 95th percentile or "
    "`above` it. 95 of 100 are meant to be within.",
)
SLO = Described(
    "hybridgate_slo_requests_total",
    "counter",
    ("slo", "result"),
    "Streams with a latency class: `met` where the first token came within what the class and the rule ask for, else "
    "`missed`.",
)
UP = Described("hybridgate_deployment_up", "gauge", ("deployment", "zone"), "1 where the deployment can be called now.")
IN_FLIGHT = Described(
    "hybridgate_deployment_in_flight", "gauge", ("deployment",), "Attempts on the deployment under way."
)
CIRCUIT_OPEN = Described(
    "hybridgate_deployment_circuit_open",
    "gauge",
    ("deployment",),
    "1 while failures keep requests away from it.",
)
REPLICA_UP = Described(
    "hybridgate_replica_up",
    "gauge",
    ("deployment", "replica"),
    "1 where the replica can be called and answers. `replica` is the least number that no other of the deployment has; "
    "it is given again once the replica is gone. For deployments of several addresses.",
)
REPLICA_IN_FLIGHT = Described(
    "hybridgate_replica_in_flight", "gauge", ("deployment", "replica"), "Attempts on the replica under way."
)
REPLICA_ANSWERS = Described(
    "hybridgate_replica_answers_total", "counter", ("deployment", "replica"), "Requests that the replica answered."
)
REPLICA_MOVES = Described(
    "hybridgate_replica_moves_total",
    "counter",
    ("deployment", "replica"),
    "Attempts on this replica that failed before the first token, after which another replica got the request.",
)
POLICY_INFO = Described("hybridgate_policy_info", "gauge", ("path", "hash"), "1 for the policy in use.")
POLICY_LOADED = Described(
    "hybridgate_policy_loaded_timestamp_seconds", "gauge", (), "When the policy in use was loaded, seconds since 1970."
)
POLICY_LOADS = Described(
    "hybridgate_policy_loads_total",
    "counter",
    ("result",),
    "Times that the policy's files were loaded, the first at start; `result` is `success` or `failure`.",
)
POLICY_IN_STEP = Described(
    "hybridgate_policy_last_load_successful",
    "gauge",
    (),
    "1 where the policy in use is what its files say, 0 where they do not load.",
)
POLICY_ERRORS = Described("hybridgate_policy_errors", "gauge", (), "Errors in the policy's files as they stand now.")
CACHE_REQUESTS = Described(
    "hybridgate_cache_requests_total",
    "counter",
    ("result",),
    "Requests that a stored answer would do for: `hit` where there was one, or another request's call answered it as "
    "well, `miss` where they made a call.",
)
CACHE_STORES = Described(
    "hybridgate_cache_stores_total",
    "counter",
    ("result",),
    "Answers that were to be stored: `stored`, or `too_large`.",
)
CACHE_UNAVAILABLE = Described(
    "hybridgate_cache_unavailable_total",
    "counter",
    (),
    "Times that what replicas share could not be asked, which counts as a miss.",
)
CACHE_ENTRIES = Described("hybridgate_cache_entries", "gauge", (), "Answers stored in this process.")
CACHE_BYTES = Described("hybridgate_cache_bytes", "gauge", (), "What they take.")
KEYS = Described("hybridgate_keys", "gauge", ("standing",), "Callers' keys: `valid`, `expired` or `revoked` now.")
KEYS_LOADS = Described(
    "hybridgate_keys_loads_total",
    "counter",
    ("result",),
    "Times that the file of keys was loaded, the first at start; `result` is `success` or `failure`.",
)
KEYS_IN_STEP = Described(
    "hybridgate_keys_last_load_successful",
    "gauge",
    (),
    "1 where the keys in use are what their file says, 0 where it does not load.",
)
STORE_UP = Described("hybridgate_redis_up", "gauge", (), "1 while Redis answers, 0 while nobody waits for it.")
STORE_FAILURES = Described("hybridgate_redis_failures_total", "counter", (), "Exchanges with Redis that failed.")
STORE_REPLICAS = Described("hybridgate_redis_replicas", "gauge", (), "Gateways that share it, as it last said.")

METRICS = (
    REQUESTS,
    LABELLED,
    FAILOVERS,
    EGRESS_DENIED,
    TOKENS,
    COST,
    MARGINAL_COST,
    PREDICTED_COST,
    FIRST_TOKEN,
    DURATION,
    FORECASTS,
    SLO,
    UP,
    IN_FLIGHT,
    CIRCUIT_OPEN,
    REPLICA_UP,
    REPLICA_IN_FLIGHT,
    REPLICA_ANSWERS,
    REPLICA_MOVES,
    POLICY_INFO,
    POLICY_LOADED,
    POLICY_LOADS,
    POLICY_IN_STEP,
    POLICY_ERRORS,
    CACHE_REQUESTS,
    CACHE_STORES,
    CACHE_UNAVAILABLE,
    CACHE_ENTRIES,
    CACHE_BYTES,
    KEYS,
    KEYS_LOADS,
    KEYS_IN_STEP,
    STORE_UP,
    STORE_FAILURES,
    STORE_REPLICAS,
)


def table() -> str:
    """The metrics as a Markdown table."""
    rows = [f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |" for m in METRICS]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])


class Histogram:
    """Counts by bucket, and the sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def merge(self, other: Histogram) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


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


@dataclass(frozen=True, slots=True)
class PolicyFigures:
    """What the policy's metrics say."""

    path: str
    hash: str
    loaded_at: float
    loads: int
    failures: int
    errors: int


@dataclass(frozen=True, slots=True)
class KeyFigures:
    """What the keys' metrics say. `standings`: how many keys of each."""

    standings: Mapping[Standing, int]
    loads: int
    failures: int
    errors: int


@dataclass(frozen=True, slots=True)
class DeploymentFigures:
    """A deployment as it is now."""

    name: str
    zone: str
    up: bool
    status: DeploymentStatus
    members: Sequence[MemberStatus] = ()


class Metrics(Collector):
    """The sums of one process. Invariant: for the event loop's thread alone, so that nothing is locked. `keys`,
    `cache` (what was counted, entries, bytes) and `store` are asked at each scrape; None where there is none."""

    def __init__(self, now: Callable[[], tuple[PolicyFigures, Iterable[DeploymentFigures]]]) -> None:
        """`now` is asked at each scrape."""
        self.keys: Callable[[], KeyFigures] | None = None
        self.cache: Callable[[], tuple[Counts, int, int]] | None = None
        self.store: Callable[[], StoreState] | None = None
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
        yield _counted(REQUESTS, {key: row.requests for key, row in self._rows.items()})
        yield _counted(LABELLED, {(label,): count for label, count in self._labels.items()})
        yield _counted(FAILOVERS, {(name,): count for name, count in self._failovers.items()})
        yield _counted(EGRESS_DENIED, {(): self._egress_denied})
        yield from self._by_deployment()
        yield _counted(SLO, {(slo, result): count for (slo, result), count in self._classes.items()})
        policy, deployments = self._now()
        yield from _of_deployments(list(deployments))
        yield _counted(REPLICA_ANSWERS, {(name, str(number)): n for (name, number), n in self._answers.items()})
        yield _counted(REPLICA_MOVES, {(name, str(number)): n for (name, number), n in self._moves.items()})
        yield from _of_policy(policy)
        if self.cache is not None:
            yield from _of_cache(*self.cache())
        if self.keys is not None:
            yield from _of_keys(self.keys())
        if self.store is not None:
            yield from _of_store(self.store())

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
        yield _counted(TOKENS, tokens)
        yield _counted(COST, {(name,): row.cost_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield _counted(MARGINAL_COST, {(name,): row.marginal_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield _counted(PREDICTED_COST, {(name,): row.predicted_nusd / NUSD_PER_USD for name, row in answered.items()})
        yield _histogram(FIRST_TOKEN, {name: row.first_token for name, row in answered.items()})
        yield _histogram(DURATION, {name: row.duration for name, row in sums.items()})
        results: dict[tuple[str, ...], int] = {(name, "within"): row.within for name, row in answered.items()}
        yield _counted(FORECASTS, results | {(name, "above"): row.above for name, row in answered.items()})


def _counted(metric: Described, values: Mapping[tuple[str, ...], float]) -> Metric:
    family = CounterMetricFamily(metric.family, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _gauge(metric: Described, values: Mapping[tuple[str, ...], float]) -> Metric:
    family = GaugeMetricFamily(metric.family, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: Described, values: Mapping[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(metric.family, metric.help, labels=metric.labels)
    bounds = [*(f"{bound:g}" for bound in BUCKETS), "+Inf"]
    for name, histogram in values.items():
        reached = accumulate(histogram.counts)
        family.add_metric([name], list(zip(bounds, reached, strict=True)), histogram.total)
    return family


def _of_deployments(deployments: list[DeploymentFigures]) -> Iterator[Metric]:
    yield _gauge(UP, {(d.name, d.zone): d.up for d in deployments})
    yield _gauge(IN_FLIGHT, {(d.name,): d.status.in_flight for d in deployments})
    yield _gauge(CIRCUIT_OPEN, {(d.name,): d.status.circuit != "closed" for d in deployments})
    members = [(d.name, member) for d in deployments for member in d.members]
    yield _gauge(REPLICA_UP, {(name, str(member.ordinal)): member.up for name, member in members})
    yield _gauge(REPLICA_IN_FLIGHT, {(name, str(member.ordinal)): member.in_flight for name, member in members})


def _of_policy(policy: PolicyFigures) -> Iterator[Metric]:
    yield _gauge(POLICY_INFO, {(policy.path, policy.hash): 1})
    yield _gauge(POLICY_LOADED, {(): policy.loaded_at})
    yield _counted(POLICY_LOADS, {("success",): policy.loads, ("failure",): policy.failures})
    yield _gauge(POLICY_IN_STEP, {(): not policy.errors})
    yield _gauge(POLICY_ERRORS, {(): policy.errors})


def _of_cache(counts: Counts, entries: int, size: int) -> Iterator[Metric]:
    yield _counted(CACHE_REQUESTS, {("hit",): counts.hits, ("miss",): counts.misses})
    yield _counted(CACHE_STORES, {("stored",): counts.stores, ("too_large",): counts.too_large})
    yield _counted(CACHE_UNAVAILABLE, {(): counts.unavailable})
    yield _gauge(CACHE_ENTRIES, {(): entries})
    yield _gauge(CACHE_BYTES, {(): size})


def _of_store(state: StoreState) -> Iterator[Metric]:
    yield _gauge(STORE_UP, {(): state.up})
    yield _counted(STORE_FAILURES, {(): state.failures})
    yield _gauge(STORE_REPLICAS, {(): state.replicas})


def _of_keys(keys: KeyFigures) -> Iterator[Metric]:
    yield _gauge(KEYS, {(standing,): count for standing, count in keys.standings.items()})
    yield _counted(KEYS_LOADS, {("success",): keys.loads, ("failure",): keys.failures})
    yield _gauge(KEYS_IN_STEP, {(): not keys.errors})
