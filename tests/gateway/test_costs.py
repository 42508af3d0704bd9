"""What a token costs, against sums worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.catalog.hardware import HARDWARE
from gateway.catalog.models import architecture
from gateway.costs import Owned, Rented, Running, Surcharge, Throughput
from gateway.roofline import Roofline
from gateway.types import Price, Usage

FAST = Throughput(input=10_000, output=1000)


def test_a_rented_hour_is_shared_out_over_the_busy_seconds() -> None:
    """3.60 USD an hour are 0.001 USD a second; at half utilization a busy second carries two."""
    running = Running(Rented(3.60), FAST, utilization=0.5)
    assert running.full_price() == Price(200.0, 2000.0)
    assert running.price() == Price(100.0, 1000.0)


def test_rented_hours_that_are_paid_either_way_cost_nothing_more_by_the_token() -> None:
    """Only where the operator says so; the bill stays what it is, and the sentence says why."""
    running = Running(Rented(3.60, capacity="fixed"), FAST, utilization=0.5)
    assert running.price() == Price(0.0, 0.0)
    assert running.full_price() == Price(200.0, 2000.0)
    assert "0, since the rented hours are paid either way" in running.basis()


def test_what_was_bought_costs_years_upkeep_power_and_cooling() -> None:
    """43,800 USD over 5 years with a tenth of it a year for upkeep: 1.00 + 0.50 USD an hour. 500 W idle and 1 kW more
    when busy, at PUE 1.5 and 0.20 USD a kWh: 0.15 and 0.30 USD an hour. 0.35 USD for the host, 146 USD a month."""
    owned = Owned(
        43_800, idle_w=500, busy_w=1000, years=5, maintenance=0.1, host_usd_per_hour=0.35, usd_per_kwh=0.2, pue=1.5
    )
    running = Running(owned, FAST, utilization=0.5, usd_per_month=146)
    assert owned.fixed_per_hour == pytest.approx(1.00 + 0.50 + 0.15 + 0.35)
    assert running.fixed_per_hour == pytest.approx(2.00 + 0.20)
    per_second = (2.20 / 0.5 + 0.30) / 3600
    assert running.full_price().output == pytest.approx(per_second / 1000 * 1e9, rel=1e-5)
    assert running.full_price().input == pytest.approx(per_second / 10_000 * 1e9, rel=1e-5)
    assert running.price().output == pytest.approx(0.30 / 3600 / 1000 * 1e9, rel=1e-5)
    assert "energy above idle" in running.basis()


def test_bills_at_the_stated_utilization_add_up_to_what_the_month_costs() -> None:
    """A month whose hours are 40% busy, billed token by token, comes to what its hours and its energy cost."""
    running = Running(Owned(30_000, 100, 600), FAST, utilization=0.4, usd_per_month=50)
    seconds = 730 * 3600 * 0.4
    tokens = Usage(round(seconds / 2 * FAST.input), round(seconds / 2 * FAST.output))
    assert running.full_price().cost(tokens) / 1e9 == pytest.approx(
        running.usd_for(tokens.prompt_tokens, tokens.completion_tokens), rel=1e-4
    )


def test_the_catalog_expects_a_batch() -> None:
    made = Roofline.of(architecture("llama-3.1-8b"), HARDWARE["h100-80gb"], "bf16")
    expected = Throughput.of(made)
    assert expected.input == made.prefill_tokens_per_s(1024)
    assert expected.output == made.decode_tokens_per_s(32, 1024)
    assert expected.source == "roofline, 32 sequences of 1024 tokens"


def test_around_a_provider_prompts_are_sent_and_months_are_shared() -> None:
    """0.09 USD a GB x 4 bytes: 0.36 nano-dollars a prompt token. 30 USD over 10 million tokens: 3,000 nano-dollars."""
    extra = Surcharge(data_transfer_usd_per_gb=0.09, usd_per_month=30, tokens_per_month=10_000_000)
    base = Price(150.0, 600.0, 75.0)
    assert extra.price(base) == Price(150.36, 600.0, 75.36)
    assert extra.full_price(base) == Price(3150.36, 3600.0, 3075.36)
    assert Surcharge().full_price(base) == base
    tiered = replace(base, beyond=(1000, base))
    assert extra.price(tiered).beyond == (1000, extra.price(base))


held = st.one_of(
    st.builds(Rented, st.floats(1e-9, 1e6), st.floats(0, 1e3), st.just("elastic")),
    st.builds(
        Owned,
        st.floats(1e-9, 1e9),
        idle_w=st.floats(0, 1e5),
        busy_w=st.floats(1, 1e5),
        years=st.floats(0.1, 50),
        maintenance=st.floats(0, 1),
        host_usd_per_hour=st.floats(0, 1e3),
        usd_per_kwh=st.floats(1e-9, 10),
        pue=st.floats(1, 5),
    ),
)
running = st.builds(
    Running,
    held,
    st.builds(Throughput, st.floats(1e-3, 1e9), st.floats(1e-3, 1e9)),
    st.floats(1e-4, 1.0),
    st.floats(0, 1e6),
)


@given(running)
def test_no_token_is_free_and_a_bill_is_never_less_than_one_more_token(case: Running) -> None:
    marginal, full = case.price(), case.full_price()
    assert 0 < marginal.input <= full.input * 1.00001
    assert 0 < marginal.output <= full.output * 1.00001


@given(running, st.floats(1e-4, 1.0))
def test_a_busier_engine_is_cheaper_by_the_token_and_costs_as_much_for_one_more(case: Running, other: float) -> None:
    less, more = sorted((case.utilization, other))
    idle, busy = replace(case, utilization=less), replace(case, utilization=more)
    assert idle.full_price().output >= busy.full_price().output
    assert idle.full_price().input >= busy.full_price().input
    assert idle.price() == busy.price()


@given(running, st.floats(1.0, 100.0))
def test_a_faster_engine_is_cheaper(case: Running, factor: float) -> None:
    faster = Throughput(case.throughput.input * factor, case.throughput.output * factor)
    assert replace(case, throughput=faster).full_price().output <= case.full_price().output
