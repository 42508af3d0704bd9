"""What waits at an engine: readings, corrected by what was sent since; forecasts and how good they were."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.backlogs import GOOD_FOR, EngineBacklog
from gateway.estimate import FIRST_MARGIN, engine_seconds, first_token_ms, forecast_ms
from gateway.fleet import Fleet
from gateway.snapshot import Backlog, DeploymentStatus, EngineLoad
from gateway.types import Speed
from tests.fakes import deployment

IDLE = EngineLoad(
    waiting=0,
    running=0,
    queued_prefill_tokens=0,
    free_blocks=1000,
    total_blocks=1000,
    block_size=16,
    prefill_tokens_per_s=1000.0,
    decode_tokens_per_s=100.0,
    step_s=0.01,
    max_running=8,
    max_batch_tokens=100,
)


def load(**changed: Any) -> EngineLoad:
    values = {name: getattr(IDLE, name) for name in IDLE.__slots__}
    return EngineLoad(**(values | changed))


def read(reading: EngineLoad, asked_at: float = 0.0, now: float = 0.0) -> EngineBacklog:
    engine = EngineBacklog()
    engine.loaded(reading, asked_at, now)
    return engine


def forecast(engine: EngineBacklog, prompt: int, priority: int = 0, now: float = 0.0) -> float:
    backlog = engine.backlog(now)
    assert backlog is not None
    return forecast_ms(backlog, prompt, priority, now)


def test_a_first_token_in_an_idle_engine_comes_after_the_steps_that_its_prompt_needs() -> None:
    assert forecast(read(IDLE), 60) == pytest.approx(10 + 60)
    assert forecast(read(IDLE), 250) == pytest.approx(2 * (10 + 100) + 10 + 50)


def test_a_first_token_waits_for_half_a_step_and_the_full_steps_before_it() -> None:
    # 100 of the 500 tokens are in the step under way; 400 and its own 60 need five more steps, the last one not full.
    assert forecast(read(load(queued_prefill_tokens=500)), 60) == pytest.approx((10 + 100) / 2 + 4 * 110 + 10 + 60)


def test_a_prompt_that_goes_first_shares_its_step_with_those_behind_it() -> None:
    engine = read(IDLE)
    engine.sent(900, 5, True, 0.0)
    assert forecast(engine, 30, priority=0) == pytest.approx((10 + 100) / 2 + 10 + 100)


def test_what_runs_is_in_a_step_as_well() -> None:
    assert forecast(read(load(running=3)), 60) == pytest.approx(10 / 2 + 10 + 60)


def test_what_was_sent_since_the_reading_counts_and_drains() -> None:
    engine = read(IDLE)
    engine.sent(300, 0, True, 0.0)
    assert forecast(engine, 100) == pytest.approx(110 / 2 + 2 * 110 + 110)
    assert forecast(engine, 100, now=0.25) == pytest.approx((10 + 50) / 2 + 110)
    assert forecast(engine, 100, now=0.5) == pytest.approx(110)


def test_a_reading_counts_what_was_sent_before_it_was_asked_for() -> None:
    engine = read(IDLE)
    engine.sent(300, 0, True, 0.10)
    engine.sent(40, 0, True, 0.20)
    engine.loaded(load(queued_prefill_tokens=250), asked_at=0.15, now=0.21)
    backlog = engine.backlog(0.21)
    assert backlog is not None and (backlog.tokens, backlog.sequences) == (250 + 40, 1)


def test_a_request_of_a_lower_number_waits_for_those_that_go_before_it_only() -> None:
    engine = read(IDLE)
    engine.sent(600, 5, True, 0.0)
    engine.sent(200, 1, True, 0.0)
    backlog = engine.backlog(0.0)
    assert backlog is not None
    assert [backlog.share_ahead(priority) for priority in (0, 1, 3, 5, 9)] == [0.0, 0.25, 0.25, 1.0, 1.0]
    assert forecast(engine, 50, priority=0) < forecast(engine, 50, priority=1) < forecast(engine, 50, priority=5)
    engine.started(engine.number, 1)
    assert engine.backlog(0.0).share_ahead(1) == 0.0  # type: ignore[union-attr]


def test_a_whole_answer_waits_until_its_first_token_is_due() -> None:
    engine = read(IDLE)
    engine.sent(500, 3, False, 0.0)
    assert engine.backlog(0.1).ahead == ((3, 1.0),)  # type: ignore[union-attr]
    assert engine.backlog(0.6).ahead == ()  # type: ignore[union-attr]


def test_a_full_cache_is_waited_for_at_the_rate_at_which_blocks_come_back() -> None:
    engine = read(load(free_blocks=10, running=6))
    for _ in range(20):
        engine.held(4.0, 0.0)
    # 480 tokens need 30 blocks, 20 more than are free; 990 are held for 4 s each: 247.5 come back in a second.
    assert forecast(engine, 480) == pytest.approx(1000 * 20 / 247.5 + 480 + 10)


def test_a_full_house_is_waited_for_at_the_rate_at_which_places_come_back() -> None:
    engine = read(load(running=8))
    for _ in range(20):
        engine.held(4.0, 0.0)
    assert forecast(engine, 100) == pytest.approx(1000 * 1 / 2 + 100 + 10)


def test_an_old_or_missed_reading_says_nothing() -> None:
    engine = read(IDLE)
    assert engine.backlog(GOOD_FOR + 0.01) is None and engine.busy(GOOD_FOR + 0.01) is None
    engine.loaded(IDLE, 2.0, 2.0)
    assert engine.backlog(2.0) is not None
    engine.missed()
    assert engine.backlog(2.0) is None and engine.busy(2.0) is None


def test_rates_that_were_not_measured_make_no_forecast() -> None:
    assert read(load(prefill_tokens_per_s=None)).backlog(0.0) is None
    assert read(load(prefill_tokens_per_s=None)).busy(0.0) == 0.0


@pytest.mark.parametrize(
    ("reading", "share"),
    [
        (IDLE, 0.0),
        (load(free_blocks=250), 0.75),
        (load(running=4, waiting=2), 0.75),
        (load(queued_prefill_tokens=250), 0.25),
        (load(queued_prefill_tokens=99999, free_blocks=0), 1.0),
    ],
)
def test_an_engine_is_as_busy_as_what_is_fullest(reading: EngineLoad, share: float) -> None:
    assert read(reading).busy(0.0) == pytest.approx(share)


def test_forecasts_get_the_margin_that_they_turned_out_to_need_each_size_and_priority_its_own() -> None:
    engine = read(IDLE)
    assert engine.backlog(0.0).margins_by_priority == {}  # type: ignore[union-attr]
    for sample in range(100):
        engine.compared(20.0, 60.0, 0, sample * 0.01)
        engine.compared(2000.0, 2200.0, 0, sample * 0.01)
        engine.compared(20.0, 1000.0, 5, sample * 0.01)
    engine.loaded(IDLE, 1.0, 1.0)
    margins = engine.backlog(1.0).margins_by_priority  # type: ignore[union-attr]
    assert margins[0][0] == pytest.approx(3.0, rel=0.05) and margins[0][3] == pytest.approx(1.1, rel=0.05)
    assert margins[0][1] == margins[0][2] == FIRST_MARGIN
    assert margins[5][0] == pytest.approx(50.0, rel=0.05), "who goes last is overtaken; who goes first need not know"
    engine.forget()
    assert engine.backlog(1.0).margins_by_priority == {}  # type: ignore[union-attr]


def test_a_margin_is_that_of_the_priority_else_that_of_all_else_the_first() -> None:
    backlog = Backlog(at=0.0, good_until=1.0, tokens=0.0, prefill_tokens_per_s=1000.0, step_s=0.0)
    known = replace(backlog, margins=(2.0,) * 5, margins_by_priority={3: (7.0,) * 5})
    of = {p: first_token_ms(HOME, DeploymentStatus(backlog=known), 100, p, 0.0) for p in (0, 3)}
    assert of == {0: pytest.approx(200.0), 3: pytest.approx(700.0)}
    assert first_token_ms(HOME, DeploymentStatus(backlog=backlog), 100, 3, 0.0) == pytest.approx(100 * FIRST_MARGIN)


def test_an_output_token_takes_longer_the_more_it_looks_back_at() -> None:
    """Steps of 10 ms, and 1 ms for every 100 tokens in the cache, which holds 16,000."""
    engine = EngineBacklog()
    for second in range(60):
        used = 10 * (second % 30)
        reading = load(running=2, free_blocks=1000 - used, step_s=0.01 + used * 16 * 1e-5)
        engine.loaded(reading, second * 1.0, second * 1.0)
    backlog = engine.backlog(59.0)
    assert backlog is not None and backlog.cached_token_s == pytest.approx(1e-5 + 0.01 / 16_000, rel=0.01)
    short, long = (engine_seconds(backlog, prompt, 100) for prompt in (100, 1000))
    each = 1e-5 + 0.01 / 16_000  # and its share of the steps that a full cache makes
    assert short == pytest.approx(100 / 1000 + 100 * 150 * each, rel=0.01)
    assert long == pytest.approx(1000 / 1000 + 100 * 1050 * each, rel=0.01)


def test_an_output_token_has_its_share_of_a_step_while_nothing_else_is_known() -> None:
    backlog = read(load(running=4, step_s=0.02)).backlog(0.0)
    assert backlog is not None and engine_seconds(backlog, 0, 10) == pytest.approx(10 * 0.005)


def test_a_request_needs_the_time_of_those_before_it_and_its_own() -> None:
    engine = read(IDLE)
    numbers = []
    for priority, prompt in ((2, 300), (5, 1000), (2, 100), (0, 50)):
        engine.sent(prompt, priority, True, 0.0)
        numbers.append(engine.number)
    step = 0.01
    assert engine.needs_s(numbers[2], 2, 0.0) == pytest.approx(0.45 + 5 * step)
    engine.started(numbers[0], 2)
    assert engine.needs_s(numbers[2], 2, 0.0) == pytest.approx(0.15 + 2 * step)
    assert engine.needs_s(numbers[1], 5, 0.0) == pytest.approx(1.15 + 12 * step)


def test_what_an_engine_has_computed_of_a_prompt_is_not_needed_any_more() -> None:
    engine = read(IDLE)
    engine.sent(1000, 5, True, 0.0)
    step = 0.01
    assert engine.needs_s(engine.number, 5, 0.0) == pytest.approx(1.0 + 10 * step)
    engine.loaded(load(running=1, queued_prefill_tokens=250), 1.0, 1.0)
    assert engine.needs_s(engine.number, 5, 1.0) == pytest.approx(0.25 + 3 * step)
    engine.loaded(load(running=1, queued_prefill_tokens=4000), 2.0, 2.0)  # another gateway's prompts wait, too
    assert engine.needs_s(engine.number, 5, 2.0) == pytest.approx(1.0 + 10 * step)


def test_where_all_places_are_taken_a_request_needs_until_one_is_free() -> None:
    engine = read(load(running=8))
    engine.held(4.0, 0.0)
    engine.sent(10, 0, True, 0.0)
    assert engine.needs_s(engine.number, 0, 0.0) == pytest.approx(4.0 / 8)


# What is believed of a deployment, first to last.

HOME = deployment("home", speed=Speed(prefill_tokens_per_s=2000.0, ms_per_output_token=5.0))
MEASURED = DeploymentStatus(first_token_p95_ms=80.0, first_token_p95_ms_by_size=(50.0, 60.0, 70.0, 80.0, 90.0))


@pytest.mark.parametrize(
    ("status", "prompt", "expected"),
    [
        (DeploymentStatus(), 1000, 500 + 5.0),
        (DeploymentStatus(first_token_p95_ms=80.0), 1000, 80.0),
        (MEASURED, 1000, 60.0),
        (MEASURED, 1_000_000, 90.0),
    ],
)
def test_measurements_are_believed_before_the_catalog(status: DeploymentStatus, prompt: int, expected: float) -> None:
    assert first_token_ms(HOME, status, prompt, 0, 0.0) == pytest.approx(expected)


def test_an_engine_is_believed_before_measurements_while_its_reading_is_good() -> None:
    backlog = Backlog(
        at=0.0, good_until=1.0, tokens=500.0, prefill_tokens_per_s=1000.0, step_s=0.01, margins=(1.1,) * 5
    )
    status = DeploymentStatus(first_token_p95_ms=80.0, backlog=backlog)
    assert first_token_ms(HOME, status, 100, 0, 0.0) == pytest.approx((510 / 2 + 110) * 1.1)
    assert first_token_ms(HOME, status, 100, 0, 1.1) == 80.0


# Through the fleet.


def test_the_fleet_corrects_and_learns_from_what_comes() -> None:
    fleet = Fleet(["d"])
    fleet.loaded("d", IDLE, 0.0, 0.0)
    flights = [fleet.started("d", 0.0, 300, priority=2) for _ in range(3)]
    backlog = fleet.snapshot(0.0, 0.0).deployments["d"].backlog
    assert backlog is not None and backlog.tokens == 900 and backlog.ahead == ((2, 1.0),)
    assert [flight.forecast_ms for flight in flights] == pytest.approx([330.0, 605.0, 935.0])
    for number, flight in enumerate(flights):
        fleet.first_token(flight, 0.5 + number * 0.5)
        fleet.ended(flight, None, 5.0)
    fleet.loaded("d", IDLE, 5.0, 5.0)
    backlog = fleet.snapshot(5.0, 0.0).deployments["d"].backlog
    assert backlog is not None and backlog.tokens == 0 and backlog.ahead == ()


def test_a_request_that_ends_without_a_first_token_waits_no_longer() -> None:
    fleet = Fleet(["d"])
    fleet.loaded("d", IDLE, 0.0, 0.0)
    fleet.abandoned(fleet.started("d", 0.0, 300, priority=2))
    backlog = fleet.snapshot(0.0, 0.0).deployments["d"].backlog
    assert backlog is not None and backlog.ahead == ()


def test_what_was_in_flight_before_an_engine_came_back_says_nothing_of_it() -> None:
    fleet = Fleet(["d"])
    fleet.loaded("d", IDLE, 0.0, 0.0)
    old = fleet.started("d", 0.0, 300)
    fleet.set_up("d", 1.0)
    fleet.loaded("d", IDLE, 1.0, 1.0)
    new = fleet.started("d", 1.0, 100)
    fleet.first_token(old, 9.0)
    fleet.ended(old, None, 9.5)
    status = fleet.snapshot(1.0, 0.0).deployments["d"]
    assert status.first_token_p95_ms is None and status.in_flight == 1
    assert status.backlog is not None and status.backlog.ahead == ((0, 1.0),)
    fleet.abandoned(new)
