"""Plans: the steady state of an engine and the break-even with clouds, against sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog.hardware import HARDWARE, hardware
from gateway.catalog.models import architecture
from gateway.costs import Owned, Rented
from gateway.plan import SECONDS_PER_MONTH, Load, Plan, chart, document, made
from gateway.roofline import Roofline
from gateway.types import Price

MADE = Roofline.of(architecture("llama-3.1-8b"), hardware("h100-80gb"), "bf16")
CLOUDS = {"dear": Price(3000.0, 15_000.0), "cheap": Price(150.0, 600.0), "free": Price(0.001, 0.001)}
LOAD = Load(2.0, 1024, 256)


def plan(load: Load = LOAD, held: Rented | Owned | None = None, roofline: Roofline = MADE, max_batch: int = 64) -> Plan:
    return made(roofline, held or Rented(3.60), load, 0.4, CLOUDS, max_batch=max_batch)


def test_an_engine_carries_what_its_seconds_hold() -> None:
    """A request takes its prefill, and its share of as many decode steps as it has answer tokens."""
    result = plan()
    prefill_s = 1024 / MADE.prefill_tokens_per_s(1024)
    step_s = MADE.decode_step_s(64, 64 * (1024 + 128))
    assert result.most_sequences == MADE.kv_capacity_tokens // 1280
    assert result.batch == 64
    assert result.most_requests_per_s == pytest.approx(1 / (prefill_s + 256 * step_s / 64))
    assert result.utilization == pytest.approx(2 / result.most_requests_per_s)
    assert result.engines == 1
    assert plan(Load(30.0, 1024, 256)).engines == 3


def test_under_load_the_first_token_waits_and_tokens_come_slower() -> None:
    """Pollaczek-Khinchine by hand: 2 requests/s of 33 ms; and steps only in what prefill leaves of a second."""
    result = plan()
    p = MADE.prefill_s(1024)
    step = MADE.decode_step_s(round(result.concurrency), result.concurrency * 1152)
    assert result.first_token_idle_s == p
    expected = p + 2 * p * p / (2 * (1 - 2 * p)) + result.utilization * step / 2
    assert result.first_token_s == pytest.approx(expected)
    assert result.token_s == pytest.approx(step / (1 - 2 * p))


def test_littles_law_holds() -> None:
    """Sequences at once are requests a second times the seconds that an answer takes."""
    result = plan(Load(5.0, 1024, 256))
    assert result.concurrency == pytest.approx(5.0 * 256 * result.token_s, rel=0.05)


def test_the_break_even_is_where_both_months_cost_the_same() -> None:
    """3.60 USD an hour are 2,628 USD a month; a request costs 0.006912 USD at 3 and 15 USD a million."""
    result = plan()
    dear, cheap, free = result.break_even
    assert dear.usd_per_request == pytest.approx(1024 * 3e-6 + 256 * 15e-6)
    assert dear.tokens_per_month == pytest.approx(2628 / 0.006912 * 1280)
    assert dear.utilization == pytest.approx(2628 / 0.006912 / (result.most_requests_per_s * SECONDS_PER_MONTH))
    assert cheap.tokens_per_month == pytest.approx(2628 / 0.0003072 * 1280)
    assert (free.tokens_per_month, free.utilization) == (None, None)
    assert free.own_usd_per_request > free.usd_per_request


def test_a_provider_that_asks_less_than_the_energy_is_never_dearer() -> None:
    bought = Owned(1.0, idle_w=0, busy_w=1e9)
    assert plan(held=bought).break_even[1].tokens_per_month is None


def test_the_month_is_all_engines_and_the_energy_of_the_work() -> None:
    assert plan().usd_per_month == pytest.approx(2628)
    assert plan(Load(30.0, 1024, 256)).usd_per_month == pytest.approx(3 * 2628)
    bought = Owned(43_800, idle_w=0, busy_w=1000, years=5, maintenance=0, usd_per_kwh=0.1, pue=1)
    busy = plan(held=bought).utilization
    assert plan(held=bought).usd_per_month == pytest.approx(730 * (1.0 + 0.1 * busy))


def test_a_chart_has_the_engine_each_cloud_and_where_they_meet() -> None:
    drawn = chart(plan())
    assert [series.label for series in drawn.series] == [
        "llama-3.1-8b on h100-80gb, bf16",
        *CLOUDS,
        "break-even",
        "this load",
    ]
    met = drawn.series[-2]
    assert met.ys == pytest.approx([2628, 2628])
    assert drawn.series[-1].xs == [LOAD.tokens_per_month]
    assert min(drawn.series[0].ys) == pytest.approx(2628) and max(drawn.series[0].ys) == pytest.approx(2 * 2628)


def test_a_document_says_how_it_was_made() -> None:
    told = document(plan())
    assert told["efficiency"] == MADE.efficiency.source
    assert told["hardware"] == "h100-80gb" and told["quantization"] == "bf16"


@given(
    device=st.sampled_from(sorted(set(HARDWARE) - {"cpu-host"})),
    rate=st.floats(1e-3, 1e3),
    prompt=st.integers(1, 4096),
    output=st.integers(1, 2048),
    max_batch=st.integers(1, 256),
    usd=st.floats(0.01, 100),
)
def test_no_plan_promises_what_it_cannot_hold(
    device: str, rate: float, prompt: int, output: int, max_batch: int, usd: float
) -> None:
    """Engines carry the load, sequences fit, waiting is never negative, and a break-even lies within one engine."""
    roofline = Roofline.of(architecture("qwen3-4b"), hardware(device), "fp16" if device == "v100-32gb" else "bf16")
    result = plan(Load(rate, prompt, output), Rented(usd), roofline, max_batch)
    assert result.engines * result.most_requests_per_s >= rate * (1 - 1e-9)
    assert 0 < result.utilization <= 1 + 1e-9
    assert 0 <= result.concurrency <= result.batch <= result.most_sequences
    assert result.first_token_s >= result.first_token_idle_s > 0
    assert result.token_s > 0
    for other in result.break_even:
        assert (other.tokens_per_month is None) == (other.utilization is None)
        assert other.utilization is None or 0 < other.utilization <= 1
        if other.utilization is not None:
            assert other.own_usd_per_request <= other.usd_per_request * (1 + 1e-5)


@given(rate=st.floats(0.01, 10.0), more=st.floats(1.0, 3.0))
def test_more_load_is_never_faster_and_never_dearer_by_the_token(rate: float, more: float) -> None:
    one, other = plan(Load(rate, 512, 128)), plan(Load(rate * more, 512, 128))
    if other.engines == one.engines:
        assert other.first_token_s >= one.first_token_s
        assert other.token_s >= one.token_s * (1 - 1e-9)
        assert other.at_load.full_price().output <= one.at_load.full_price().output


def test_what_was_measured_replaces_what_is_assumed() -> None:
    """An engine that is measured at what the roofline says has the roofline's speed; at half of it, half."""
    as_assumed = MADE.measured(MADE.prefill_tokens_per_s(), 1 / MADE.decode_step_s(1, 1024))
    assert as_assumed.prefill_tokens_per_s() == pytest.approx(MADE.prefill_tokens_per_s())
    assert as_assumed.decode_step_s(1, 1024) == pytest.approx(MADE.decode_step_s(1, 1024))
    half = MADE.measured(MADE.prefill_tokens_per_s() / 2, 0.5 / MADE.decode_step_s(1, 1024))
    assert half.prefill_tokens_per_s() == pytest.approx(MADE.prefill_tokens_per_s() / 2)
    assert half.decode_step_s(1, 1024) == pytest.approx(2 * MADE.decode_step_s(1, 1024))
    assert half.efficiency.source.startswith("measured: 2")
    assert replace(half, efficiency=MADE.efficiency).memory == MADE.memory
