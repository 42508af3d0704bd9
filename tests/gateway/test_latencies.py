"""Latencies as measured of late: by the prompt's size, from streams and from whole answers, and forgotten."""

from __future__ import annotations

import random

import pytest

from gateway.errors import UpstreamFailed
from gateway.fleet import Fleet
from gateway.latencies import Latencies
from gateway.snapshot import DeploymentStatus
from gateway.targets import FAILURES_TO_OPEN, FIRST_COOL_OFF
from gateway.types import Usage


def looked_up(latencies: Latencies, now: float) -> Latencies:
    latencies.look_up(now + 1)
    return latencies


def test_first_tokens_are_kept_apart_by_the_size_of_the_prompt() -> None:
    latencies = Latencies()
    for _ in range(50):
        latencies.first_token(40.0, 100, 0.0)
        latencies.first_token(900.0, 9000, 0.0)
    looked_up(latencies, 0.0)
    assert latencies.by_size == pytest.approx((40, 900, 900, 900, 900), rel=0.05), "unmeasured: as the next larger"
    assert latencies.first_token_p95_ms == pytest.approx(900, rel=0.05)


def test_larger_prompts_than_measured_are_as_the_largest_that_was() -> None:
    latencies = Latencies()
    latencies.first_token(40.0, 100, 0.0)
    assert looked_up(latencies, 0.0).by_size == pytest.approx((40,) * 5, rel=0.05)


def test_a_token_takes_its_share_of_what_follows_the_first() -> None:
    latencies = Latencies()
    latencies.rest(1000.0, 100, 0.0)
    latencies.rest(0.0, 0, 0.0)
    assert looked_up(latencies, 0.0).per_token_p95_ms == pytest.approx(10.0, rel=0.05)


def test_whole_answers_tell_both_times_by_the_line_through_them() -> None:
    latencies, chance = Latencies(), random.Random(5)
    for second in range(300):
        tokens = chance.randint(10, 400)
        latencies.whole(300 + 20 * tokens + chance.gauss(0, 10), 100, tokens, second * 0.1)
    looked_up(latencies, 30.0)
    assert latencies.by_size[0] == pytest.approx(300, rel=0.25)
    assert latencies.per_token_p95_ms == pytest.approx(20, rel=0.15)


def test_whole_answers_of_a_token_are_first_tokens_and_a_single_long_one_says_nothing() -> None:
    latencies = Latencies()
    latencies.whole(9000.0, 100, 400, 0.0)
    assert looked_up(latencies, 0.0).by_size == () and latencies.per_token_p95_ms is None
    latencies.whole(120.0, 100, 1, 2.0)
    assert looked_up(latencies, 3.0).by_size == pytest.approx((120,) * 5, rel=0.05)


def test_a_deployment_that_nobody_asks_is_forgotten_rather_than_shunned_for_ever() -> None:
    fleet = Fleet(["d"])
    for second in range(10):
        flight = fleet.started("d", float(second), 100)
        fleet.first_token(flight, second + 0.9)
        fleet.ended(flight, None, second + 0.95)
    assert fleet.snapshot(20.0, 0.0).deployments["d"].first_token_p95_ms == pytest.approx(900, rel=0.05)
    assert fleet.snapshot(900.0, 0.0).deployments["d"] == DeploymentStatus()


def test_the_fleet_learns_from_streams_and_whole_answers() -> None:
    fleet = Fleet(["d"])
    for second in range(5):
        stream = fleet.started("d", float(second), 100)
        fleet.first_token(stream, second + 0.1)
        fleet.ended(stream, None, second + 1.1, Usage(100, 101))
        fleet.ended(fleet.started("d", float(second), 100, stream=False), None, second + 0.05, Usage(100, 1))
    status = fleet.snapshot(10.0, 0.0).deployments["d"]
    assert status.per_token_p95_ms == pytest.approx(10.0, rel=0.05)
    assert status.first_token_p95_ms_by_size[0] == pytest.approx(100.0, rel=0.05)


def test_after_an_outage_the_estimate_forgets() -> None:
    fleet = Fleet(["d"])
    flight = fleet.started("d", 0.0, 100)
    fleet.first_token(flight, 0.5)
    fleet.ended(flight, None, 0.6)
    for _ in range(FAILURES_TO_OPEN):
        fleet.ended(fleet.started("d", 1.0), UpstreamFailed("broken"), 1.0)
    later = 1.0 + FIRST_COOL_OFF + 0.1
    fleet.ended(fleet.started("d", later), None, later)
    assert fleet.snapshot(later, 0.0).deployments["d"] == DeploymentStatus()


def test_likely_outputs_are_the_callers_own_or_else_everybodys() -> None:
    fleet = Fleet(["d"])
    assert fleet.likely_output("acme", "k", "auto") is None
    for _ in range(20):
        flight = fleet.started("d", 0.0, 100, asker=("acme", "k", "auto"), answers=2)
        fleet.ended(flight, None, 1.0, Usage(100, 80))
    assert fleet.likely_output("acme", "k", "auto") == pytest.approx(40, abs=2)
    assert fleet.likely_output("other", "k2", "auto") == pytest.approx(40, abs=2)
    assert fleet.likely_output("acme", "k", "gpt-4o") is None
    cut = fleet.started("d", 2.0, 100, asker=("acme", "k3", "gpt-4o"))
    fleet.ended(cut, None, 3.0, None)
    assert fleet.likely_output("acme", "k3", "gpt-4o") is None, "a client that left says nothing of the length"
