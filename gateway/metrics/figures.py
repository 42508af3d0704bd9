"""What is asked at each scrape, as metrics: the policy, keys, deployments, stored answers, the store that replicas
share. Refuses to remember anything.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from gateway.cache import Counts
from gateway.keys import Standing
from gateway.metrics.described import (
    CACHE_BYTES,
    CACHE_ENTRIES,
    CACHE_REQUESTS,
    CACHE_STORES,
    CACHE_UNAVAILABLE,
    CIRCUIT_OPEN,
    IN_FLIGHT,
    KEYS,
    KEYS_IN_STEP,
    KEYS_LOADS,
    POLICY_ERRORS,
    POLICY_IN_STEP,
    POLICY_INFO,
    POLICY_LOADED,
    POLICY_LOADS,
    REPLICA_IN_FLIGHT,
    REPLICA_UP,
    STORE_DAMAGED,
    STORE_FAILURES,
    STORE_REPLICAS,
    STORE_UP,
    UP,
    USAGE_LOST,
    USAGE_WAITING,
    Described,
)
from gateway.snapshot import DeploymentStatus
from gateway.standing import MemberStatus
from gateway.store import StoreState

# Seconds. The bounds of the shipped classes (50 ms, 100 ms, 1 s) are bounds of buckets, so that the share of requests
# within a class is a quotient of two series.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
# Of what the gateway itself takes for a request, and of the time between two tokens.
FINE_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 1.0)


class Histogram:
    """Counts by bucket, and the sum."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...] = BUCKETS) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.buckets, seconds)] += 1
        self.total += seconds

    def merge(self, other: Histogram) -> None:
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


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
class StoreFigures:
    """The store that replicas share, and how many of its counters could not be read."""

    state: StoreState
    damaged: int


@dataclass(frozen=True, slots=True)
class UsageFigures:
    """How many usage records could not be kept, and how many wait for Redis."""

    lost: int
    waiting: int


@dataclass(frozen=True, slots=True)
class DeploymentFigures:
    """A deployment as it is now."""

    name: str
    zone: str
    up: bool
    status: DeploymentStatus
    members: Sequence[MemberStatus] = ()


def counted(metric: Described, values: Mapping[tuple[str, ...], float]) -> Metric:
    """A counter's samples, by the values of its labels."""
    family = CounterMetricFamily(metric.family, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def gauge(metric: Described, values: Mapping[tuple[str, ...], float]) -> Metric:
    """A gauge's."""
    family = GaugeMetricFamily(metric.family, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def histogram(metric: Described, values: Mapping[str, Histogram]) -> Metric:
    """A histogram's, by the value of its one label, or of none."""
    family = HistogramMetricFamily(metric.family, metric.help, labels=metric.labels)
    for name, kept in values.items():
        bounds = [*(f"{bound:g}" for bound in kept.buckets), "+Inf"]
        reached = accumulate(kept.counts)
        family.add_metric([name] if metric.labels else [], list(zip(bounds, reached, strict=True)), kept.total)
    return family


def of_deployments(deployments: list[DeploymentFigures]) -> Iterator[Metric]:
    """Of deployments and their replicas."""
    yield gauge(UP, {(d.name, d.zone): d.up for d in deployments})
    yield gauge(IN_FLIGHT, {(d.name,): d.status.in_flight for d in deployments})
    yield gauge(CIRCUIT_OPEN, {(d.name,): d.status.circuit != "closed" for d in deployments})
    members = [(d.name, member) for d in deployments for member in d.members]
    yield gauge(REPLICA_UP, {(name, str(member.ordinal)): member.up for name, member in members})
    yield gauge(REPLICA_IN_FLIGHT, {(name, str(member.ordinal)): member.in_flight for name, member in members})


def of_policy(policy: PolicyFigures) -> Iterator[Metric]:
    """Of the policy in use and its files."""
    yield gauge(POLICY_INFO, {(policy.path, policy.hash): 1})
    yield gauge(POLICY_LOADED, {(): policy.loaded_at})
    yield counted(POLICY_LOADS, {("success",): policy.loads, ("failure",): policy.failures})
    yield gauge(POLICY_IN_STEP, {(): not policy.errors})
    yield gauge(POLICY_ERRORS, {(): policy.errors})


def of_cache(counts: Counts, entries: int, size: int) -> Iterator[Metric]:
    """Of stored answers."""
    yield counted(CACHE_REQUESTS, {("hit",): counts.hits, ("miss",): counts.misses})
    yield counted(CACHE_STORES, {("stored",): counts.stores, ("too_large",): counts.too_large})
    yield counted(CACHE_UNAVAILABLE, {(): counts.unavailable})
    yield gauge(CACHE_ENTRIES, {(): entries})
    yield gauge(CACHE_BYTES, {(): size})


def of_store(store: StoreFigures) -> Iterator[Metric]:
    """Of the store that replicas share."""
    yield gauge(STORE_UP, {(): store.state.up})
    yield counted(STORE_FAILURES, {(): store.state.failures})
    yield gauge(STORE_REPLICAS, {(): store.state.replicas})
    yield gauge(STORE_DAMAGED, {(): store.damaged})


def of_keys(keys: KeyFigures) -> Iterator[Metric]:
    """Of callers' keys."""
    yield gauge(KEYS, {(standing,): count for standing, count in keys.standings.items()})
    yield counted(KEYS_LOADS, {("success",): keys.loads, ("failure",): keys.failures})
    yield gauge(KEYS_IN_STEP, {(): not keys.errors})


def of_usage(usage: UsageFigures) -> Iterator[Metric]:
    """Of the records for the invoice."""
    yield counted(USAGE_LOST, {(): usage.lost})
    yield gauge(USAGE_WAITING, {(): usage.waiting})
