"""What a second of an engine is worth: what the work that does not fit would save; the fuller it is, the more."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from typing import Any

import pytest

from gateway.decision import Candidate
from gateway.demand import FILLED, LONGEST_S, REMEMBERED_S, Demand
from gateway.estimate import KEEPING, KEPT, MEMORY, RISING, ROOM, STEEPEST, congestion_nusd, saved_per_engine_second
from gateway.snapshot import Backlog, DeploymentStatus


def offered(rate: float, saved: float, by_ms: float | None = None) -> Demand:
    """Offers of `rate` engine-seconds a second, for two minutes."""
    demand = Demand()
    for tenth in range(1200):
        demand.offered(0.1 * rate, saved, by_ms, 0, tenth / 10)
    return demand


def test_where_nobody_asks_a_second_is_worth_nothing() -> None:
    assert Demand().price_nusd == 0.0


def test_work_beyond_what_fits_makes_its_saving_the_price() -> None:
    assert offered(FILLED * 1.3, 1000.0).price_nusd == pytest.approx(1000.0, rel=0.05)


def test_the_price_is_where_the_best_offers_fill_the_engine() -> None:
    demand = Demand()
    for second in range(300):
        for saved in (100.0, 1000.0, 10_000.0):
            demand.offered(FILLED - 0.05, saved, None, 0, float(second))
    assert demand.price_nusd == pytest.approx(1000.0, rel=0.05), "the best fit, the next do not"


def test_where_all_fits_a_second_is_worth_nothing() -> None:
    assert offered(0.3, 1000.0).price_nusd == 0.0


def test_work_without_another_place_comes_first_and_all_else_pays_for_it() -> None:
    demand = Demand()
    for second in range(300):
        demand.offered(1.0, inf, 100.0, 0, float(second))
        demand.offered(0.5, 5000.0, 100.0, 1, float(second))
    assert demand.price_nusd == pytest.approx(5000.0, rel=0.05)


def test_the_dearest_is_what_few_save_more_than_and_not_one_odd_request() -> None:
    demand = Demand()
    for second in range(200):
        demand.offered(0.2, 1000.0 if second % 10 else 3000.0, None, 0, float(second))
        demand.offered(0.2, inf, 100.0, 0, float(second))
    demand.offered(0.001, 1e9, None, 0, 200.0)
    demand.offered(0.2, 1000.0, None, 0, 201.0)
    assert demand.dearest_nusd == pytest.approx(3000.0, rel=0.05)


def test_what_saves_nothing_asks_for_nothing() -> None:
    assert offered(5.0, -10.0).price_nusd == 0.0


def test_each_priority_has_the_time_that_its_requests_have() -> None:
    demand = Demand()
    for second, (priority, by_ms) in enumerate([(4, None), (0, 200.0), (2, 60_000.0), (2, 1000.0)]):
        demand.offered(0.1, 1000.0, by_ms, priority, float(second))
    assert demand.rooms == ((0, 0.2, False), (2, 1.0, False), (4, LONGEST_S, False))


def test_a_priority_that_asks_no_more_has_no_room_to_keep() -> None:
    demand = Demand()
    demand.offered(0.1, inf, 200.0, 0, 0.0)
    demand.offered(0.1, 1000.0, None, 3, REMEMBERED_S + 1)
    assert demand.rooms == ((3, LONGEST_S, False),)


def test_a_priority_of_which_some_have_no_other_place_is_one_to_keep_until_they_ask_no_more() -> None:
    demand = Demand()
    demand.offered(0.1, inf, 200.0, 0, 0.0)
    demand.offered(0.1, 1000.0, 200.0, 0, 1.0)
    assert demand.rooms == ((0, 0.2, True),)
    demand.offered(0.1, 1000.0, 200.0, 0, REMEMBERED_S + 2)
    assert demand.rooms == ((0, 0.2, False),)


def test_who_is_late_says_nothing_of_how_long_others_can_wait() -> None:
    demand = Demand()
    demand.offered(0.1, inf, 10_000.0, 4, 0.0)
    demand.offered(0.1, inf, 1000.0, 4, 1.0, late=True)
    assert demand.rooms == ((4, 10.0, True),)


def waits(tokens: float, **changed: Any) -> DeploymentStatus:
    """An engine that computes 1,000 prompt tokens a second, of which so many wait; a second of it is worth 1e6."""
    backlog = Backlog(0.0, 1.0, tokens, prefill_tokens_per_s=1000.0, step_s=0.0, step_tokens=100)
    rooms = ((0, 1.0, False), (3, 10.0, False))
    values: dict[str, Any] = {"backlog": backlog, "engine_second_nusd": 1e6, "rooms": rooms}
    return DeploymentStatus(**(values | changed))


WHOLE = 1e6 * 0.1  # what a tenth of a second saves others


def congestion(status: DeploymentStatus, priority: int = 3, prompt: int = 100) -> float:
    """As a share of what the engine-seconds of the request save others."""
    assert status.backlog is not None
    return congestion_nusd(status, status.backlog, priority, prompt, 0.1, 0.0) / WHOLE


def test_congestion_rises_with_the_queue_to_all_that_others_save_and_no_further_where_they_can_leave() -> None:
    prices = [congestion(waits(1000 * seconds)) for seconds in (0.0, 1.0, 5.0, ROOM * 10, 50.0)]
    assert prices == sorted(prices)
    assert prices[0] == 0.0 and prices[1] < 0.1
    assert prices[3:] == pytest.approx([1.0, 1.0], rel=0.05)


def test_before_those_who_cannot_leave_miss_their_class_the_dearest_are_kept_away() -> None:
    rooms = ((2, 10.0, True), (3, 10.0, False))
    prices = [
        congestion(waits(1000 * seconds, rooms=rooms, engine_second_nusd=0.0, dearest_nusd=1e6), priority=2)
        for seconds in (0.0, KEPT * 5, KEPT * 10, 9.0, 1e4)
    ]
    assert prices == pytest.approx([0.0, 2**-KEEPING, 1.0, (0.9 / KEPT) ** KEEPING, STEEPEST**KEEPING], rel=0.15)
    behind = waits(1000 * KEPT * 10, rooms=rooms, engine_second_nusd=0.0, dearest_nusd=1e6)
    assert congestion(behind, priority=3) == 0.0, "who goes after them does not delay them"


def test_a_prompts_own_time_is_no_queue() -> None:
    assert congestion(waits(0.0), prompt=50_000) == 0.0


def test_who_goes_last_delays_those_who_can_wait_and_who_goes_first_all_others() -> None:
    behind = waits(1000.0, backlog=replace(waits(1000.0).backlog or BACKLOG, ahead=((0, 0.3), (3, 1.0))))
    assert congestion(behind, priority=3) < 0.1
    assert congestion(behind, priority=0) == pytest.approx((0.3 / ROOM) ** 2, rel=0.1)


def test_a_full_cache_is_dear_whoever_asks() -> None:
    backlog = replace(BACKLOG, used_blocks=600.0, free_blocks=400.0, block_size=10)
    memory = waits(0.0, backlog=backlog)
    assert congestion(memory, prompt=1000) == pytest.approx((0.7 / MEMORY) ** 2, rel=0.01)
    assert congestion(memory, prompt=10) < congestion(memory, prompt=1000)
    assert congestion(replace(memory, backlog=replace(backlog, used_blocks=9e6))) <= STEEPEST**RISING


def test_what_waits_fills_the_cache_only_as_fast_as_it_is_computed() -> None:
    """1,000 tokens a second, each held for two seconds: of the 60,000 that wait 2,000 are there at once."""
    backlog = replace(BACKLOG, tokens=60_000.0, used_blocks=100.0, free_blocks=900.0, block_size=10, hold_s=2.0)
    assert congestion(waits(0.0, backlog=backlog, rooms=())) == pytest.approx((0.3 / MEMORY) ** 2, rel=0.01)


@pytest.mark.parametrize("price", [0.0, -1.0, inf, nan])
def test_nobody_pays_for_a_second_that_is_worth_nothing_or_nobody_knows_what(price: float) -> None:
    assert congestion(replace(waits(50_000), engine_second_nusd=price)) == 0
    assert price == 0.0 or congestion(replace(waits(50_000), dearest_nusd=price)) == 0


BACKLOG = Backlog(0.0, 1.0, 0.0, prefill_tokens_per_s=1000.0, step_s=0.0, step_tokens=100)
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
