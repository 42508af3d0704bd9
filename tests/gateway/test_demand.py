"""What a second of an engine is worth: nothing while all that is offered fits, then what the work beyond would save."""

from __future__ import annotations

from math import inf

import pytest

from gateway.demand import FILLED, Demand
from gateway.estimate import saved_per_engine_second
from gateway.types import Candidate


def offered(
    rate: float, saved: float, seconds: int = 120, demand: Demand | None = None, engine_s: float = 0.1
) -> Demand:
    """Offers of `rate` engine-seconds a second over a time."""
    demand = demand or Demand()
    for second in range(seconds):
        for number in range(10):
            demand.offered(engine_s * rate, saved, second + number / 10)
    return demand


def test_work_that_fits_makes_no_price() -> None:
    assert offered(0.5, 1000.0).price_nusd == 0.0


def test_work_beyond_what_fits_makes_its_saving_the_price() -> None:
    assert offered(FILLED * 1.3, 1000.0).price_nusd == pytest.approx(1000.0, rel=0.05)


def test_the_price_is_where_the_best_offers_fill_the_engine() -> None:
    demand = Demand()
    for second in range(300):
        for saved in (100.0, 1000.0, 10_000.0):
            demand.offered(0.5, saved, float(second))
    assert demand.price_nusd == pytest.approx(1000.0, rel=0.05), "0.5 + 0.5 is more than there is"


def test_work_without_another_place_comes_first_and_all_else_pays_for_it() -> None:
    demand = Demand()
    for second in range(300):
        demand.offered(1.0, inf, float(second))
        demand.offered(0.5, 5000.0, float(second))
    assert demand.price_nusd == pytest.approx(5000.0, rel=0.05)


def test_what_saves_nothing_asks_for_nothing() -> None:
    assert offered(5.0, -10.0).price_nusd == 0.0


def test_the_price_falls_when_the_rush_is_over() -> None:
    demand = offered(3.0, 1000.0)
    for second in range(200, 800):
        demand.offered(0.1, 1000.0, float(second))
    assert demand.price_nusd == 0.0


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
