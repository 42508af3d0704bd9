"""From visits to figures: medians over the rounds, latency added to the direct one of the same round, ratios, goals;
as Markdown and as JSON.

Owns what is compared with what. Refuses I/O, and refuses to call a goal met where it was not measured or Hybridgate
answered wrongly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

from tests.bench.measure import Measurement, Plan, Visit
from tests.bench.targets import BASELINE, TITLES, Missing

SUBJECT = "hybridgate"
_TIMES = ("p50_ms", "p99_ms", "first_p50_ms", "first_p99_ms")
_FIGURES = ("per_second", "cpu_ms", *_TIMES, "share", "neighbours")
Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure of Hybridgate's, absolute or as a multiple of another target's, and its bound."""

    text: str
    scenario: str
    figure: str
    against: str | None
    relation: Literal["at most", "at least"]
    bound: float


GOALS = (
    Goal("CPU of a request, times the pass-through's", "requests_64", "cpu_ms", "pass-through", "at most", 2.0),
    Goal("CPU of a 50-chunk stream, times the pass-through's", "streams_32", "cpu_ms", "pass-through", "at most", 2.8),
    Goal("requests/s, times LiteLLM's", "requests_64", "per_second", "litellm", "at least", 25.0),
    Goal("streams/s, times LiteLLM's", "streams_32", "per_second", "litellm", "at least", 40.0),
    Goal("requests/s, times Portkey's", "requests_64", "per_second", "portkey", "at least", 2.0),
    Goal("streams/s, times Portkey's", "streams_32", "per_second", "portkey", "at least", 2.0),
    Goal("first token added, 100 paced streams, p50, ms", "paced_100", "added_first_p50_ms", None, "at most", 10.0),
)


@dataclass(frozen=True, slots=True)
class Summary:
    """One target over all rounds. `scenarios`: medians by scenario and figure; `errors`: counts by scenario, kind."""

    title: str
    start_seconds: float | None
    rss_mb: float | None
    scenarios: Mapping[str, Figures]
    errors: Mapping[str, Mapping[str, int]]
    failures: tuple[str, ...] = ()


def _middle(values: Sequence[float | None]) -> float | None:
    """The median of what was measured."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def added(own: Measurement, direct: Measurement | None) -> Figures:
    """Latencies less those of the direct run of the same round, ms; None where either is not known."""
    result: Figures = {}
    for figure in _TIMES:
        mine, base = getattr(own, figure), getattr(direct, figure) if direct else None
        result[f"added_{figure}"] = None if mine is None or base is None else mine - base
    return result


def summarise(visits: Sequence[Visit]) -> dict[str, Summary]:
    """Summaries by target, in the order of their first visits."""
    direct = {
        (visit.round, one.scenario): one for visit in visits if visit.target == BASELINE for one in visit.measurements
    }
    result = {}
    for name in dict.fromkeys(visit.target for visit in visits):
        own = [visit for visit in visits if visit.target == name]
        rows: dict[str, list[Figures]] = {}
        errors: dict[str, Counter[str]] = {}
        for visit in own:
            for one in visit.measurements:
                plain = {figure: getattr(one, figure) for figure in _FIGURES}
                rows.setdefault(one.scenario, []).append(plain | added(one, direct.get((visit.round, one.scenario))))
                errors.setdefault(one.scenario, Counter()).update(one.errors)
        result[name] = Summary(
            TITLES[name],
            _middle([visit.start_seconds for visit in own]),
            _middle([visit.rss_mb for visit in own]),
            {
                scenario: {figure: _middle([row[figure] for row in table]) for figure in table[0]}
                for scenario, table in rows.items()
            },
            {scenario: dict(count) for scenario, count in errors.items()},
            tuple(f"round {visit.round}: {visit.failure}" for visit in own if visit.failure),
        )
    return result


def figure_of(summaries: Mapping[str, Summary], target: str, scenario: str, figure: str) -> float | None:
    """One median, None where it was not measured."""
    summary = summaries.get(target)
    return summary.scenarios.get(scenario, {}).get(figure) if summary else None


def ratio(visits: Sequence[Visit], scenario: str, figure: str, other: str) -> float | None:
    """Hybridgate's figure as a multiple of another target's: the median of the rounds' ratios, as what disturbs one of
    the two runs of a round probably disturbs the other as well."""
    by_round: dict[int, dict[str, float | None]] = {}
    for visit in visits:
        for one in visit.measurements:
            if one.scenario == scenario:
                by_round.setdefault(visit.round, {})[visit.target] = getattr(one, figure)
    pairs = [(found.get(SUBJECT), found.get(other)) for found in by_round.values()]
    return _middle([mine / theirs for mine, theirs in pairs if mine is not None and theirs])


def ratios(visits: Sequence[Visit]) -> dict[str, dict[str, float | None]]:
    """Hybridgate's rate and CPU as multiples of every other target's."""
    others = [name for name in dict.fromkeys(visit.target for visit in visits) if name not in (SUBJECT, BASELINE)]
    wanted = [(scenario, figure) for scenario in ("requests_64", "streams_32") for figure in ("per_second", "cpu_ms")]
    return {
        other: {f"{name}.{figure}": ratio(visits, name, figure, other) for name, figure in wanted} for other in others
    }


def judged(goal: Goal, visits: Sequence[Visit], summaries: Mapping[str, Summary]) -> dict[str, Any]:
    """A goal with what was measured: `met` is None where it was not, and false where Hybridgate answered wrongly under
    that load."""
    if goal.against is None:
        measured = figure_of(summaries, SUBJECT, goal.scenario, goal.figure)
    else:
        measured = ratio(visits, goal.scenario, goal.figure, goal.against)
    met = None
    if measured is not None:
        within = measured <= goal.bound if goal.relation == "at most" else measured >= goal.bound
        met = within and not summaries[SUBJECT].errors.get(goal.scenario)
    return {"goal": goal.text, "wanted": f"{goal.relation} {goal.bound:g}", "measured": measured, "met": met}


def document(
    visits: Sequence[Visit], missing: Sequence[Missing], plan: Plan, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything, as what JSON can hold: figures by target, ratios, goals, and each visit as it was measured."""
    summaries = summarise(visits)
    return {
        "machine": dict(machine),
        "plan": asdict(plan),
        "targets": {name: asdict(summary) for name, summary in summaries.items()},
        "missing": {one.name: {"title": one.title, "reason": one.reason} for one in missing},
        "ratios": ratios(visits),
        "goals": [judged(goal, visits, summaries) for goal in GOALS],
        "visits": [asdict(visit) for visit in visits],
    }


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _pair(figures: Figures, first: str, second: str, digits: int, factor: float = 1.0) -> str:
    """Two figures as `p50 / p99`."""
    values = (figures.get(name) for name in (first, second))
    return " / ".join(_number(None if value is None else value * factor, digits) for value in values)


def _error_count(target: Mapping[str, Any], prefixes: tuple[str, ...]) -> str:
    counts: Counter[str] = Counter()
    for scenario, errors in target["errors"].items():
        if scenario.startswith(prefixes):
            counts.update(errors)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "0"


def _request_row(target: Mapping[str, Any]) -> list[str]:
    at = target["scenarios"]
    many, one, eight = (at.get(name, {}) for name in ("requests_64", "requests_1", "requests_8"))
    return [
        _number(many.get("per_second"), 0),
        _number(many.get("cpu_ms"), 3),
        _pair(one, "added_p50_ms", "added_p99_ms", 0, 1000),
        _pair(eight, "added_p50_ms", "added_p99_ms", 0, 1000),
        _number(target["rss_mb"], 0),
        _number(target["start_seconds"], 1),
        "–" if target["title"] == TITLES[BASELINE] else _number(many.get("neighbours", 0.0) * 100, 0),
        _error_count(target, ("requests",)),
    ]


def _stream_row(target: Mapping[str, Any]) -> list[str]:
    at = target["scenarios"]
    many, one, eight = (at.get(name, {}) for name in ("streams_32", "streams_1", "streams_8"))
    herd, spread = (at.get(name, {}) for name in ("paced_100", "paced_100_spread"))
    return [
        _number(many.get("per_second"), 0),
        _number(many.get("cpu_ms"), 3),
        _pair(one, "added_p50_ms", "added_p99_ms", 0, 1000),
        _pair(eight, "added_p50_ms", "added_p99_ms", 0, 1000),
        _pair(herd, "added_first_p50_ms", "added_first_p99_ms", 1),
        _pair(spread, "added_first_p50_ms", "added_first_p99_ms", 1),
        _error_count(target, ("streams", "paced")),
    ]


_REQUEST_HEAD = ["requests/s, 64 at once", "CPU ms/request", "added p50 / p99 at 1, µs", "at 8, µs"]
_REQUEST_HEAD += ["RSS MiB", "start-up s", "neighbours' % of the core", "errors"]
_STREAM_HEAD = ["50-chunk streams/s, 32 at once", "CPU ms/stream", "added p50 / p99 at 1, µs", "at 8, µs"]
_STREAM_HEAD += ["first token added p50 / p99, ms: 100 paced streams begun at once", "begun over a second", "errors"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown(report: Mapping[str, Any]) -> str:
    """The report for people."""
    machine, plan = report["machine"], report["plan"]
    absent = [f"- {one['title']}: not measured: {one['reason']}" for one in report["missing"].values()]
    failed = [f"- {one['title']}: {failure}" for one in report["targets"].values() for failure in one["failures"]]
    targets = list(report["targets"].values())
    words = {True: "yes", False: "no", None: "not measured"}
    goals = [
        [goal["goal"], goal["wanted"], _number(goal["measured"], 2), words[goal["met"]]] for goal in report["goals"]
    ]
    parts = [
        f"{machine['line']}; load average {machine['load_before']} before, {machine['load_after']} after.",
        f"Medians of {plan['rounds']} interleaved rounds of {plan['seconds']:g} s runs ({plan['slow_seconds']:g} s for "
        "slow targets' rates); added: less the direct run of the same round.",
        _table(["plain requests", *_REQUEST_HEAD], [[one["title"], *_request_row(one)] for one in targets]),
        _table(["streams", *_STREAM_HEAD], [[one["title"], *_stream_row(one)] for one in targets]),
        "\n".join(absent + failed),
        _table(["goal", "wanted", "measured", "met"], goals),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
