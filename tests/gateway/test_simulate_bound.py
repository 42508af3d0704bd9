"""The lower bound: no router in any small world pays less, or attains more; where it is known by hand it is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.decision import Candidate, Decision
from gateway.policy import Slo
from gateway.simulate.bound import Bounds, NoBound
from gateway.simulate.cloud import CloudModel, Quantiles
from gateway.simulate.compare import compared
from gateway.simulate.mix import Request
from gateway.simulate.routers import PolicyRouter, Router, baselines
from gateway.simulate.score import Score, score
from gateway.simulate.step import EngineModel
from gateway.simulate.world import World, simulate
from gateway.snapshot import Snapshot
from gateway.types import RequestFacts
from tests.worlds import ENGINE, STEADY, asked, small_policy, world

ENGINES = st.builds(
    EngineModel,
    fixed_s=st.sampled_from([0.0005, 0.01, 0.05]),
    per_prompt_token_s=st.sampled_from([0.0001, 0.001, 0.003]),
    per_sequence_s=st.sampled_from([0.0, 0.002]),
    per_cached_token_s=st.sampled_from([0.0, 1e-5]),
    num_blocks=st.sampled_from([10, 64]),
    max_batch_tokens=st.sampled_from([8, 32, 200]),
    max_running=st.sampled_from([2, 16]),
    max_waiting=st.sampled_from([3, 256]),
    window=st.just(1000),
)
CLOUDS = st.builds(
    CloudModel,
    first_token=st.sampled_from([Quantiles(0.05, 0.2), Quantiles(0.3, 1.2)]),
    per_token=st.just(Quantiles(0.01, 0.02)),
    requests_per_minute=st.sampled_from([None, 4]),
    outages=st.sampled_from([(), ((0.5, 1.5),)]),
    failure_share=st.sampled_from([0.0, 0.3]),
)
REQUESTS = st.lists(
    st.builds(
        asked,
        st.floats(0, 3),
        st.integers(1, 120),
        st.integers(1, 40),
        slo=st.sampled_from([None, "fast", "slow"]),
        private=st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


UNLIKE = frozenset(f"threshold {most}" for most in (1, 4, 16, 32, 64, 128, 256))  # two are enough here


def routers_of(of: World) -> list[Router]:
    rules = [small_policy(), small_policy(order_by="listed", require=None), small_policy(order_by="first_token")]
    by_policy = [PolicyRouter(f"policy {i}", replace(of.policy, default=rule.default)) for i, rule in enumerate(rules)]
    known = baselines(of.policy, ["home"], ["cloud"])
    return [*by_policy, *(router for router in known if router.name not in UNLIKE)]


def holds(of: World, own: Score) -> None:
    """The bound for what a router did is no more than what it paid, and what is attainable no less than it attained."""
    bounds = Bounds(of, own.ended_s)
    assert bounds.most_attainable(own.refused) >= own.met - 1e-6, own.router
    assert bounds.least_cost(own.met, own.refused).cost_nusd <= own.cost_nusd + 1.0, own.router


@settings(max_examples=30, deadline=None)
@given(requests=REQUESTS, engine=ENGINES, cloud=CLOUDS, seed=st.integers(0, 3))
def test_no_router_beats_the_bound(
    requests: Sequence[Request], engine: EngineModel, cloud: CloudModel, seed: int
) -> None:
    of = world(requests, engine=engine, cloud=cloud, seed=seed)
    for router in routers_of(of):
        holds(of, score(of, simulate(of, router)))


@settings(max_examples=10, deadline=None)
@given(requests=REQUESTS, engine=ENGINES, cloud=CLOUDS, total_ms=st.sampled_from([300.0, 2000.0]))
def test_nor_where_a_class_limits_the_whole_answer(
    requests: Sequence[Request], engine: EngineModel, cloud: CloudModel, total_ms: float
) -> None:
    policy = small_policy()
    policy = replace(policy, slo={name: replace(slo, total_p95_ms=total_ms) for name, slo in policy.slo.items()})
    of = world(requests, engine=engine, cloud=cloud, of=policy)
    for router in routers_of(of):
        holds(of, score(of, simulate(of, router)))


@dataclass(frozen=True)
class Planned:
    """A router that knows beforehand where each request goes, with which priority: the plan has both by the request's
    draw. No place refuses it."""

    plan: Mapping[float, tuple[str | None, int]]
    name: str = "planned"
    queues: bool = True

    def decide(self, facts: RequestFacts, snapshot: Snapshot) -> Decision:
        place, priority = self.plan[snapshot.draw]
        chain = () if place is None else (Candidate(place, 0, None, meets=True),)
        return Decision("planned", "", chain, (), facts.labels, "", priority=priority)


def drawn_apart(requests: Sequence[Request]) -> list[Request]:
    """The same requests, each with a draw of its own."""
    return [replace(request, draw=index / len(requests)) for index, request in enumerate(requests)]


PLACES = st.tuples(st.sampled_from(["home", "home", "cloud"]), st.integers(-30, 30))


@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS, engine=ENGINES, plan=st.lists(PLACES, min_size=30, max_size=30))
def test_no_plan_beats_the_bound(
    requests: Sequence[Request], engine: EngineModel, plan: Sequence[tuple[str, int]]
) -> None:
    """Any places and any order, a thing that only a router that knows the future could think of."""
    requests = drawn_apart(requests)
    places: dict[float, tuple[str | None, int]] = {
        request.draw: ("home", priority) if request.facts.labels else (place, priority)
        for request, (place, priority) in zip(requests, plan, strict=False)
    }
    of = world(requests, engine=engine)
    holds(of, score(of, simulate(of, Planned(places))))


FEW = st.lists(
    st.builds(
        asked,
        st.sampled_from([0.0, 0.05, 0.1]),
        st.sampled_from([1, 40, 120]),
        st.sampled_from([1, 20]),
        slo=st.sampled_from([None, "fast", "slow"]),
        private=st.booleans(),
    ),
    min_size=2,
    max_size=3,
)


@settings(max_examples=8, deadline=None)
@given(requests=FEW, engine=ENGINES)
def test_the_best_of_all_plans_does_not_beat_the_bound(requests: Sequence[Request], engine: EngineModel) -> None:
    """Of all places, refusals and orders for a few requests the cheapest plans for each attainment."""
    requests = drawn_apart(requests)
    of = world(requests, engine=engine)
    best: dict[tuple[float, int], Score] = {}
    ways: list[list[str | None]] = [["home", None] if one.facts.labels else ["home", "cloud", None] for one in requests]
    for places in product(*ways):
        for order in permutations(range(len(requests))) if places.count("home") > 1 else [range(len(requests))]:
            plan = {r.draw: (place, 10 * at) for r, place, at in zip(requests, places, order, strict=True)}
            own = score(of, simulate(of, Planned(plan)))
            known = best.get((own.met, own.refused))
            if known is None or (own.cost_nusd, -own.ended_s) < (known.cost_nusd, -known.ended_s):
                best[own.met, own.refused] = own
    for own in best.values():
        holds(of, own)


@settings(max_examples=10, deadline=None)
@given(requests=REQUESTS, engine=ENGINES)
def test_more_attainment_costs_no_less_and_more_refusals_no_more(
    requests: Sequence[Request], engine: EngineModel
) -> None:
    of = world(requests, engine=engine)
    bounds = Bounds(of, 60.0)
    most = bounds.most_attainable()
    costs = [bounds.least_cost(share * most).cost_nusd for share in (0.0, 0.5, 1.0)]
    assert costs == sorted(costs) or max(costs) - min(costs) < 1.0
    assert bounds.least_cost(0.5 * most, refused=1).cost_nusd <= costs[1] + 1.0


def test_what_fits_at_home_costs_what_home_does() -> None:
    """Two requests that the engine can both do in time."""
    of = world([asked(0.0, slo="slow"), asked(2.0, slo="slow")])
    assert Bounds(of, 10.0).least_cost(1.0).cost_nusd == pytest.approx(2 * (100 * 20 + 3 * 80), abs=1)


def crowd(count: int) -> World:
    """So many prompts of 90 tokens at once, each of which an engine does in a step of 100 ms, with four seconds for the
    first token: forty of them can be in time."""
    engine = replace(ENGINE, per_sequence_s=0.001, max_batch_tokens=90)
    policy = replace(small_policy(), slo={"slow": Slo("slow", 4000.0)})
    return world([asked(0.0, 90, 1, slo="slow") for _ in range(count)], engine=engine, of=policy)


def test_of_what_does_not_fit_the_rest_pays_the_cloud() -> None:
    bound = Bounds(crowd(60), 6.0).least_cost(1.0)
    assert bound.cost_nusd == pytest.approx(40 * (90 * 20 + 80) + 20 * (90 * 150 + 600), rel=1e-6)
    assert bound.local_share == pytest.approx(2 / 3)


def test_a_burst_is_seen_wherever_it_falls() -> None:
    """Twelve prompts of 100 ms each at 37.3 s, with half a second each: five can be in time, and no interval that was
    laid down beforehand shows it."""
    engine = replace(ENGINE, per_sequence_s=0.001, max_batch_tokens=90)
    policy = replace(small_policy(), slo={"slow": Slo("slow", 500.0)})
    burst = [asked(37.3, 90, 1, slo="slow") for _ in range(12)]
    of = world([asked(0.0, 90, 1), *burst, asked(80.0, 90, 1)], engine=engine, of=policy)
    bound = Bounds(of, 81.0).reference()
    assert bound.attainment == pytest.approx(1.0)
    assert bound.cost_nusd == pytest.approx(7 * (90 * 20 + 80) + 7 * (90 * 150 + 600), rel=1e-3)


def test_late_is_cheaper_than_in_time() -> None:
    bounds = Bounds(crowd(60), 6.0)
    all_local = 60 * (90 * 20 + 80)
    assert bounds.least_cost(0.5).cost_nusd == pytest.approx(all_local, rel=1e-6)
    assert bounds.least_cost(1.0).cost_nusd > bounds.least_cost(0.8).cost_nusd > all_local


def test_what_must_end_by_then_does_not_all_fit() -> None:
    """With all in the first five seconds, late or not, ten of sixty are for the cloud."""
    bound = Bounds(crowd(60), 5.0).least_cost(0.0)
    assert bound.cost_nusd == pytest.approx(50 * (90 * 20 + 80) + 10 * (90 * 150 + 600), rel=1e-6)


def test_what_nobody_could_meet_is_not_attainable() -> None:
    """The cloud's first token takes 200 ms, the engine's 110; the class wants 100."""
    of = world([asked(0.0, slo="fast"), asked(1.0, slo="slow")])
    assert Bounds(of, 10.0).most_attainable() == pytest.approx(0.5)


def test_private_requests_have_no_cloud_in_the_bound_either() -> None:
    of = world([asked(0.0, 900, 10, slo="slow", private=True), asked(0.0, 900, 10, slo="slow", private=True)])
    bounds = Bounds(of, 10.0)
    assert bounds.most_attainable() == pytest.approx(0.5, abs=0.01), "one of both is late"
    assert bounds.least_cost(0.0).cost_nusd == pytest.approx(2 * (900 * 20 + 10 * 80), abs=1)


def test_refused_requests_are_no_way_to_save() -> None:
    """A router that refuses one of two is compared with schedules that may refuse one of two."""
    of = world([asked(0.0), asked(1.0)])
    bounds = Bounds(of, 10.0)
    assert bounds.least_cost(0.0, refused=1).cost_nusd == pytest.approx(100 * 20 + 3 * 80, abs=1)
    assert bounds.least_cost(0.0, refused=0).cost_nusd == pytest.approx(2 * (100 * 20 + 3 * 80), abs=1)


def test_an_attainment_that_cannot_be_is_no_bound() -> None:
    of = world([asked(0.0, slo="fast")])
    with pytest.raises(NoBound, match="attains"):
        Bounds(of, 10.0).least_cost(1.0)


def test_a_comparison_tells_ratios_and_who_dominates_whom() -> None:
    """A cloud that is dear and slow, an engine that is neither: always local dominates always cloud."""
    policy = replace(small_policy(), slo={"fast": Slo("fast", 150.0), "slow": Slo("slow", 1000.0)})
    of = world([asked(i * 0.5, 80, slo="fast") for i in range(20)], of=policy, cloud=STEADY)
    found = compared([(of, PolicyRouter("p", of.policy))], baselines(of.policy, ["home"], ["cloud"]), bound=True)
    by_name = {entry.score.router: entry for entry in found.entries}
    assert "always local" in by_name["always cloud"].dominated_by
    assert by_name["always local"].dominated_by == ()
    own = by_name["p"]
    assert own.ratio is not None and own.ratio >= 1.0 - 1e-6
    assert found.reference is not None and found.reference.attainment == pytest.approx(1.0)
    assert [entry.score.router for entry in found.told].count("threshold 1") <= 1
    assert len(found.told) == 5
