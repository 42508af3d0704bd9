"""The fleet's state: circuits open after failures and heal, in-flight counts never drift, latencies decay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import (
    ConnectFailed,
    GatewayError,
    UpstreamCut,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamUnauthorized,
)
from gateway.fleet import FAILURES_TO_OPEN, FIRST_COOL_OFF, LONGEST_COOL_OFF, Fleet, Flight
from gateway.types import DeploymentStatus


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
