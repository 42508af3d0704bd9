"""Measured rates."""

from __future__ import annotations

import pytest

from local_engine.pace import Pace


def test_nothing_measured_is_none() -> None:
    pace = Pace()
    assert (pace.prefill_rate, pace.decode_rate, pace.step_seconds) == (None, None, None)


def test_the_prefill_rate_does_not_charge_the_fixed_cost_of_a_step() -> None:
    """Steps cost 10 ms and 0.1 ms a token: 10,000 tokens a second, though short prompts alone look like 500."""
    pace = Pace()
    for tokens in (5, 6, 5, 7, 5):
        pace.record(seconds=0.010 + tokens * 0.0001, prefill_tokens=tokens, decode_tokens=0)
    pace.record(seconds=0.010, prefill_tokens=0, decode_tokens=4)
    assert pace.prefill_rate == pytest.approx(10_000, rel=0.01)


@pytest.mark.parametrize("tokens", [[100], [100, 100], [200, 100]])
def test_steps_that_determine_no_line_give_the_ratio(tokens: list[int]) -> None:
    pace = Pace()
    for size in tokens:
        # Each step takes the same, whatever it computes, or less for more: no slope to believe.
        pace.record(seconds=0.1, prefill_tokens=size, decode_tokens=0)
    assert pace.prefill_rate == pytest.approx(sum(tokens) / (0.1 * len(tokens)))


def test_decoding_is_measured_in_steps_that_only_decode() -> None:
    pace = Pace()
    pace.record(seconds=1.0, prefill_tokens=500, decode_tokens=8)
    pace.record(seconds=0.01, prefill_tokens=0, decode_tokens=8)
    assert pace.decode_rate == pytest.approx(800)
    assert pace.step_seconds == pytest.approx(0.01)
