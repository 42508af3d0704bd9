"""The fleet's state: circuits open after failures and heal, in-flight counts never drift, latencies decay."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.balance import Affinity
from gateway.errors import (
    ConnectFailed,
    GatewayError,
    UpstreamCut,
    UpstreamFailed,
    UpstreamLate,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnauthorized,
)
from gateway.estimate import forecast_ms
from gateway.fleet import SOON, Fleet, Flight
from gateway.snapshot import DeploymentStatus, EngineLoad
from gateway.targets import FAILURES_TO_OPEN, FIRST_COOL_OFF, LONGEST_COOL_OFF, SILENT_AFTER
from gateway.types import Replica, Usage

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
)


def attempt(fleet: Fleet, error: GatewayError | None, now: float) -> None:
    fleet.ended(fleet.started("d", now), error, now)


def status(fleet: Fleet, now: float) -> DeploymentStatus:
    return fleet.snapshot(now, 0.0).deployments["d"]


def opened(now: float = 0.0) -> Fleet:
    fleet = Fleet(["d"])
    for _ in range(FAILURES_TO_OPEN):
        attempt(fleet, UpstreamFailed("broken"), now)
    return fleet


def test_a_circuit_opens_after_failures_in_a_row_and_says_why() -> None:
    fleet = Fleet(["d"])
    for _ in range(FAILURES_TO_OPEN - 1):
        attempt(fleet, ConnectFailed("cannot be reached"), 0.0)
    assert status(fleet, 0.0).down is None
    attempt(fleet, ConnectFailed("cannot be reached"), 0.0)
    assert "cannot be reached" in (status(fleet, 0.0).down or "") and status(fleet, 0.0).circuit == "open"


def test_a_success_between_failures_keeps_the_circuit_closed() -> None:
    fleet = Fleet(["d"])
    for _ in range(FAILURES_TO_OPEN):
        attempt(fleet, UpstreamCut("broke off"), 0.0)
        attempt(fleet, None, 0.0)
    assert status(fleet, 0.0).circuit == "closed"


def test_after_the_cool_off_one_request_tries_and_a_success_closes_the_circuit() -> None:
    fleet = opened()
    later = FIRST_COOL_OFF + 0.1
    assert status(fleet, later).circuit == "half_open" and status(fleet, later).down is None
    trial = fleet.started("d", later)
    assert status(fleet, later).down is not None, "a second request must not try as well"
    fleet.ended(trial, None, later)
    assert status(fleet, later) == DeploymentStatus()


def test_each_failed_trial_doubles_the_cool_off_up_to_a_limit() -> None:
    fleet, now, waits = opened(), 0.0, []
    for _ in range(8):
        waits.append(status(fleet, now).retry_after)
        now += waits[-1] + 0.01
        attempt(fleet, UpstreamFailed("broken"), now)
    assert waits[:3] == pytest.approx([2.0, 4.0, 8.0]) and max(waits) == LONGEST_COOL_OFF


@pytest.mark.parametrize(
    ("error", "wait"),
    [
        (UpstreamOverloaded("full", retry_after=7.0), 7.0),
        (UpstreamOverloaded("full", retry_after=9999.0), LONGEST_COOL_OFF),
        (UpstreamUnauthorized("refused our credentials"), 60.0),
    ],
)
def test_what_says_when_to_come_back_is_left_alone_until_then(error: GatewayError, wait: float) -> None:
    fleet = Fleet(["d"])
    attempt(fleet, error, 0.0)
    assert status(fleet, 0.0).retry_after == pytest.approx(wait)
    assert status(fleet, wait + 0.01).down is None


@pytest.mark.parametrize(
    "error", [UpstreamRejected("no", upstream_status=400), UpstreamOverloaded("cannot start in time")]
)
def test_what_is_not_a_fault_never_opens_the_circuit(error: GatewayError) -> None:
    fleet = Fleet(["d"])
    for _ in range(10):
        attempt(fleet, error, 0.0)
    assert status(fleet, 0.0).circuit == "closed"


def test_down_and_up_come_from_outside_and_up_forgets_the_past() -> None:
    fleet = opened()
    fleet.set_down("d", "its engine is starting", 1.0, retry_after=2.0)
    assert status(fleet, 1.0).down == "its engine is starting" and status(fleet, 1.0).retry_after == 2.0
    fleet.set_up("d", 1.0)
    assert status(fleet, 1.0) == DeploymentStatus()


def test_a_snapshot_does_not_change_afterwards() -> None:
    fleet = Fleet(["d"])
    before = fleet.snapshot(0.0, 0.0)
    fleet.set_down("d", "gone", 0.0)
    assert before.deployments["d"].down is None


_EVENTS = st.sampled_from(["start", "ok", "fail", "full", "gone", "up", "down"])


@given(st.lists(st.tuples(_EVENTS, st.floats(0, 20)), max_size=60))
def test_in_flight_is_what_started_and_has_not_ended(events: list[tuple[str, float]]) -> None:
    fleet, now = Fleet(["d"]), 0.0
    running: list[Flight] = []
    errors = {"ok": None, "fail": UpstreamFailed("x"), "full": UpstreamOverloaded("x", retry_after=1.0)}
    for event, passed in events:
        now += passed
        if event == "start":
            running.append(fleet.started("d", now))
        elif event in errors and running:
            fleet.ended(running.pop(), errors[event], now)
        elif event == "gone" and running:
            fleet.abandoned(running.pop())
        elif event == "up":
            fleet.set_up("d", now)
        elif event == "down":
            fleet.set_down("d", "stopped", now)
        known = status(fleet, now)
        assert known.in_flight == len(running)
        assert (known.circuit == "open") <= (known.down is not None)


def test_a_client_that_leaves_before_the_first_token_says_nothing_of_the_deployment() -> None:
    """Clients that are less patient than the gateway must not hide that a deployment has gone silent."""
    fleet = Fleet(["d"])
    for _ in range(FAILURES_TO_OPEN):
        attempt(fleet, UpstreamFailed("broken"), 0.0)
        fleet.abandoned(fleet.started("d", 0.0))
    assert status(fleet, 0.0).circuit == "open" and status(fleet, 0.0).in_flight == 0


def test_a_trial_that_is_abandoned_leaves_the_circuit_half_open_for_the_next() -> None:
    fleet, later = opened(), FIRST_COOL_OFF + 0.1
    fleet.abandoned(fleet.started("d", later))
    assert status(fleet, later).circuit == "half_open" and status(fleet, later).down is None


def test_requests_that_fail_together_open_the_circuit_once() -> None:
    fleet = Fleet(["d"])
    for flight in [fleet.started("d", 0.0) for _ in range(50)]:
        fleet.ended(flight, UpstreamFailed("reset"), 0.0)
    assert status(fleet, 0.0).retry_after == FIRST_COOL_OFF
    assert status(fleet, FIRST_COOL_OFF + 0.1).circuit == "half_open"


REPLICAS = [Replica("http://engines:8000/v1", f"10.0.0.{number}") for number in range(3)]


def balanced(count: int = 3) -> Fleet:
    fleet = Fleet(["d"])
    fleet.follow("d", REPLICAS[:count])
    return fleet


def at(fleet: Fleet, replica: Replica, now: float = 0.0) -> Flight:
    """An attempt on this replica."""
    flight = fleet.started("d", now, tried=[other for other in REPLICAS if other != replica])
    assert flight.member is not None and flight.member.replica == replica
    return flight


def ups(fleet: Fleet, now: float) -> list[bool]:
    return [member.up for member in fleet.members("d", now)]


def broken(fleet: Fleet, replica: Replica, now: float = 0.0) -> None:
    for _ in range(FAILURES_TO_OPEN):
        fleet.ended(at(fleet, replica, now), ConnectFailed("cannot be reached"), now)


def test_a_replica_with_an_open_circuit_gets_nothing_and_opens_no_other() -> None:
    fleet = balanced()
    broken(fleet, REPLICAS[1])
    assert ups(fleet, 0.0) == [True, False, True] and status(fleet, 0.0).down is None
    flights = [fleet.started("d", 0.0, affinity=Affinity(number / 10)) for number in range(10)]
    assert {flight.member.ordinal for flight in flights if flight.member is not None} == {0, 2}
    assert status(fleet, 0.0).in_flight == 10
    assert fleet.another("d", 0.0, REPLICAS[:1]) and not fleet.another("d", 0.0, [REPLICAS[0], REPLICAS[2]])


def test_the_deployment_is_down_when_all_replicas_are_until_the_first_may_be_tried() -> None:
    fleet = balanced()
    for number, replica in enumerate(REPLICAS):
        broken(fleet, replica, now=float(number))
    known = status(fleet, 2.0 - 0.1)
    assert known.circuit == "open" and "cannot be reached" in (known.down or "") and known.retry_after == 1.0
    assert status(fleet, FIRST_COOL_OFF + 0.1).down is None
    trial = fleet.started("d", FIRST_COOL_OFF + 0.1)
    assert trial.member is not None and trial.member.replica == REPLICAS[0]
    assert status(fleet, FIRST_COOL_OFF + 0.1).down is not None
    fleet.ended(trial, None, FIRST_COOL_OFF + 0.2)
    assert status(fleet, FIRST_COOL_OFF + 0.2).circuit == "closed" and ups(fleet, 2.5) == [True, False, False]


def test_the_forecast_is_that_of_the_replica_which_the_request_would_get() -> None:
    fleet = balanced()
    for number, replica in enumerate(REPLICAS):
        fleet.loaded("d", replace(IDLE, queued_prefill_tokens=1000 * number), 0.0, 0.0, replica)
    for draw in (0.0, 0.3, 0.5, 0.9):
        for conversation in (None, 7, 8, 9):
            affinity = Affinity(draw, conversation, 100)
            known = fleet.snapshot(0.0, draw, affinity=affinity).deployments["d"]
            flight = fleet.started("d", 0.0, 100, affinity=affinity)
            assert known.backlog is not None and flight.member is not None
            assert flight.forecast_ms == forecast_ms(known.backlog, 100, 0, 0.0)
            fleet.abandoned(flight)


def test_what_was_sent_since_its_reading_counts_against_a_replica() -> None:
    fleet = balanced(2)
    for replica in REPLICAS[:2]:
        fleet.loaded("d", IDLE, 0.0, 0.0, replica)
    flights = [fleet.started("d", 0.0, 500, affinity=Affinity(0.9)) for _ in range(4)]
    assert sorted(f.member.ordinal for f in flights if f.member is not None) == [0, 0, 1, 1]


def test_a_replica_that_stops_to_say_how_busy_it_is_is_avoided_and_tried_once_it_is_back() -> None:
    fleet = balanced(2)
    broken(fleet, REPLICAS[0])
    for _ in range(SILENT_AFTER):
        fleet.missed("d", REPLICAS[0])
    later = LONGEST_COOL_OFF
    assert ups(fleet, later) == [False, True], "its circuit is half open, but it does not answer"
    assert fleet.started("d", later, affinity=Affinity(0.0)).member.ordinal == 1  # type: ignore[union-attr]
    broken(fleet, REPLICAS[0], later)
    fleet.loaded("d", IDLE, later + 0.5, later + 0.5, REPLICAS[0])
    assert ups(fleet, later + 0.5) == [True, True], "it need not wait for the end of a cool-off"


def test_replicas_none_of_which_says_how_busy_it_is_are_called_all_the_same() -> None:
    fleet = balanced(2)
    for replica in REPLICAS[:2]:
        for _ in range(SILENT_AFTER):
            fleet.missed("d", replica)
    assert status(fleet, 0.0).down is None
    assert {fleet.started("d", 0.0).member.ordinal for _ in range(2)} == {0, 1}  # type: ignore[union-attr]


def test_a_replica_that_is_gone_gets_nothing_new_and_its_number_is_given_again() -> None:
    fleet = balanced(2)
    running = at(fleet, REPLICAS[0])
    fleet.follow("d", [REPLICAS[1], REPLICAS[2]])
    assert [(m.ordinal, m.replica) for m in fleet.members("d", 0.0)] == [(0, REPLICAS[2]), (1, REPLICAS[1])]
    assert status(fleet, 0.0).in_flight == 1
    fleet.loaded("d", IDLE, 0.0, 0.0, REPLICAS[0])
    fleet.ended(running, None, 1.0)
    assert status(fleet, 1.0).in_flight == 0


def test_an_only_address_that_becomes_one_of_several_keeps_its_requests() -> None:
    fleet = Fleet(["d"])
    running = fleet.started("d", 0.0)
    fleet.follow("d", REPLICAS)
    assert fleet.balances and status(fleet, 0.0).in_flight == 1
    fleet.ended(running, UpstreamCut("broke off"), 1.0)
    assert status(fleet, 1.0).in_flight == 0 and ups(fleet, 1.0) == [True] * 3


def test_a_deployment_that_is_something_else_now_has_no_replicas_until_it_is_told() -> None:
    fleet = balanced()
    running = at(fleet, REPLICAS[0])
    fleet.adopt(["d"], ["d"])
    assert not fleet.balances and fleet.members("d", 0.0) == []
    fleet.first_token(running, 0.5)
    fleet.ended(running, None, 1.0, Usage(10, 10))
    assert status(fleet, 1.0).first_token_p95_ms is None and status(fleet, 1.0).in_flight == 0


@given(st.lists(st.tuples(st.sampled_from("sefg"), st.integers(0, 7)), max_size=60))
def test_no_order_of_events_makes_the_counts_of_replicas_drift(events: list[tuple[str, int]]) -> None:
    fleet, running = balanced(), list[Flight]()
    for number, (event, argument) in enumerate(events):
        now = number / 10
        if event == "s":
            running.append(fleet.started("d", now, 10, affinity=Affinity(argument / 8, argument)))
        elif event == "f" and argument:
            fleet.follow("d", [replica for index, replica in enumerate(REPLICAS) if argument >> index & 1])
        elif running and event == "e":
            fleet.ended(running.pop(argument % len(running)), UpstreamFailed("x") if argument & 1 else None, now)
        elif running and event == "g":
            fleet.abandoned(running.pop(argument % len(running)))
        members = {id(f.member): f.member for f in running if f.member is not None}
        assert status(fleet, now).in_flight == len(running)
        assert sum(member.in_flight for member in members.values()) == len(running)


# An engine with more to do than it can is not broken.

BUSY = EngineLoad(
    waiting=9,
    running=8,
    queued_prefill_tokens=5000,
    free_blocks=0,
    total_blocks=100,
    block_size=16,
    prefill_tokens_per_s=1000.0,
    decode_tokens_per_s=100.0,
    step_s=0.01,
    max_running=8,
    max_batch_tokens=100,
)


def busy_engine() -> Fleet:
    fleet = Fleet(["d"])
    fleet.loaded("d", BUSY, 0.0, 0.0)
    return fleet


def test_first_tokens_that_do_not_come_in_time_leave_the_circuit_of_an_engine_closed_that_serves_others() -> None:
    fleet = busy_engine()
    late = [fleet.started("d", 0.0) for _ in range(5)]
    fleet.first_token(fleet.started("d", 0.1), 0.5)
    for flight in late:
        fleet.ended(flight, UpstreamTimeout("no first token in time"), 0.9)
    assert status(fleet, 0.9).circuit == "closed"


@pytest.mark.parametrize("fleet", [busy_engine(), Fleet(["d"])], ids=["nobody was served", "it does not say its load"])
def test_first_tokens_that_do_not_come_in_time_open_it_otherwise(fleet: Fleet) -> None:
    late = [fleet.started("d", 0.0) for _ in range(FAILURES_TO_OPEN)]
    for flight in late:
        fleet.ended(flight, UpstreamTimeout("no first token in time"), 0.9)
    assert status(fleet, 0.9).circuit == "open"


def test_an_engine_that_stopped_saying_its_load_may_be_broken() -> None:
    fleet = busy_engine()
    late = [fleet.started("d", 0.0) for _ in range(FAILURES_TO_OPEN)]
    fleet.first_token(fleet.started("d", 0.1), 0.5)
    for flight in late:
        fleet.ended(flight, UpstreamTimeout("no first token in time"), 60.0)
    assert status(fleet, 60.0).circuit == "open"


def test_an_engine_that_refuses_one_request_on_arrival_is_there_for_the_others() -> None:
    fleet = busy_engine()
    for _ in range(10):
        attempt(fleet, UpstreamOverloaded("cannot start in time", retry_after=7.0), 0.1)
    assert status(fleet, 0.1).circuit == "closed" and status(fleet, 0.1).down is None


def test_a_queue_that_was_left_says_nothing_of_who_keeps_it() -> None:
    fleet = Fleet(["d"])
    for _ in range(10):
        attempt(fleet, UpstreamLate(), 0.0)
    assert status(fleet, 0.0).circuit == "closed"
    fleet = opened()
    later = FIRST_COOL_OFF + 0.1
    attempt(fleet, UpstreamLate(), later)
    assert status(fleet, later).circuit == "half_open" and status(fleet, later).down is None


def test_a_first_token_comes_soon_where_nearly_all_before_it_is_computed() -> None:
    fleet = Fleet(["d"])
    fleet.loaded("d", replace(BUSY, waiting=0, running=0, queued_prefill_tokens=0, free_blocks=100), 0.0, 0.0)
    first, last = fleet.started("d", 0.0, 100), fleet.started("d", 0.0, 900)
    assert fleet.comes_soon(first, SOON * 0.12, 0.1) and not fleet.comes_soon(last, SOON * 0.12, 0.1)
    assert fleet.comes_soon(last, SOON * 1.2, 0.1)
    assert not fleet.comes_soon(first, 100.0, 5.0), "nobody knows any more"
    fleet.first_token(first, 5.0)
    assert not fleet.comes_soon(first, 100.0, 0.1), "it has come"
