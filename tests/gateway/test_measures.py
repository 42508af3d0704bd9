"""What is remembered of measurements: quantiles and lines that forget, output lengths within bounds."""

from __future__ import annotations

import random

import pytest

from gateway.measures import DecayingHistogram, DecayingLine, OutputLengths


@pytest.mark.parametrize("q", [0.5, 0.95])
def test_a_quantile_is_within_its_bucket_of_the_exact_one(q: float) -> None:
    chance = random.Random(7)
    samples = [chance.lognormvariate(4, 0.6) for _ in range(4000)]
    histogram = DecayingHistogram()
    for sample in samples:
        histogram.add(sample, 0.0)
    assert histogram.quantile(q) == pytest.approx(sorted(samples)[int(q * len(samples))], rel=0.05)


def test_old_measurements_fade() -> None:
    histogram = DecayingHistogram()
    for _ in range(1000):
        histogram.add(10.0, 0.0)
    for _ in range(100):
        histogram.add(500.0, 600.0)
    assert histogram.quantile(0.5) == pytest.approx(500.0, rel=0.05)


def test_years_of_measurements_do_not_overflow() -> None:
    histogram = DecayingHistogram()
    for day in range(1000):
        histogram.add(10.0, day * 86400.0)
    assert histogram.quantile(0.95) == pytest.approx(10.0, rel=0.05)


def test_what_is_remembered_is_worth_less_every_half_life() -> None:
    histogram = DecayingHistogram(half_life=60.0)
    for _ in range(8):
        histogram.add(10.0, 100.0)
    assert histogram.weight(100.0) == pytest.approx(8.0) and histogram.weight(280.0) == pytest.approx(1.0)
    histogram.clear()
    assert histogram.weight(280.0) == 0.0 and histogram.quantile(0.5) is None


@pytest.mark.parametrize(("amount", "expected"), [(0.5, 100.0), (2.5, 10.0), (3.5, 1.0), (7.0, None)])
def test_the_heaviest_amount_ends_where_more_would_be_above(amount: float, expected: float | None) -> None:
    histogram = DecayingHistogram(half_life=60.0)
    for value, weight in ((1.0, 6.0), (10.0, 2.0), (100.0, 4.0)):
        histogram.add(value, 0.0, weight)
    found = histogram.heaviest(amount, 60.0)  # by then all of it weighs half
    assert found == (None if expected is None else pytest.approx(expected, rel=0.05))


def test_a_line_is_found_and_an_old_one_forgotten() -> None:
    line, chance = DecayingLine(half_life=60.0), random.Random(3)
    for second in range(200):
        x = chance.uniform(10, 500)
        line.add(x, 900.0 + 40 * x, float(second))
    for second in range(1000, 1200):
        x = chance.uniform(10, 500)
        line.add(x, 200.0 + 10 * x + chance.gauss(0, 20), float(second))
    intercept, slope = line.fit() or (0.0, 0.0)
    assert intercept == pytest.approx(200.0, abs=30) and slope == pytest.approx(10.0, rel=0.05)


@pytest.mark.parametrize("points", [[(5.0, 9.0)], [(100.0, 9.0)] * 50], ids=["few", "all alike"])
def test_points_that_do_not_tell_make_no_line(points: list[tuple[float, float]]) -> None:
    line = DecayingLine()
    for x, y in points:
        line.add(x, y, 0.0)
    assert line.fit() is None


def test_neither_part_of_a_line_is_negative() -> None:
    line = DecayingLine()
    for x in range(10, 60):
        line.add(float(x), 3.0 * x - 20, 0.0)
    intercept, slope = line.fit() or (-1.0, -1.0)
    assert intercept == 0.0 and 2.0 < slope < 3.0


def test_lengths_are_known_by_key_and_the_least_recent_go() -> None:
    lengths = OutputLengths(0.6, most=2)
    for tokens in range(1, 101):
        lengths.add("a", tokens, 0.0)
    lengths.add("b", 7, 0.0)
    assert lengths.likely("a") == pytest.approx(60, rel=0.06) and lengths.likely("b") == pytest.approx(7, rel=0.05)
    lengths.add("a", 50, 0.0)
    lengths.add("c", 9, 0.0)
    assert lengths.likely("b") is None and lengths.likely("a") is not None and len(lengths) == 2


def test_lengths_follow_a_caller_that_changes() -> None:
    lengths = OutputLengths(0.6, half_life=600.0)
    for second in range(300):
        lengths.add("a", 1000, float(second))
    for second in range(3600, 3900):
        lengths.add("a", 20, float(second))
    assert lengths.likely("a") == pytest.approx(20, rel=0.05)
