"""The decision: gates remove with reasons, requirements rank, invariants cannot be relaxed by anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError, UnknownModel
from gateway.explain import explanation
from gateway.policy import Invariant, Match, Policy, Rule
from gateway.refusal import refusal
from gateway.routing import decide, next_attempt
from gateway.snapshot import DeploymentStatus
from gateway.types import Attempt, Capability, Outcome, RequestFacts, TokenCount
from tests.fakes import CLOUD, HOME, OTHER, deployment, policy, require, snapshot

DOWN = DeploymentStatus(down="circuit open", retry_after=7.0)


def facts(**given: Any) -> RequestFacts:
    values: dict[str, Any] = {"model": "auto", "prompt": TokenCount(bound=40, estimate=10)}
    return RequestFacts(**(values | given))


def chain(p: Policy, f: RequestFacts, **statuses: DeploymentStatus) -> list[str]:
    return [c.deployment for c in decide(p, f, snapshot(tuple(p.deployments), **statuses)).candidates]


def gates(p: Policy, f: RequestFacts, **statuses: DeploymentStatus) -> dict[str, str]:
    return {r.deployment: r.gate for r in decide(p, f, snapshot(tuple(p.deployments), **statuses)).rejections}


@pytest.mark.parametrize(
    ("asked", "gate"),
    [
        ({"deployments": frozenset({"home", "other"})}, "caller"),
        ({"labels": frozenset({"personal"})}, "zone"),
        ({"max_tokens": 970}, "window"),
        ({"prompt": TokenCount(bound=4000, estimate=1000, exact={"bytes": 950})}, "window"),
        ({"max_cost_nusd": 40_000}, "cost_cap"),
    ],
)
def test_each_gate_removes_with_its_reason(asked: dict[str, Any], gate: str) -> None:
    assert gates(policy(), facts(**asked))["cloud"] == gate


@pytest.mark.parametrize("capability", ["tools", "images", "schema"])
def test_a_missing_capability_removes(capability: Capability) -> None:
    bare = replace(CLOUD, capabilities=CLOUD.capabilities - {capability})
    assert gates(policy([HOME, bare]), facts(**{capability: True})) == {"cloud": "capability"}


def test_what_is_down_or_not_configured_is_removed_with_the_reason_it_gives() -> None:
    absent = replace(OTHER, unavailable="OTHER_KEY is not set")
    decision = decide(policy([HOME, CLOUD, absent]), facts(), snapshot(cloud=DOWN))
    assert {r.deployment: (r.gate, r.reason) for r in decision.rejections} == {
        "cloud": ("available", "circuit open"),
        "other": ("unconfigured", "OTHER_KEY is not set"),
    }


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("listed", ["home", "cloud", "other"]),
        ("marginal_cost", ["home", "other", "cloud"]),
        ("first_token", ["cloud", "home", "other"]),
    ],
)
def test_candidates_are_ordered_as_the_rule_says_unknowns_last(order: str, expected: list[str]) -> None:
    measured = {"home": DeploymentStatus(first_token_p95_ms=80.0), "cloud": DeploymentStatus(first_token_p95_ms=30.0)}
    assert chain(policy(order_by=order), facts(), **measured) == expected


def test_a_requirement_ranks_and_otherwise_orders_the_rest() -> None:
    p = policy(order_by="listed", require=require(slo=True), otherwise="fastest", unknown="ineligible")
    measured = {
        "home": DeploymentStatus(first_token_p95_ms=900.0),
        "cloud": DeploymentStatus(first_token_p95_ms=50.0),
        "other": DeploymentStatus(first_token_p95_ms=300.0),
    }
    assert chain(p, facts(slo="fast"), **measured) == ["cloud", "other", "home"]
    assert chain(p, facts(), **measured) == ["home", "cloud", "other"], "no class, nothing to require"


@pytest.mark.parametrize(("unknown", "expected"), [("eligible", ["home", "cloud"]), ("ineligible", ["cloud", "home"])])
def test_an_unmeasured_latency_is_what_the_policy_says_it_is(unknown: str, expected: list[str]) -> None:
    p = policy([HOME, CLOUD], order_by="listed", require=require(slo=True), unknown=unknown)
    assert chain(p, facts(slo="fast"), cloud=DeploymentStatus(first_token_p95_ms=50.0)) == expected


def test_otherwise_reject_removes_what_does_not_meet_the_requirement() -> None:
    p = policy([HOME, CLOUD], order_by="listed", require=require(cost_nusd=20_000), otherwise="reject")
    assert chain(p, facts()) == ["home"] and gates(p, facts()) == {"cloud": "require"}


def test_otherwise_cheapest_orders_the_rest_by_cost() -> None:
    p = policy(order_by="listed", require=require(cost_nusd=1), otherwise="cheapest")
    assert chain(p, facts()) == ["home", "other", "cloud"]


LONG = Rule("long", Match(does_not_fit=frozenset({"home"})), ("cloud",), because="longer than home's window")
STREAMS = Rule("streams", Match(stream=True), ("other",))


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({}, "default"),
        ({"stream": True}, "streams"),
        ({"stream": True, "max_tokens": 999}, "long"),
        ({"model": "streams"}, "streams"),
        ({"model": "alias"}, "streams"),
        ({"model": "cloud"}, "cloud"),
        ({"model": "default", "stream": True}, "default"),
    ],
)
def test_the_first_rule_that_matches_decides_and_a_name_enters_where_it_says(asked: dict[str, Any], rule: str) -> None:
    p = policy(rules=[LONG, STREAMS], models={"alias": "streams"})
    assert decide(p, facts(**asked), snapshot()).rule == rule


def test_an_unknown_model_is_an_error_that_does_not_repeat_it() -> None:
    with pytest.raises(UnknownModel) as caught:
        decide(policy(), facts(model="gpt-secret"), snapshot())
    assert "gpt-secret" not in caught.value.message


def test_why_a_rule_for_long_prompts_matched_is_part_of_the_answer() -> None:
    p = policy([HOME, replace(CLOUD, window=5000, unavailable="KEY is not set")], rules=[LONG])
    decision = decide(p, facts(max_tokens=999), snapshot())
    error = refusal(decision)
    assert (error.status, error.code) == (400, "context_length_exceeded")
    assert "40 prompt and 999 output tokens do not fit its window of 1000" in error.message
    assert "KEY is not set" in error.message


@pytest.mark.parametrize(("protected", "rule"), [("skip", "default"), ("refuse", "streams"), (None, "streams")])
def test_a_rule_without_a_place_for_protected_requests_skips_or_refuses(protected: Any, rule: str) -> None:
    p = policy([HOME, OTHER], rules=[replace(STREAMS, protected=protected)], default=["home"])
    decision = decide(p, facts(stream=True, labels=frozenset({"personal"})), snapshot())
    assert decision.rule == rule
    assert [c.deployment for c in decision.candidates] == (["home"] if rule == "default" else [])


@pytest.mark.parametrize(
    ("asked", "statuses", "status", "code"),
    [
        ({"deployments": frozenset()}, {}, 403, "not_allowed"),
        ({"labels": frozenset({"personal"}), "model": "cloud"}, {}, 403, "protected_refused"),
        ({"labels": frozenset({"personal"})}, {"home": DOWN}, 503, "no_deployment_available"),
        ({"max_tokens": 5000}, {}, 400, "context_length_exceeded"),
        ({"max_tokens": 5000, "labels": frozenset({"personal"})}, {}, 400, "context_length_exceeded"),
        ({"max_cost_nusd": 1}, {}, 402, "cost_cap_exceeded"),
        ({}, {"home": DOWN, "cloud": DOWN, "other": DOWN}, 503, "no_deployment_available"),
    ],
)
def test_what_a_caller_is_told_when_nothing_is_left(
    asked: dict[str, Any], statuses: dict[str, DeploymentStatus], status: int, code: str
) -> None:
    error = refusal(decide(policy(), facts(**asked), snapshot(**statuses)))
    assert (error.status, error.code) == (status, code)
    assert (error.retry_after == 7.0) == (status == 503)


def test_attempts_follow_the_chain_and_end_with_every_reason() -> None:
    decision = decide(policy(order_by="listed"), facts(labels=frozenset()), snapshot(other=DOWN))
    first = next_attempt(decision, [])
    second = next_attempt(decision, [Outcome(first, "cannot be reached")])
    assert (first, second) == (Attempt("home", 1), Attempt("cloud", 2))
    outcomes = [Outcome(first, "cannot be reached"), Outcome(second, "no first token in time", timed_out=True)]
    with pytest.raises(GatewayError) as caught:
        next_attempt(decision, outcomes)
    assert caught.value.status == 503
    for reason in ("home: cannot be reached", "cloud: no first token in time", "other: circuit open"):
        assert reason in caught.value.message


def test_a_chain_that_only_timed_out_is_a_deadline() -> None:
    decision = decide(policy([HOME]), facts(), snapshot())
    with pytest.raises(GatewayError) as caught:
        next_attempt(decision, [Outcome(Attempt("home", 1), "no first token in time", timed_out=True)])
    assert caught.value.status == 504


# Invariants over random policies, requests and fleets.

ZONES = ("on_premises", "us_cloud", "eu_cloud")
LABELS = ("personal", "secret", "unscannable")
NAMES = ("a", "b", "c", "d")

_zones = st.sets(st.sampled_from(ZONES), min_size=1).map(frozenset)
_labels = st.sets(st.sampled_from(LABELS)).map(frozenset)
_some_names = st.lists(st.sampled_from(NAMES), min_size=1, unique=True).map(tuple)
_deployments = st.tuples(
    *(
        st.builds(
            deployment,
            st.just(name),
            zone=st.sampled_from(ZONES),
            window=st.sampled_from([None, 50, 1000]),
            unavailable=st.sampled_from([None, None, "KEY is not set"]),
            capabilities=st.sets(st.sampled_from(["tools", "images", "schema"])).map(frozenset),
        )
        for name in NAMES
    )
)
TENANTS = ("acme", "other")
TAGS = ("hr", "legal")
_tenants = st.sets(st.sampled_from(TENANTS), max_size=1).map(frozenset)
_tags = st.sets(st.sampled_from(TAGS)).map(frozenset)
_an_invariant = st.builds(
    Invariant, st.uuids().map(str), _labels.filter(bool), _zones, _labels, tenant=_tenants
) | st.builds(Invariant, st.uuids().map(str), st.just(frozenset()), _zones, tenant=_tenants.filter(bool), key_tag=_tags)
_invariants = st.lists(_an_invariant, max_size=3)
_condition = st.builds(
    Match,
    any_label=_labels,
    does_not_fit=st.sets(st.sampled_from(NAMES), max_size=1).map(frozenset),
    stream=st.sampled_from([None, True, False]),
    tenant=_tenants,
)
_match = _condition | st.builds(Match, not_=_condition) | st.builds(Match, any_of=st.tuples(_condition, _condition))
_preferences = {
    "candidates": _some_names,
    "require": st.none() | st.builds(require, slo=st.booleans(), cost_nusd=st.none() | st.integers(1, 10**6)),
    "unknown": st.sampled_from(["eligible", "ineligible"]),
    "otherwise": st.sampled_from(["fastest", "cheapest", "reject"]),
    "order_by": st.sampled_from(["listed", "marginal_cost", "first_token"]),
    "protected": st.sampled_from([None, "refuse", "skip"]),
}
_rules = st.lists(st.builds(Rule, st.uuids().map(str), _match, **_preferences), max_size=4)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    made = policy(draw(_deployments), draw(_rules), invariants=draw(_invariants))
    default = draw(st.builds(Rule, st.just("default"), st.none(), **_preferences))
    return replace(made, default=default)


_facts = st.builds(
    RequestFacts,
    model=st.sampled_from(["auto", "default", *NAMES]),
    tenant=st.sampled_from(TENANTS),
    key_tags=_tags,
    labels=_labels,
    masked_labels=st.none() | _labels,
    prompt=st.builds(TokenCount, bound=st.integers(0, 2000), estimate=st.integers(0, 500)),
    max_tokens=st.none() | st.integers(1, 2000),
    stream=st.booleans(),
    tools=st.booleans(),
    images=st.booleans(),
    slo=st.sampled_from([None, "fast", "slow"]),
    max_cost_nusd=st.none() | st.integers(1, 10**6),
    deployments=st.none() | st.sets(st.sampled_from(NAMES)).map(frozenset),
)
_statuses = st.fixed_dictionaries(
    {
        name: st.builds(
            DeploymentStatus,
            down=st.sampled_from([None, None, None, "circuit open"]),
            first_token_p95_ms=st.none() | st.floats(1, 2000),
        )
        for name in NAMES
    }
)


@given(policies(), _facts, _statuses)
def test_no_candidate_is_outside_of_what_the_invariants_permit(p: Policy, f: RequestFacts, s: Any) -> None:
    for candidate in decide(p, f, snapshot(NAMES, **s)).candidates:
        zone = p.deployments[candidate.deployment].zone
        for invariant in p.invariants:
            if invariant.concerns(f) and zone not in invariant.stay_in:
                assert invariant.any_label & f.labels, "who is kept home for who they are is not freed by masking"
                assert f.masked_labels is not None and not invariant.any_label & f.masked_labels
                assert invariant.any_label & f.labels <= invariant.mask and candidate.note.startswith("masked")


@given(policies(), _facts, _statuses)
def test_a_decision_is_a_function_of_its_inputs(p: Policy, f: RequestFacts, s: Any) -> None:
    assert decide(p, f, snapshot(NAMES, **s)) == decide(p, f, snapshot(NAMES, **s))


@given(policies(), _facts, _statuses, _an_invariant)
def test_one_more_invariant_permits_nothing_more(p: Policy, f: RequestFacts, s: Any, one_more: Invariant) -> None:
    tighter = replace(p, invariants=(*p.invariants, one_more))
    for labels in (f.labels, one_more.any_label):
        labelled = replace(f, labels=labels)
        more, fewer = p.permit(labelled), tighter.permit(labelled)
        assert all(more.allows(zone) for zone in ZONES if fewer.allows(zone))
        assert all(more.passage(zone) for zone in ZONES if fewer.passage(zone))
        assert all(
            fewer.passage(p.deployments[c.deployment].zone)
            for c in decide(tighter, labelled, snapshot(NAMES, **s)).candidates
        )


def _chosen(p: Policy, f: RequestFacts, s: Any) -> tuple[str, set[str]]:
    decision = decide(p, f, snapshot(NAMES, **s))
    return decision.rule, {candidate.deployment for candidate in decision.candidates}


@given(policies(), _facts, _statuses, _an_invariant)
def test_an_invariant_more_adds_no_candidate_to_the_rule_that_decides(
    p: Policy, f: RequestFacts, s: Any, one_more: Invariant
) -> None:
    """Under `protected: skip` another rule may decide then; its candidates are all permitted, see above."""
    rule, candidates = _chosen(p, f, s)
    rule_then, candidates_then = _chosen(replace(p, invariants=(*p.invariants, one_more)), f, s)
    assert rule_then != rule or candidates_then <= candidates


@given(policies(), _facts, _statuses, _labels)
def test_a_label_more_adds_no_candidate_to_the_rule_that_decides(
    p: Policy, f: RequestFacts, s: Any, more: frozenset[str]
) -> None:
    """Another rule may match with the label, or no longer; its candidates are all permitted, see above."""
    left = None if f.masked_labels is None else f.masked_labels | more
    rule, candidates = _chosen(p, f, s)
    rule_then, candidates_then = _chosen(p, replace(f, labels=f.labels | more, masked_labels=left), s)
    assert rule_then != rule or candidates_then <= candidates


@given(policies(), _facts, _labels)
def test_one_more_label_permits_nothing_more(p: Policy, f: RequestFacts, more: frozenset[str]) -> None:
    some, many = p.permit(f), p.permit(replace(f, labels=f.labels | more))
    assert all(some.allows(zone) for zone in ZONES if many.allows(zone))


@given(policies(), _facts, _statuses)
def test_every_deployment_of_the_deciding_rule_is_ranked_or_rejected_with_a_reason(
    p: Policy, f: RequestFacts, s: Any
) -> None:
    decision = decide(p, f, snapshot(NAMES, **s))
    rule = p.rule_named(decision.rule)
    named = set(rule.candidates) if rule is not None else {f.model}
    told = {c.deployment for c in decision.candidates} | {r.deployment for r in decision.rejections}
    if decision.because != "every rule was skipped":
        assert named <= told
    assert not {c.deployment for c in decision.candidates} & {r.deployment for r in decision.rejections}
    assert all(rejection.reason for rejection in decision.rejections)


@given(policies(), _facts, _statuses)
def test_every_decision_can_be_told(p: Policy, f: RequestFacts, s: Any) -> None:
    decision = decide(p, f, snapshot(NAMES, **s))
    told = explanation(p, f, snapshot(tuple(p.deployments)), decision)
    assert told["rules"][-1]["rule"] == decision.rule
    assert (told["deployment"] is None) == ("refusal" in told)


@given(policies(), _facts, _statuses)
def test_a_failover_never_leaves_the_chain(p: Policy, f: RequestFacts, s: Any) -> None:
    decision = decide(p, f, snapshot(NAMES, **s))
    outcomes: list[Outcome] = []
    for candidate in decision.candidates:
        attempt = next_attempt(decision, outcomes)
        assert attempt.deployment == candidate.deployment
        outcomes.append(Outcome(attempt, "failed"))
    with pytest.raises(GatewayError):
        next_attempt(decision, outcomes)
