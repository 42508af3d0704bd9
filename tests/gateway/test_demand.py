"""What a second of an engine is worth: nothing while all that is offered fits, then what the work beyond would save."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest

from gateway.demand import FILLED, LONGEST_S, ROOM, Demand
from gateway.estimate import congestion_nusd, saved_per_engine_second
from gateway.types import Backlog, Candidate, DeploymentStatus


def offered(rate: float, saved: float, by_ms: float | None = None) -> Demand:
    """Offers of `rate` engine-seconds a second, for two minutes."""
    demand = Demand()
    for tenth in range(1200):
        demand.offered(0.1 * rate, saved, by_ms, tenth / 10)
    return demand


def test_where_nobody_asks_a_second_is_worth_nothing() -> None:
    assert Demand().price_nusd == 0.0


def test_work_beyond_what_fits_makes_its_saving_the_price() -> None:
    assert offered(FILLED * 1.3, 1000.0).price_nusd == pytest.approx(1000.0, rel=0.05)


def test_the_price_is_where_the_best_offers_fill_the_engine() -> None:
    demand = Demand()
    for second in range(300):
        for saved in (100.0, 1000.0, 10_000.0):
            demand.offered(0.8, saved, None, float(second))
    assert demand.price_nusd == pytest.approx(1000.0, rel=0.05), "the best fit, the next do not"


def test_where_all_fits_a_second_is_worth_what_a_typical_one_saves() -> None:
    demand = Demand()
    for second in range(300):
        for saved in (10.0, 1000.0, 1000.0):
            demand.offered(0.1, saved, None, float(second))
    assert demand.price_nusd == pytest.approx(1000.0, rel=0.05)


def test_work_without_another_place_comes_first_and_all_else_pays_for_it() -> None:
    demand = Demand()
    for second in range(300):
        demand.offered(1.0, inf, 100.0, float(second))
        demand.offered(0.5, 5000.0, 100.0, float(second))
    assert demand.price_nusd == pytest.approx(5000.0, rel=0.05)


def test_what_saves_nothing_asks_for_nothing() -> None:
    assert offered(5.0, -10.0).price_nusd == 0.0


def test_the_room_is_what_the_strictest_leave_that_have_no_other_place() -> None:
    assert offered(0.1, 1000.0, 50.0).room_s == pytest.approx(ROOM * LONGEST_S), "they have another"
    assert offered(0.1, inf, 200.0).room_s == pytest.approx(ROOM * 0.2, rel=0.05)
    assert offered(0.1, inf, None).room_s == pytest.approx(ROOM * LONGEST_S, rel=0.05)


def test_the_room_is_theirs_as_long_as_they_come() -> None:
    demand = offered(0.1, inf, 200.0)
    for second in range(200, 800):
        demand.offered(0.1, inf, 4000.0, float(second))
    assert demand.room_s == pytest.approx(ROOM * 4.0, rel=0.05)


def waits(tokens: float, room_s: float = 1.0) -> DeploymentStatus:
    backlog = Backlog(0.0, 1.0, tokens, prefill_tokens_per_s=1000.0, step_s=0.01, step_tokens=100)
    return DeploymentStatus(backlog=backlog, engine_second_nusd=1e6, room_s=room_s)


def congestion(status: DeploymentStatus, prompt: int = 100, engine_s: float = 0.1) -> int:
    assert status.backlog is not None
    return congestion_nusd(status, status.backlog, prompt, engine_s, 0.0)


def test_congestion_rises_with_the_queue_and_is_next_to_nothing_without_one() -> None:
    whole = 1e6 * 0.1
    prices = [congestion(waits(tokens)) for tokens in (0, 300, 600, 1200)]
    assert prices == sorted(prices) and prices[0] < 0.03 * whole and prices[-1] > whole


def test_congestion_is_more_where_others_can_wait_less() -> None:
    assert congestion(waits(300, room_s=0.2)) > 4 * congestion(waits(300, room_s=1.0))


def test_nobody_pays_for_a_second_that_is_worth_nothing() -> None:
    assert congestion(replace(waits(5000), engine_second_nusd=0.0)) == 0


HOME = Candidate("home", 100, 50.0, True, engine_s=0.5)
CLOUD = Candidate("cloud", 1100, 300.0, True)


@pytest.mark.parametrize(
    ("candidates", "saved"),
    [
        ((HOME, CLOUD), 2000.0),
        ((HOME,), inf),
        ((HOME, CLOUD._replace(meets=False)), inf),
        ((HOME._replace(meets=False), CLOUD), 2000.0),
        ((HOME._replace(meets=False), CLOUD._replace(meets=False)), 2000.0),
        ((HOME, CLOUD._replace(cost_nusd=None)), None),
        ((HOME, CLOUD, Candidate("near", 200, 60.0, True, congestion_nusd=400)), 1000.0),
    ],
)
def test_what_a_request_saves_is_what_the_next_best_place_takes(
    candidates: tuple[Candidate, ...], saved: float | None
) -> None:
    assert saved_per_engine_second(candidates[0], candidates) == saved
