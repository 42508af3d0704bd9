"""Pictures of what the command line works out: lines, points and bars as SVG or PNG, by matplotlib.

Owns the look of all pictures and the only import of matplotlib, which is an extra (`hybridgate[charts]`) and slow to
import, so it happens when a picture is drawn. Refuses to decide what is worth drawing: a `Chart` is plain numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SUFFIXES = (".svg", ".png")

# Colours that stay apart in print and for most eyes: Okabe and Ito (2008), then darker ones.
_COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a900", "#000000"),
    *("#5d3a9b", "#994f00", "#005f3c", "#7f0000", "#1a85ff", "#666666"),
)
_LEGEND_INSIDE = 6  # entries that leave room for the picture


class NoPicture(Exception):
    """A picture that cannot be drawn, in a sentence with the fix."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour with their name in the legend. `line` connects them, `dashed` too, `points` does not and
    writes each of `names` beside its point, `bars` stand on the axis. `vertical` is a line at each x and has no y."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: Literal["line", "dashed", "points", "bars", "vertical"] = "line"
    names: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Chart:
    """One pair of axes. `ticks` name the x of bars 0, 1, ..."""

    title: str
    x: str
    y: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[str] = ()


def draw(charts: Sequence[Chart], path: str | Path, title: str = "") -> None:
    """Write the charts side by side to `path`, in the format that its suffix names. Raises NoPicture."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise NoPicture(f"{path} is no picture: its name must end with {' or '.join(SUFFIXES)}")
    try:
        from matplotlib import rc_context  # noqa: PLC0415 - slow, and an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise NoPicture("pictures need matplotlib: pip install 'hybridgate[charts]'") from None
    # The same numbers make the same file, and text in it stays text.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "hybridgate"}):
        figure = Figure(figsize=(7.5 * len(charts), 5), layout="constrained")
        figure.suptitle(title)
        for position, chart in enumerate(charts, 1):
            _fill(figure.add_subplot(1, len(charts), position), chart)
        try:
            figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise NoPicture(f"cannot write {path} ({error.strerror})") from None


def _fill(axes: Any, chart: Chart) -> None:
    axes.set_prop_cycle(color=_COLOURS)
    axes.set_title(chart.title, fontsize=11)
    axes.set_xlabel(chart.x)
    axes.set_ylabel(chart.y)
    if chart.log_x:
        axes.set_xscale("log")
    if chart.log_y:
        axes.set_yscale("log")
    if any(series.names for series in chart.series):
        axes.margins(x=0.18)  # names stand beside their points, those of the last ones too
    for series in chart.series:
        _add(axes, series)
    if chart.ticks:
        axes.set_xticks(range(len(chart.ticks)), chart.ticks, rotation=30, ha="right")
    axes.grid(visible=True, alpha=0.3)
    labels = sum(1 for series in chart.series if series.label)
    if labels > _LEGEND_INSIDE:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    elif labels:
        axes.legend(fontsize=8)


def _add(axes: Any, series: Series) -> None:
    match series.style:
        case "line":
            axes.plot(series.xs, series.ys, label=series.label, linewidth=2)
        case "dashed":
            axes.plot(series.xs, series.ys, label=series.label, linestyle="--", linewidth=1)
        case "points":
            axes.plot(series.xs, series.ys, label=series.label, linestyle="", marker="o", zorder=3)
            for name, x, y in zip(series.names, series.xs, series.ys, strict=False):
                axes.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        case "bars":
            axes.bar(series.xs, series.ys, label=series.label)
        case "vertical":
            for x in series.xs:
                axes.axvline(x, label=series.label, color="0.5", linestyle=":")
