"""How candidates are ordered: shares that stick, orders by time and by a weighted sum, classes with three times."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from gateway.decision import Decision
from gateway.policy import Slo
from gateway.routing import HURRY, LAST_LOOK, UNMEASURED_MS, decide, look_again, patience
from gateway.snapshot import Backlog, DeploymentStatus, Snapshot
from gateway.types import Attempt, Outcome, RequestFacts, TokenCount
from tests.fakes import CLOUD, HOME, policy, require

SHARES = {"home": 70.0, "cloud": 30.0, "other": 0.0}
MEASURED = {
    "home": DeploymentStatus(first_token_p95_ms=50.0, per_token_p95_ms=40.0),
    "cloud": DeploymentStatus(first_token_p95_ms=300.0, per_token_p95_ms=5.0),
    "other": DeploymentStatus(first_token_p95_ms=150.0, per_token_p95_ms=20.0),
}


def facts(**given: Any) -> RequestFacts:
    values: dict[str, Any] = {"model": "auto", "prompt": TokenCount(40, 10), "max_tokens": 100}
    return RequestFacts(**(values | given))


def chain(of: Any, asked: RequestFacts, draw: float = 0.0, **statuses: DeploymentStatus) -> list[str]:
    known = {name: statuses.get(name, DeploymentStatus()) for name in of.deployments}
    return [c.deployment for c in decide(of, asked, Snapshot(0.0, draw, known)).candidates]


def test_weights_give_each_candidate_its_share_and_the_rest_follow_in_order() -> None:
    weighted = policy(order_by="listed", weights=SHARES)
    first = Counter(chain(weighted, facts(), draw / 1000)[0] for draw in range(1000))
    assert first == {"home": 700, "cloud": 300}
    assert chain(weighted, facts(), 0.9) == ["cloud", "home", "other"]


@pytest.mark.parametrize(("sticky", "by"), [("key", "key_id"), ("tenant", "tenant")])
def test_a_draw_that_sticks_is_the_same_for_all_requests_of_one_and_has_its_shares_over_many(
    sticky: Any, by: str
) -> None:
    weighted = policy(order_by="listed", weights=SHARES, sticky=sticky)
    first = Counter(chain(weighted, facts(**{by: f"k{number}"}))[0] for number in range(2000))
    assert first["home"] / 2000 == pytest.approx(0.7, abs=0.04) and first["other"] == 0
    for number in range(20):
        one = facts(**{by: f"k{number}"})
        assert len({chain(weighted, one, draw / 10)[0] for draw in range(10)}) == 1


def test_who_is_drawn_goes_first_only_if_it_is_there_and_meets_what_is_required() -> None:
    weighted = policy(order_by="listed", weights=SHARES, require=require(slo=True))
    down = DeploymentStatus(down="circuit open")
    assert chain(weighted, facts(), 0.9, cloud=down) == ["home", "other"]
    assert chain(weighted, facts(slo="fast"), 0.9, **MEASURED) == ["home", "other", "cloud"]


def weighing(**terms: float) -> dict[str, Any]:
    return {"order_by": "weighted", "order_weights": terms}


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ({"order_by": "total_latency"}, ["cloud", "other", "home"]),
        ({"order_by": "weighted", "order_weights": {"first_token": 1.0}}, ["home", "other", "cloud"]),
        ({"order_by": "weighted", "order_weights": {"marginal_cost": 1.0}}, ["home", "other", "cloud"]),
        (
            {"order_by": "weighted", "order_weights": {"marginal_cost": 1.0, "total_latency": 1.0}},
            ["cloud", "other", "home"],
        ),
    ],
)
def test_orders_by_time_and_by_a_weighted_sum(order: dict[str, Any], expected: list[str]) -> None:
    assert chain(policy(**order), facts(), 0.0, **MEASURED) == expected


@pytest.mark.parametrize(
    ("slo", "first"),
    [(Slo("c", 60.0), "home"), (Slo("c", None, total_p95_ms=900.0), "cloud"), (Slo("c", None, None, 10.0), "cloud")],
)
def test_a_class_may_limit_the_first_token_the_whole_answer_or_each_token(slo: Slo, first: str) -> None:
    of = replace(policy(order_by="listed", require=require(slo=True)), slo={"c": slo})
    decision = decide(of, facts(slo="c"), Snapshot(0.0, 0.0, MEASURED))
    assert decision.candidates[0].deployment == first
    assert [c.meets for c in decision.candidates] == [True, False, False]
    assert all("c requires" in c.note for c in decision.candidates[1:])


def test_a_rules_class_counts_for_requests_that_name_none() -> None:
    of = policy(order_by="listed", require=require(slo=True), slo="fast")
    assert decide(of, facts(), Snapshot(0.0, 0.0, MEASURED)).slo == "fast"
    assert decide(of, facts(slo="slow"), Snapshot(0.0, 0.0, MEASURED)).slo == "slow"


def test_a_rule_replaces_the_timeouts_that_it_names() -> None:
    decision = decide(policy([HOME, CLOUD], timeouts={"first_token": 2.0}), facts(), Snapshot(0.0, 0.0, MEASURED))
    assert HOME.timeouts.replaced(decision.timeouts) == replace(HOME.timeouts, first_token=2.0)


def test_an_answer_is_likely_as_long_as_the_callers_were_and_never_longer_than_it_may() -> None:
    def cost(asked: RequestFacts) -> int | None:
        return decide(policy([HOME]), asked, Snapshot(0.0, 0.0, MEASURED)).candidates[0].cost_nusd

    assert cost(facts(likely_output=5)) == 10 * 20 + 5 * 80
    assert cost(facts(likely_output=500)) == cost(facts()) == 10 * 20 + 100 * 80


# An engine's queue is left while another candidate can still be in time.

QUEUED = Backlog(at=0.0, good_until=1.0, tokens=600.0, prefill_tokens_per_s=1000.0, step_s=0.0, step_tokens=1)
CLASSES = policy([HOME, CLOUD], order_by="marginal_cost", require=require(slo=True))


def queued(tokens: float = 700.0, cloud_ms: float | None = 100.0, **given: Any) -> Decision:
    """Of a class that wants its first token within a second; the engine's forecasts are wrong by half of them."""
    known = {
        "home": DeploymentStatus(backlog=replace(QUEUED, tokens=tokens)),
        "cloud": DeploymentStatus(first_token_p95_ms=cloud_ms),
    }
    return decide(CLASSES, facts(**({"slo": "slow", "stream": True} | given)), Snapshot(0.0, 0.0, known))


@pytest.mark.parametrize(
    ("decision", "first"),
    [
        (queued(tokens=300.0), "home"),  # 465 ms with the margin
        (queued(), "home"),  # 710 ms are a risk, and 850 ms from now the cloud is still in time
        (queued(tokens=900.0), "cloud"),  # it would be left for sure
        (queued(stream=False), "cloud"),  # nobody sees the first token of a plain answer
        (queued(cloud_ms=600.0), "cloud"),  # no time is left for the cloud
    ],
)
def test_an_engine_that_may_be_late_goes_first_where_its_queue_can_be_left_in_time(
    decision: Decision, first: str
) -> None:
    assert decision.candidates[0].deployment == first


def test_a_requirement_that_is_not_about_the_first_token_is_not_met_by_leaving() -> None:
    dear = replace(CLASSES, default=replace(CLASSES.default, require=require(slo=True, cost_nusd=10)))
    known = {"home": DeploymentStatus(backlog=QUEUED), "cloud": DeploymentStatus(first_token_p95_ms=100.0)}
    decision = decide(dear, facts(slo="slow", stream=True), Snapshot(0.0, 0.0, known))
    assert all(not c.meets and c.note.startswith("cost") for c in decision.candidates)


def test_patience_ends_when_the_next_one_needs_what_is_left() -> None:
    for passed_ms in (0.0, 500.0):
        found = patience(queued(), (), passed_ms)
        assert found is not None
        assert found.left_s == pytest.approx(HURRY * 0.1)
        assert found.after_s == pytest.approx(1.0 - passed_ms / 1000 - found.left_s)
    tried = Outcome(Attempt("home", 1), "failed")
    for decision, outcomes, passed_ms in [
        (queued(), (), 900.0),  # the next one would be late as well
        (queued(), (tried,), 0.0),  # the last one
        (queued(tokens=900.0), (), 0.0),  # the first is no engine
        (queued(slo=None), (), 0.0),  # nobody said when
        (queued(labels=frozenset({"personal"})), (), 0.0),  # it must stay
    ]:
        assert patience(decision, outcomes, passed_ms) is None


def test_a_queue_is_left_for_a_next_one_that_was_never_measured_where_there_is_time_to_try() -> None:
    known = {"home": DeploymentStatus(backlog=replace(QUEUED, tokens=100.0)), "cloud": DeploymentStatus()}
    for limit_s, left_s in ((0.9, UNMEASURED_MS / 1000), (10.0, 5.0)):
        of = replace(CLASSES, slo={"slow": Slo("slow", 1000 * limit_s)})
        found = patience(decide(of, facts(slo="slow", stream=True), Snapshot(0.0, 0.0, known)), (), 100.0)
        assert found is not None
        assert (found.after_s, found.left_s) == pytest.approx((limit_s - 0.1 - left_s, left_s))
    assert patience(queued(tokens=100.0, cloud_ms=None), (), 600.0) is None, "too short for that"


def test_a_queue_is_looked_at_again_until_half_of_the_next_ones_time_is_left() -> None:
    looked = patience(queued(), (), 0.0)
    at, left = 0.0, []
    while looked is not None:
        at += looked.after_s
        left.append(looked.left_s)
        assert at + looked.left_s == pytest.approx(1.0), "what has passed and what is left are all there is"
        looked = look_again(looked)
    assert left == sorted(left, reverse=True) and len(left) > 2
    assert 0.05 <= left[-1] < 0.05 / 0.7 and left[0] * LAST_LOOK == pytest.approx(0.05)


THREE = {name: Slo(name, limit) for name, limit in (("fast", 200.0), ("slow", 1000.0), ("last", 5000.0))}


@pytest.mark.parametrize(
    ("tokens", "late", "priority"),
    [
        (100.0, False, 0),  # 120 ms
        (180.0, False, 0),  # 200 ms: a risk, but it may be in time
        (300.0, True, 2),  # as one of the next class
        (800.0, True, 4),  # 820 ms: the next class would be met, if nobody came who goes before it
        (2000.0, True, 4),
        (20_000.0, True, 6),  # after all classes, and before those that could go elsewhere
    ],
)
def test_who_would_be_late_all_the_same_is_served_as_one_of_a_class_that_can_be_met(
    tokens: float, late: bool, priority: int
) -> None:
    of = replace(policy([HOME, CLOUD], require=require(slo=True)), slo=THREE)
    asked = facts(slo="fast", labels=frozenset({"personal"}), stream=True)
    known = {"home": DeploymentStatus(backlog=replace(QUEUED, tokens=tokens)), "cloud": DeploymentStatus()}
    decision = decide(of, asked, Snapshot(0.0, 0.0, known))
    assert (decision.late, decision.priority) == (late, priority)
    assert [c.deployment for c in decision.candidates] == ["home"]
    assert decision.first_token_by_ms == 200.0 and decision.slo == "fast", "what it asked for does not change"


def test_who_could_be_in_time_elsewhere_keeps_its_place() -> None:
    decision = queued(tokens=5000.0)
    assert decision.candidates[0].deployment == "cloud" and not decision.late


def test_the_class_for_a_time_is_the_strictest_that_it_meets() -> None:
    of = replace(policy([HOME]), slo=dict(reversed(THREE.items())))
    assert [of.class_for(ms) for ms in (1.0, 200.0, 200.1, 5000.0, 5001.0)] == ["fast", "fast", "slow", "last", None]


@pytest.mark.parametrize("price", [inf, -inf, nan])
def test_a_price_of_an_engine_second_that_is_no_number_is_none(price: float) -> None:
    known = {"home": DeploymentStatus(backlog=QUEUED, engine_second_nusd=price, rooms=((0, 1.0, False),))}
    decision = decide(policy([HOME]), facts(), Snapshot(0.0, 0.0, known))
    assert decision.candidates[0].congestion_nusd == 0
