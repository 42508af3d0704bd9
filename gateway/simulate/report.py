"""What a comparison says: as tables, as a JSON document, as Markdown, as charts. Pure.

Owns the words and units. Money is in dollars, times in milliseconds, shares between 0 and 1 (per cent in Markdown).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gateway.charts import Chart, Series
from gateway.simulate.bound import Bound
from gateway.simulate.compare import Comparison, Entry
from gateway.simulate.score import ClassScore
from gateway.simulate.world import World
from gateway.types import NUSD_PER_USD, usd


def document(found: Comparison, about: Mapping[str, Any]) -> dict[str, Any]:
    """Everything, every threshold included. `about` says what was simulated."""
    return {
        "simulated": {**about, "engines": {name: model.source for name, model in found.world.fleet.engines.items()}},
        "routers": [_entry(found, entry) for entry in found.entries],
        "best_threshold": found.best_threshold,
        "bound": None if found.reference is None else _bound(found.reference),
        "bound_by_attainment": [_bound(bound) for bound in found.curve],
    }


def _entry(found: Comparison, entry: Entry) -> dict[str, Any]:
    own = entry.score
    return {
        "router": own.router,
        "kind": entry.kind,
        "requests": own.requests,
        "cost_usd": float(usd(own.cost_nusd)),
        "billed_usd": float(usd(own.billed_nusd)),
        "attainment": own.met,
        "classes": {name: _class(told) for name, told in own.classes.items()},
        "local_share": own.local,
        "spill_share": own.spilled,
        "engines_used": own.used,
        "engines_worth": own.worth,
        "refused": own.refused,
        "refusals": dict(own.refusals),
        "failovers": own.failovers,
        "privacy_violations": own.violations,
        "preempted": own.preempted,
        "by_deployment": dict(sorted(own.by_deployment.items())),
        "ended_s": own.ended_s,
        "dominated_by": list(entry.dominated_by),
        "cost_over_bound": found.ratio(entry),
        "cost_over_bound_at_own_attainment": entry.ratio,
    }


def _class(told: ClassScore) -> dict[str, Any]:
    return {
        "requests": told.requests,
        "attainment": told.met,
        "first_token_p50_ms": told.first_token_p50_ms,
        "first_token_p95_ms": told.first_token_p95_ms,
    }


def _bound(bound: Bound) -> dict[str, Any]:
    return {
        "attainment": bound.attainment,
        "cost_usd": bound.cost_nusd / NUSD_PER_USD,
        "local_share": bound.local_share,
    }


Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def tables(found: Comparison) -> list[Table]:
    """Headings and cells: what it cost and what was met, with the bound last; where requests went; each latency class,
    as the share that met it, and the first token's median and 95th percentile."""
    return [_sums(found), _places(found), _by_class(found)]


def _sums(found: Comparison) -> Table:
    rows = [
        [
            entry.score.router,
            dollars(entry.score.cost_nusd),
            _times(found.ratio(entry)),
            dollars(entry.score.billed_nusd),
            percent(entry.score.met),
            str(entry.score.violations),
        ]
        for entry in found.told
    ]
    if found.reference is not None:
        bound = found.reference
        rows.append(["lower bound", dollars(bound.cost_nusd), "1.000", "", percent(bound.attainment), ""])
    return ("router", "cost, USD", "of bound", "billed, USD", "SLO met", "private out"), rows


def _places(found: Comparison) -> Table:
    rows = [
        [
            entry.score.router,
            percent(entry.score.local),
            percent(entry.score.spilled),
            percent(entry.score.used),
            percent(entry.score.worth),
            f"{entry.score.refused:,}",
            f"{entry.score.failovers:,}",
        ]
        for entry in found.told
    ]
    if found.reference is not None:
        local = found.reference.local_share
        rows.append(["lower bound", percent(local), percent(1 - local), *[""] * 4])
    return ("router", "local", "spilled", "engines busy", "at best rate", "refused", "failovers"), rows


def _by_class(found: Comparison) -> Table:
    classes = found.entries[0].score.classes
    columns = ["SLO met, first token p50 / p95", *(f"{name} ({told.requests:,})" for name, told in classes.items())]
    return columns, [[entry.score.router, *map(_class_cell, entry.score.classes.values())] for entry in found.told]


def _class_cell(told: ClassScore) -> str:
    if told.first_token_p50_ms is None or told.first_token_p95_ms is None:
        return f"{percent(told.met)} -"
    return f"{percent(told.met)}  {seconds(told.first_token_p50_ms)} / {seconds(told.first_token_p95_ms)}"


def notes(found: Comparison) -> list[str]:
    """Sentences that say how the policies stand."""
    said = []
    for entry in found.entries:
        if entry.kind != "policy":
            continue
        own = entry.score
        if found.reference is not None and entry.bound is not None:
            short = (found.reference.attainment - own.met) * 100
            said.append(
                f"{own.router}: {_times(found.ratio(entry))} times the bound's cost, {_times(entry.ratio)} times the "
                f"bound's at its own attainment, {abs(short):.2f} points {'below' if short >= 0 else 'above'} the "
                "bound's attainment."
            )
        if entry.dominated_by:
            said.append(f"{own.router} is dominated by {', '.join(entry.dominated_by)}.")
        elif len(found.entries) > 1:
            said.append(f"{own.router} is dominated by none of the others.")
        said.append(f"{own.router}: {own.violations} private requests were sent where no invariant lets them.")
    return said


def markdown(found: Comparison, about: Mapping[str, Any]) -> str:
    """Both tables and the notes, with what was simulated above them."""
    told = ", ".join(f"{key} {value}" for key, value in about.items())
    parts = [f"Simulated: {told}.", *(_table(*cells) for cells in tables(found))]
    parts.append("\n".join(f"- {note}" for note in notes(found)))
    return "\n\n".join(parts) + "\n"


def _table(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def pictures(found: Comparison) -> list[Chart]:
    """Cost over attainment with the bound, and the first policy's engines over time."""
    return [_trade(found), *_timeline(found.world, found)]


LEAST_MISSED = 0.01
"""Per cent of the requests: what missed less is drawn there, since a logarithm has no place for none."""


def _trade(found: Comparison) -> Chart:
    """On the x axis what was missed and not what was met, so that 99 and 99.9 % are apart."""
    series = []
    if found.curve:
        xs = [_missed(bound.attainment) for bound in found.curve]
        series.append(Series("lower bound", xs, [bound.cost_nusd / NUSD_PER_USD for bound in found.curve]))
    groups = {
        "policies": [entry for entry in found.told if entry.kind == "policy"],
        "baselines": [entry for entry in found.told if entry.kind == "baseline"],
    }
    for label, entries in groups.items():
        if entries:
            names = [entry.score.router.rsplit("/", 1)[-1].removesuffix(".yaml") for entry in entries]
            series.append(_points(label, entries, "points", names))
    others = [entry for entry in found.entries if entry.kind == "baseline" and entry not in found.told]
    if others:
        series.append(_points("other thresholds", others, "dashed"))
    title = "Cost and misses: left and low is better"
    return Chart(title, "requests whose SLO is missed, %", "cost, USD", series, log_x=True)


def _points(
    label: str, entries: Sequence[Entry], style: Literal["points", "dashed"], names: Sequence[str] = ()
) -> Series:
    costs = [entry.score.cost_nusd / NUSD_PER_USD for entry in entries]
    return Series(label, [_missed(entry.score.met) for entry in entries], costs, style, names)


def _missed(attainment: float) -> float:
    return max(LEAST_MISSED, (1 - attainment) * 100)


_SMOOTHED_S = 15


def _timeline(world: World, found: Comparison) -> list[Chart]:
    run = found.runs[0]
    used, queue = [], []
    for name, samples in run.samples.items():
        times = [sample.at for sample in samples]
        used.append(Series(f"{name}: computing, %", times, _smooth([sample.busy * 100 for sample in samples])))
        queue.append(Series(f"{name}: running", times, _smooth([float(sample.running) for sample in samples])))
        queue.append(Series(f"{name}: waiting", times, _smooth([float(sample.waiting) for sample in samples])))
    if not used:
        return []
    return [
        Chart(f"Engines under {run.router}", "seconds from the first arrival", "time computing, %", used),
        Chart(f"Requests at the engines under {run.router}", "seconds from the first arrival", "requests", queue),
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """Means over the last seconds, so that the line can be read."""
    return [sum(some := values[max(0, i - _SMOOTHED_S + 1) : i + 1]) / len(some) for i in range(len(values))]


def dollars(nusd: float) -> str:
    """An amount to four digits."""
    return f"{nusd / NUSD_PER_USD:,.4g}" if nusd < 1000 * NUSD_PER_USD else f"{nusd / NUSD_PER_USD:,.0f}"


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{share * 100:.1f} %"


def seconds(milliseconds: float) -> str:
    """A time in the unit that reads best."""
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:,.3g} s"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.3f}"
