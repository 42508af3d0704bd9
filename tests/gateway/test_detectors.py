"""The detectors' recall and precision on generated texts, as `python -m tests.bench.detectors` prints them."""

from __future__ import annotations

import pytest

from gateway.labels import KINDS as KNOWN
from gateway.labels import Scanner
from tests.bench.detectors.__main__ import SEED
from tests.bench.detectors.data import FAMILIES, KINDS, Sample, samples
from tests.bench.detectors.measure import score


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_detectors_meet_their_bars(family: str) -> None:
    """On ways of writing that the patterns were tuned on, and on those that they were not."""
    scanner = Scanner(KNOWN)
    drawn = list(samples(family, SEED, 500))
    result = score("ours", drawn, [scanner.scan((sample.text,)) for sample in drawn], None)
    assert result.missed_bars() == []


def test_there_are_texts_for_every_detector() -> None:
    assert set(KINDS) == KNOWN


def test_the_same_seed_draws_the_same_texts() -> None:
    assert list(samples("open", 1, 2)) == list(samples("open", 1, 2))
    assert list(samples("open", 1, 2)) != list(samples("open", 2, 2))


def test_what_is_allowed_counts_neither_way() -> None:
    """A kind that was not asked for is wrong, in a look-alike as well; one that a sample allows is not."""
    drawn = [
        Sample("a", "email", ""),
        Sample("b", "email", ""),
        Sample("c", "password", "", frozenset({"api_key"})),
        Sample("d", None, "orders"),
    ]
    found = [{"email"}, {"phone"}, {"password", "api_key"}, {"phone"}]
    result = score("ours", drawn, [frozenset(kinds) for kinds in found], 15.1)
    assert (result.scores["email"].recall, result.scores["email"].precision) == (0.5, 1.0)
    assert (result.scores["phone"].found, result.scores["phone"].wrong) == (0, 2)
    assert result.scores["api_key"].wrong == 0
    assert result.labelled_share == 1.0
    assert "email: recall 0.5000 < 0.95" in result.missed_bars()
    assert any("15.1 > 15.0" in bar for bar in result.missed_bars())
    assert any("15.1 > 14.8" in bar for bar in result.missed_bars(presidio_us=740.0))
    assert not any("15.1" in bar for bar in result.missed_bars(presidio_us=1500.0))
