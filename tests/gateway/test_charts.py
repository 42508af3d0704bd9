"""Pictures: written in both formats, the same for the same numbers, and refused in a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.charts import Chart, NoPicture, Series, draw

CHART = Chart(
    "cost by month",
    "tokens",
    "USD",
    [
        Series("local", [1e6, 1e9], [100, 110]),
        Series("cloud", [1e6, 1e9], [0.5, 500], "dashed"),
        Series("even", [2e8], [105], "points", ["here"]),
        Series("full", [9e8], [], "vertical"),
    ],
    log_x=True,
    log_y=True,
)
BARS = Chart("share", "", "%", [Series("", [0, 1], [30, 70], "bars")], ticks=["local", "cloud"])


def test_charts_are_drawn_side_by_side_in_both_formats(tmp_path: Path) -> None:
    """Text in an SVG stays text, and the same numbers make the same file."""
    for name in ("a.svg", "b.svg", "c.PNG"):
        draw([CHART, BARS], tmp_path / name, "title")
    svg = (tmp_path / "a.svg").read_text()
    assert svg.startswith("<?xml") and "cost by month" in svg and ">here<" in svg and ">cloud<" in svg
    assert svg == (tmp_path / "b.svg").read_text()
    assert (tmp_path / "c.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_drawn_says_why(tmp_path: Path) -> None:
    with pytest.raises(NoPicture, match=r"its name must end with \.svg or \.png"):
        draw([CHART], tmp_path / "a.gif")
    with pytest.raises(NoPicture, match=r"cannot write .*a\.svg \(No such file or directory\)"):
        draw([CHART], tmp_path / "no" / "a.svg")
