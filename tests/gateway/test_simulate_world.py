"""Requests through a simulated world: by hand, and whatever happens to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.simulate.cloud import CloudModel, Quantiles, RateLimit, weather
from gateway.simulate.mix import Request
from gateway.simulate.routers import AlwaysCloud, AlwaysLocal, PolicyRouter, RoundRobin, Router, Threshold, baselines
from gateway.simulate.score import quantile, score
from gateway.simulate.world import Record, Run, World, simulate
from tests.worlds import ENGINE, STEADY, asked, small_policy, world

LISTED = small_policy(require=None, order_by="listed")


def by_policy(of: World) -> Run:
    return simulate(of, PolicyRouter("policy", of.policy))


def always(of: World, router: type[AlwaysLocal] | type[AlwaysCloud]) -> Run:
    return simulate(of, router(router.__name__, of.policy, ["home"], ["cloud"]))


def test_three_requests_by_hand() -> None:
    """An engine with steps of 10 ms, 1 ms a prompt token and 2 ms a decoding sequence; a cloud with its first token
    after 200 ms and 10 ms for each other.

    The first step computes the first prompt (0 to 110 ms). The second request came meanwhile: its 80 tokens are
    computed in a step in which the first decodes (110 to 202 ms). Both decode (202 to 216 ms), which ends the first;
    then the second alone (216 to 228 ms). The third finds the engine idle.
    """
    of = world([asked(0.0, 100), asked(0.05, 80), asked(1.0, 100)])
    local = always(of, AlwaysLocal).records
    assert [r.first_s for r in local] == [pytest.approx(t) for t in (0.110, 0.202 - 0.05, 0.110)]
    assert [r.total_s for r in local] == [pytest.approx(t) for t in (0.216, 0.228 - 0.05, 0.134)]
    cloud = always(of, AlwaysCloud).records
    assert [r.first_s for r in cloud] == [pytest.approx(0.2)] * 3
    assert [r.total_s for r in cloud] == [pytest.approx(0.22)] * 3
    assert [r.cost_nusd for r in local] == [tokens * 20 + 3 * 80 for tokens in (100, 80, 100)]
    assert [r.cost_nusd for r in cloud] == [tokens * 150 + 3 * 600 for tokens in (100, 80, 100)]


def test_private_requests_stay_home_whoever_decides() -> None:
    of = world([asked(i / 10, private=i % 2 == 0) for i in range(40)])
    routers: list[Router] = [PolicyRouter("policy", of.policy), *baselines(of.policy, ["home"], ["cloud"])]
    for router in routers:
        own = score(of, simulate(of, router))
        assert own.violations == 0, router.name


def test_a_violation_is_counted_from_what_ran() -> None:
    """A router that ignores the invariants is caught by the world, whatever its decision says."""

    class Careless(AlwaysCloud):
        def decide(self, facts: Any, snapshot: Any) -> Any:
            return super().decide(replace(facts, labels=frozenset()), snapshot)

    of = world([asked(0.0, private=True), asked(0.1)])
    assert score(of, simulate(of, Careless("careless", of.policy, ["home"], ["cloud"]))).violations == 1


def test_an_outage_is_failed_over_and_opens_the_circuit() -> None:
    down = replace(STEADY, outages=((1.0, 3.0),), fails_after_s=0.1)
    of = world([asked(i * 0.5) for i in range(12)], cloud=down)
    run = always(of, AlwaysCloud)
    places = [record.deployment for record in run.records]
    assert places == ["cloud"] * 2 + ["home"] * 7 + ["cloud"] * 3
    assert run.records[2].failed == ("cloud",) and run.records[2].first_s == pytest.approx(0.1 + 0.11)
    assert run.records[5].failed == ()  # the circuit is open: not even tried
    assert score(of, run).failovers == 3


def test_a_rate_limit_sends_elsewhere_until_the_minute_has_passed() -> None:
    full = replace(STEADY, requests_per_minute=3)
    of = world([asked(i * 10.0) for i in range(9)], cloud=full)
    places = [record.deployment for record in always(of, AlwaysCloud).records]
    assert places == ["cloud", "cloud", "cloud", "home", "home", "home", "cloud", "cloud", "cloud"]


def test_tokens_are_limited_over_the_last_minute() -> None:
    limit = RateLimit(CloudModel(tokens_per_minute=100))
    assert limit.admit(60, 0.0) is None
    assert limit.admit(60, 20.0) == pytest.approx(40.0)
    assert limit.admit(40, 20.0) is None
    assert limit.admit(60, 60.0) is None
    assert RateLimit(CloudModel(tokens_per_minute=100)).admit(500, 0.0) is None  # one alone, however long


def test_an_engine_refuses_what_comes_too_late_and_the_cloud_takes_it() -> None:
    """Class fast wants its first token within 100 ms; a prompt of 80 takes 90, one behind it misses."""
    of = world([asked(0.0, slo=None), asked(2.0, 80, slo="fast"), asked(2.001, 80, slo="fast")], of=LISTED)
    records = by_policy(of).records
    assert [record.deployment for record in records] == ["home", "home", "cloud"]


def test_a_queue_is_left_in_time_for_the_cloud_unless_the_first_token_is_about_to_come() -> None:
    """Class slow wants its first token within a second, and a cloud needs 200 ms. What is predicted when it is sent is
    that it comes in time; then others come who go first."""
    known = [asked(0.0, slo="slow"), *(asked(1.0, 90, slo="slow") for _ in range(40))]  # how fast both are
    long = [asked(10.0, 90, slo="slow") for _ in range(5)]
    first = [asked(10.001 + 0.001 * i, 90, slo="slow", private=True) for i in range(7)]
    records = by_policy(world([*known, *long, *first])).records[len(known) :]
    left = [record for record in records if record.failed]
    assert left and all(record.deployment == "cloud" and record.failed == ("home",) for record in left)
    assert all(record.first_s is not None and 0.7 <= record.first_s <= 1.0 for record in left)
    assert len([record for record in records if record.deployment == "home"]) > len(first), "who is nearly there stays"


def test_a_first_token_that_does_not_come_in_time_is_given_up() -> None:
    slow = world([asked(0.0)], cloud=replace(STEADY, first_token=Quantiles(100.0, 100.0)))
    record = always(slow, AlwaysCloud).records[0]
    assert (record.deployment, record.failed) == ("home", ("cloud",))
    assert record.first_s == pytest.approx(60.0 + 0.11)


def test_a_refusal_has_the_status_that_the_server_would_answer() -> None:
    of = world([asked(0.0, 2000, private=True), asked(0.0, 400, private=True)], cloud=STEADY)
    records = by_policy(of).records
    assert [(record.status, record.code) for record in records] == [(400, "context_length_exceeded"), (200, "")]


def test_a_plain_answer_is_there_when_it_is_whole() -> None:
    request = asked(0.0)
    plain = replace(request, facts=replace(request.facts, stream=False))
    record = always(world([plain]), AlwaysCloud).records[0]
    assert record.first_s == record.total_s == pytest.approx(0.22)


def test_a_threshold_fills_the_engine_up_to_it() -> None:
    of = world([asked(i / 1000, 100, 50) for i in range(6)])
    run = simulate(of, Threshold("threshold 2", of.policy, ["home"], ["cloud"], 2))
    assert [record.deployment for record in run.records] == ["home"] * 2 + ["cloud"] * 4


def test_round_robin_takes_turns_among_those_that_may_answer() -> None:
    of = world([asked(float(i), private=i == 2) for i in range(4)])
    run = simulate(of, RoundRobin("round robin", of.policy, ["home"], ["cloud"]))
    assert [record.deployment for record in run.records] == ["home", "cloud", "home", "cloud"]


def test_always_local_queues_what_a_real_engine_would_refuse() -> None:
    of = world([asked(0.0, 50, 2, private=True) for _ in range(40)], engine=replace(ENGINE, max_waiting=5))
    assert score(of, always(of, AlwaysLocal)).refused == 0
    assert score(of, always(of, AlwaysCloud)).refused > 20


def test_the_score_by_hand() -> None:
    of = world([asked(0.0, slo="slow"), asked(1.0, slo="fast"), asked(2.0)])
    own = score(of, always(of, AlwaysCloud))
    assert own.met == pytest.approx(2 / 3)  # 200 ms: fast wants 100, slow 1000, none is content
    assert {name: told.met for name, told in own.classes.items()} == {"fast": 0.0, "slow": 1.0, "no class": 1.0}
    assert own.classes["fast"].first_token_p50_ms == pytest.approx(200.0)
    assert (own.local, own.spilled, own.used, own.worth) == (0.0, 1.0, 0.0, 0.0)
    local = score(of, always(of, AlwaysLocal))
    assert local.local == 1.0
    assert local.worth == pytest.approx(3 * ENGINE.least_s(100, 3) / 2.1, rel=0.1)


@pytest.mark.parametrize(("q", "value"), [(0.5, 2.0), (0.95, 4.0), (0.25, 1.0), (0.0, 1.0)])
def test_quantiles_are_numbers_that_occurred(q: float, value: float) -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], q) == value
    assert quantile([], q) is None


def test_weather_is_the_same_for_all_who_ask_with_the_seed() -> None:
    requests = [asked(float(i), index=i) for i in range(3)]
    windy = {"cloud": CloudModel()}
    assert weather(windy, requests, 1) == weather(windy, requests, 1) != weather(windy, requests, 2)
    more = weather({"other": CloudModel(), **windy}, requests, 1)
    assert more["cloud"] == weather(windy, requests, 1)["cloud"]


def test_a_clouds_quantiles_are_as_stated() -> None:
    requests = [asked(0.0, index=i) for i in range(4000)]
    drawn = sorted(luck.first_s for luck in weather({"c": CloudModel(Quantiles(0.3, 0.9))}, requests, 0)["c"])
    assert drawn[2000] == pytest.approx(0.3, rel=0.05)
    assert drawn[3800] == pytest.approx(0.9, rel=0.1)


REQUESTS = st.lists(
    st.builds(
        asked,
        st.floats(0, 5),
        st.integers(1, 400),
        st.integers(1, 60),
        slo=st.sampled_from([None, "fast", "slow"]),
        private=st.booleans(),
    ),
    min_size=1,
    max_size=25,
)
CLOUDS = st.builds(
    CloudModel,
    first_token=st.just(Quantiles(0.1, 0.4)),
    per_token=st.just(Quantiles(0.01, 0.02)),
    requests_per_minute=st.sampled_from([None, 1, 5]),
    outages=st.sampled_from([(), ((0.5, 1.5),)]),
    failure_share=st.sampled_from([0.0, 0.3]),
)


def all_routers(of: World) -> list[Router]:
    cheapest = small_policy(require=None)
    return [
        PolicyRouter("policy", of.policy),
        PolicyRouter("by cost alone", replace(of.policy, default=cheapest.default)),
        *baselines(of.policy, ["home"], ["cloud"]),
    ]


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, cloud=CLOUDS, seed=st.integers(0, 3), waiting=st.sampled_from([2, 256]))
def test_every_request_ends_exactly_once_and_private_ones_at_home(
    requests: Sequence[Request], cloud: CloudModel, seed: int, waiting: int
) -> None:
    of = world(requests, cloud=cloud, seed=seed, engine=replace(ENGINE, max_waiting=waiting))
    for router in all_routers(of):
        run = simulate(of, router)
        assert [record.index for record in run.records] == list(range(len(requests)))
        assert all(_sound(record) for record in run.records)
        own = score(of, run)
        assert own.violations == 0
        assert own.local + own.spilled + own.refused / own.requests == pytest.approx(1.0)
        for record in run.records:
            if of.requests[record.index].facts.labels:
                assert set(record.ran_on) <= {"home"}


def _sound(record: Record) -> bool:
    if record.status == 200:
        assert record.first_s is not None and record.total_s is not None
        return record.deployment == record.ran_on[-1] and 0 < record.first_s <= record.total_s
    return record.status in (400, 403, 503, 504) and record.deployment is None and record.cost_nusd == 0


@settings(max_examples=20, deadline=None)
@given(requests=REQUESTS, cloud=CLOUDS, seed=st.integers(0, 3))
def test_the_same_seed_gives_the_same_world(requests: Sequence[Request], cloud: CloudModel, seed: int) -> None:
    first, second = (by_policy(world(requests, cloud=cloud, seed=seed)) for _ in range(2))
    assert first == second
