"""Owns medians, ratios and the tables of a run; refuses to measure. Pure.

A ratio is the median over the rounds of each round's ratio, so that a neighbour that slows a whole round counts little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isnan
from statistics import median

from local_engine.bench.rounds import Prefix, Run

OURS = "hybridgate"


@dataclass(frozen=True, slots=True)
class Goal:
    """So many times a peer's tokens a second, at least: on a CPU those of CPU time, where the system tells it.

    With one thread each that is the same on an idle machine; on a busy one, what neighbours take is not counted."""

    precision: str
    streams: int
    peer: str
    ratio: float


GOALS = (
    Goal("fp32", 8, "transformers", 1.2),
    Goal("bf16", 1, "transformers", 1.4),
    Goal("bf16", 8, "transformers", 1.4),
    Goal("bf16", 32, "transformers", 2.8),
    Goal("bf16", 8, "llama.cpp", 1.0),
    Goal("bf16", 32, "llama.cpp", 1.0),
)
GPU_GOALS = tuple(Goal("bf16", streams, "transformers", 3.0) for streams in (1, 8, 32))
PREFIX_GOAL = 5.0
OVERHEAD_GOAL = 0.10


def ratio(runs: Iterable[Run], peer: str, precision: str, streams: int, value: Callable[[Run], float]) -> float | None:
    """Ours over the peer's, by `value`; None where one of them was not measured."""
    here = [run for run in runs if run.precision == precision and run.streams == streams]
    mine = {run.round: value(run) for run in here if run.server == OURS}
    other = {run.round: value(run) for run in here if run.server == peer}
    both = sorted(mine.keys() & other.keys())
    return median(mine[number] / other[number] for number in both) if both else None


def same_answers(runs: Sequence[Run], peer: str, precision: str) -> float | None:
    """The share of a peer's answers that are ours, character for character."""
    known = {(run.streams, run.round): run.texts for run in runs if run.server == OURS and run.precision == precision}
    pairs = [
        (text, mine)
        for run in runs
        if run.server == peer and run.precision == precision and (run.streams, run.round) in known
        for text, mine in zip(run.texts, known[run.streams, run.round], strict=True)
    ]
    return sum(text == mine for text, mine in pairs) / len(pairs) if pairs else None


def speeds(runs: Sequence[Run], *, gpu: bool = False) -> str:
    """Tokens a second and first tokens of each server, beside ours as a ratio, in Markdown; with the goals of a GPU or
    of a CPU."""
    goals = GPU_GOALS if gpu else GOALS
    lines = [
        "| | streams | tok/s | tok/CPU s | first token | ours: tok/s | ours: tok/CPU s | ours: first token | goal |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, server, streams in _rows(runs):
        mine = [r for r in runs if (r.precision, r.server, r.streams) == (precision, server, streams)]
        cells = [
            f"{server}, {precision}",
            str(streams),
            f"{median(run.rate for run in mine):.0f}",
            f"{median(run.cpu_rate for run in mine):.0f}",
            f"{median(run.first for run in mine) * 1000:.0f} ms",
        ]
        if server == OURS:
            cells += ["", "", "", ""]
        else:
            rate = ratio(runs, server, precision, streams, lambda run: run.rate)
            cpu = ratio(runs, server, precision, streams, lambda run: run.cpu_rate)
            first = ratio(runs, server, precision, streams, lambda run: run.first)
            cells += [
                _times(rate),
                _times(cpu),
                _times(first),
                _goal(
                    next((g for g in goals if (g.precision, g.streams, g.peer) == (precision, streams, server)), None),
                    rate if gpu or cpu is None or isnan(cpu) else cpu,
                ),
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rows(runs: Sequence[Run]) -> list[tuple[str, str, int]]:
    """Precision, server and streams of each row: ours first, then each peer."""
    seen = {(run.precision, run.streams, run.server != OURS, run.server) for run in runs}
    order = sorted(seen, key=lambda row: (row[0] != "fp32", row[1], row[2], row[3]))
    return [(precision, server, streams) for precision, streams, _, server in order]


def _times(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ×"


def _goal(goal: Goal | None, value: float | None) -> str:
    if goal is None:
        return ""
    return f"{goal.ratio} ×: {'–' if value is None else 'met' if value >= goal.ratio else 'missed'}"


def prefixes(found: Sequence[Prefix], *, gpu: bool = False) -> str:
    """First tokens of a long prompt, cold and again, in Markdown; with the goal of a CPU."""
    lines = ["| | cold | again | sooner | goal |", "|---|---|---|---|---|"]
    for precision, server in dict.fromkeys((one.precision, one.server) for one in found):
        mine = [one for one in found if (one.precision, one.server) == (precision, server)]
        sooner = median(one.cold / one.again for one in mine)
        cold, again = median(one.cold for one in mine), median(one.again for one in mine)
        goal = (
            f"{PREFIX_GOAL:.0f} ×: {'met' if sooner >= PREFIX_GOAL else 'missed'}" if server == OURS and not gpu else ""
        )
        lines.append(
            f"| {server}, {precision} | {cold * 1000:.0f} ms | {again * 1000:.0f} ms | {sooner:.1f} × | {goal} |"
        )
    return "\n".join(lines)


def sameness(runs: Sequence[Run]) -> str:
    """How many of each peer's answers are ours."""
    told = []
    for precision, peer in dict.fromkeys((run.precision, run.server) for run in runs if run.server != OURS):
        share = same_answers(runs, peer, precision)
        if share is not None:
            told.append(f"{peer}, {precision}: {share:.0%}")
    return "Answers that are ours, character for character: " + "; ".join(told) + "." if told else ""


def overhead(share: float, streams: int) -> str:
    """The engine's own part of a step."""
    met = "met" if share <= OVERHEAD_GOAL else "missed"
    return (
        f"Of the CPU time of a step at batch {streams}, {share:.1%} is not the forward "
        f"(goal: at most {OVERHEAD_GOAL:.0%}, {met})."
    )
