"""Metrics: what is counted, under which names, and that nobody can make their number grow."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.cache import Counts
from gateway.decision import Candidate, Decision
from gateway.metrics import (
    BUCKETS,
    METRICS,
    MOST_ROWS,
    MOST_TENANTS,
    OTHER,
    DeploymentFigures,
    KeyFigures,
    Metrics,
    PolicyFigures,
    StoreFigures,
    UsageFigures,
    table,
)
from gateway.snapshot import DeploymentStatus
from gateway.standing import MemberStatus
from gateway.store import StoreState
from gateway.telemetry import Moved, Record
from gateway.types import Attempt, Outcome, Replica, Usage

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def now() -> tuple[PolicyFigures, Iterable[DeploymentFigures]]:
    status = DeploymentStatus(circuit="open", in_flight=3, down="circuit open")
    policy = PolicyFigures("p.yaml", "0123456789ab", 1_800_000_000.0, loads=2, failures=1, errors=4)
    url = "http://engines:8000/v1"
    members = [
        MemberStatus(Replica(url, "10.0.0.7"), 0, up=True, in_flight=0, busy=None),
        MemberStatus(Replica(url, "10.0.0.9"), 2, up=False, in_flight=3, busy=0.5),
    ]
    return policy, [
        DeploymentFigures("home", "on_premises", True, DeploymentStatus()),
        DeploymentFigures("cloud", "us_cloud", False, status, members),
    ]


def record(deployment: str | None = "home", outcome: str = "ok", rule: str = "chat", **changed: object) -> Record:
    candidates = (Candidate("home", 100, 80.0, True), Candidate("cloud", 900, None, True))
    decision = Decision(
        rule, "", candidates, (), frozenset({"personal"}), "0123456789ab", slo="fast", first_token_by_ms=75.0
    )
    made = Record("r", "d", decision=decision, deployment=deployment, outcome=outcome, total_ms=420.0)
    for name, value in changed.items():
        setattr(made, name, value)
    return made


def scraped(metrics: Metrics) -> Samples:
    text = metrics.exposition().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, metric: str, /, **labels: str) -> float:
    return samples[metric, tuple(sorted(labels.items()))]


def test_an_answered_request_is_counted_with_its_tokens_cost_and_times() -> None:
    metrics = Metrics(now)
    usage = Usage(10, 5, cached_tokens=4)
    metrics.request(record(usage=usage, cost_nusd=2_000_000_000, marginal_nusd=110, first_token_ms=70.0))
    metrics.request(record(usage=usage, cost_nusd=1, marginal_nusd=90, first_token_ms=90.0))
    samples = scraped(metrics)
    assert value(samples, "hybridgate_requests_total", deployment="home", rule="chat", outcome="ok") == 2
    tokens = [value(samples, "hybridgate_tokens_total", deployment="home", kind=k) for k in ("prompt", "cached")]
    assert tokens == [20, 8]
    assert value(samples, "hybridgate_tokens_total", deployment="home", kind="completion") == 10
    assert value(samples, "hybridgate_cost_usd_total", deployment="home") == pytest.approx(2.000000001)
    assert value(samples, "hybridgate_marginal_cost_usd_total", deployment="home") == pytest.approx(2e-7)
    assert value(samples, "hybridgate_predicted_cost_usd_total", deployment="home") == pytest.approx(2e-7)
    assert value(samples, "hybridgate_first_token_seconds_bucket", deployment="home", le="0.075") == 1
    assert value(samples, "hybridgate_first_token_seconds_bucket", deployment="home", le="0.1") == 2
    assert value(samples, "hybridgate_first_token_seconds_sum", deployment="home") == pytest.approx(0.16)
    assert value(samples, "hybridgate_request_duration_seconds_bucket", deployment="home", le="+Inf") == 2
    assert value(samples, "hybridgate_first_token_forecasts_total", deployment="home", result="within") == 1
    assert value(samples, "hybridgate_first_token_forecasts_total", deployment="home", result="above") == 1
    assert value(samples, "hybridgate_labelled_requests_total", label="personal") == 2
    results = [value(samples, "hybridgate_slo_requests_total", slo="fast", result=r) for r in ("met", "missed")]
    assert results == [1, 1]


def test_a_failover_is_no_test_of_what_was_predicted() -> None:
    metrics = Metrics(now)
    metrics.request(record(failed=[Outcome(Attempt("cloud", 1), "reset")], first_token_ms=900.0))
    assert value(scraped(metrics), "hybridgate_first_token_forecasts_total", deployment="home", result="above") == 0


def test_replicas_are_counted_by_their_ordinal() -> None:
    metrics = Metrics(now)
    metrics.request(record(replica=1, moved=[Moved("home", 0, "reset")], first_token_ms=900.0))
    metrics.request(record(replica=1))
    samples = scraped(metrics)
    assert value(samples, "hybridgate_replica_answers_total", deployment="home", replica="1") == 2
    assert value(samples, "hybridgate_replica_moves_total", deployment="home", replica="0") == 1
    assert value(samples, "hybridgate_first_token_forecasts_total", deployment="home", result="above") == 0
    ups = [value(samples, "hybridgate_replica_up", deployment="cloud", replica=r) for r in ("0", "2")]
    assert ups == [1, 0] and value(samples, "hybridgate_replica_in_flight", deployment="cloud", replica="2") == 3


def test_failovers_refusals_and_what_the_door_stops_are_counted() -> None:
    metrics = Metrics(now)
    metrics.request(record("cloud", failed=[Outcome(Attempt("home", 1), "reset")]))
    metrics.request(record(None, "no_deployment_available"))
    metrics.request(record(None, "egress_denied"))
    metrics.request(Record("r", "d", outcome="invalid_value"))
    samples = scraped(metrics)
    assert value(samples, "hybridgate_failovers_total", deployment="home") == 1
    assert value(samples, "hybridgate_egress_denied_total") == 1
    refused = {"deployment": "", "rule": "chat", "outcome": "no_deployment_available"}
    assert value(samples, "hybridgate_requests_total", **refused) == 1
    assert value(samples, "hybridgate_requests_total", deployment="", rule="", outcome="invalid_value") == 1
    assert ("hybridgate_tokens_total", (("deployment", ""), ("kind", "prompt"))) not in samples


def test_the_state_of_deployments_and_policy_is_told_as_it_is_when_asked() -> None:
    samples = scraped(Metrics(now))
    assert value(samples, "hybridgate_deployment_up", deployment="home", zone="on_premises") == 1
    assert value(samples, "hybridgate_deployment_up", deployment="cloud", zone="us_cloud") == 0
    assert value(samples, "hybridgate_deployment_in_flight", deployment="cloud") == 3
    assert value(samples, "hybridgate_deployment_circuit_open", deployment="cloud") == 1
    assert value(samples, "hybridgate_policy_info", path="p.yaml", hash="0123456789ab") == 1
    assert value(samples, "hybridgate_policy_loaded_timestamp_seconds") == 1_800_000_000
    assert value(samples, "hybridgate_policy_loads_total", result="success") == 2
    assert value(samples, "hybridgate_policy_loads_total", result="failure") == 1
    assert value(samples, "hybridgate_policy_last_load_successful") == 0
    assert value(samples, "hybridgate_policy_errors") == 4


def test_every_metric_is_told_under_the_name_and_labels_that_are_documented() -> None:
    metrics = Metrics(now)
    metrics.keys = lambda: KeyFigures({"valid": 2, "expired": 0, "revoked": 1}, loads=1, failures=0, errors=0)
    metrics.cache = lambda: (Counts(hits=2, misses=1, stores=1), 1, 700)
    metrics.store = lambda: StoreFigures(StoreState(replicas=3), damaged=1)
    metrics.usage = lambda: UsageFigures(lost=0, waiting=2)
    moved = [Moved("home", 1, "cannot be reached")]
    failed = [Outcome(Attempt("home", 1), "x")]
    metrics.request(record(usage=Usage(1, 1), first_token_ms=1.0, failed=failed, moved=moved, replica=0, tenant="acme"))
    told = {
        (sample.name.removesuffix("_bucket"), tuple(sorted(sample.labels.keys() - {"le"})))
        for family in text_string_to_metric_families(metrics.exposition().decode())
        if family.name.startswith("hybridgate")
        for sample in family.samples
        if not (family.type == "histogram" and sample.name.endswith(("_sum", "_count")))
    }
    assert told == {(metric.name, tuple(sorted(metric.labels))) for metric in METRICS}


def test_names_follow_prometheus_conventions() -> None:
    for metric in METRICS:
        assert metric.name.startswith("hybridgate_") and metric.help.endswith(".")
        assert metric.name.endswith("_total") is (metric.kind == "counter")
        assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert {0.05, 0.1, 1.0} <= set(BUCKETS), "the shipped classes are bounds of buckets"


def test_the_number_of_series_has_a_bound_and_no_request_is_lost() -> None:
    metrics = Metrics(now)
    for number in range(MOST_ROWS + 500):
        metrics.request(record(rule=f"rule {number}"))
    counts = {
        labels: value for (name, labels), value in scraped(metrics).items() if name == "hybridgate_requests_total"
    }
    assert len(counts) == MOST_ROWS + 1 and sum(counts.values()) == MOST_ROWS + 500
    beyond = {"deployment": "home", "rule": OTHER, "outcome": OTHER}
    assert counts[tuple(sorted(beyond.items()))] == 500


def test_the_documentation_lists_them() -> None:
    assert table() in (Path(__file__).parents[2] / "gateway" / "README.md").read_text()


def test_a_tenants_sums_leave_out_what_a_stored_answer_did_not_cost() -> None:
    metrics = Metrics(now)
    metrics.request(record(tenant="acme", usage=Usage(7, 3), cost_nusd=2_000_000_000))
    metrics.request(record(tenant="acme", usage=Usage(7, 3), cost_nusd=0, cache="hit"))
    told, acme = scraped(metrics), (("tenant", "acme"),)
    assert told["hybridgate_tenant_requests_total", acme] == 2
    assert told["hybridgate_tenant_tokens_total", acme] == 10
    assert told["hybridgate_tenant_cost_usd_total", acme] == 2.0


def test_tenants_beyond_the_most_are_one() -> None:
    metrics = Metrics(now)
    for number in range(MOST_TENANTS + 5):
        metrics.request(record(tenant=f"t{number}"))
    named = [labels for name, labels in scraped(metrics) if name == "hybridgate_tenant_requests_total"]
    assert len(named) == MOST_TENANTS + 1
    assert scraped(metrics)["hybridgate_tenant_requests_total", (("tenant", OTHER),)] == 5


@pytest.mark.parametrize(("tokens", "count"), [(1, 0), (11, 1)])
def test_the_time_between_tokens_is_of_streams_with_more_than_one(tokens: int, count: int) -> None:
    metrics = Metrics(now)
    metrics.request(record(usage=Usage(1, tokens), first_token_ms=100.0, total_ms=200.0, decided_ms=0.3))
    told = scraped(metrics)
    there = (("deployment", "home"),)
    assert told["hybridgate_per_token_seconds_count", there] == count
    assert told["hybridgate_per_token_seconds_sum", there] == pytest.approx(0.01 * count)
    assert told["hybridgate_decision_seconds_bucket", (("le", "0.0005"),)] == 1
    assert told["hybridgate_decision_seconds_bucket", (("le", "0.00025"),)] == 0
