"""Several routers in one world: who pays how much for how much attainment, beside the least that anybody could.

Owns what is compared with what: a policy with the baselines, of which a threshold that nobody tuned stands for the best
of all that were tried, and with the bound. Refuses to print (report.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from gateway.simulate.bound import Bound, Bounds
from gateway.simulate.routers import Router, Threshold
from gateway.simulate.score import Score, score
from gateway.simulate.world import Run, World, simulate

Kind = Literal["policy", "baseline"]
WITHIN = 0.01
"""The attainment that a policy may fall short of the bound's by when their costs are compared: one point."""
CURVE = (0.9, 0.95, 0.98)
"""Shares of what is attainable at most, for which the picture has the bound besides."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One router: its score, whether it is compared or compared with, and who is better in cost and attainment both
    (no worse in either, better in one). `bound` is the least cost at its own attainment, None where none was worked
    out."""

    kind: Kind
    score: Score
    dominated_by: tuple[str, ...] = ()
    bound: Bound | None = None

    @property
    def ratio(self) -> float | None:
        """Cost over the bound's at the same attainment."""
        if self.bound is None or self.bound.cost_nusd <= 0:
            return None
        return self.score.cost_nusd / self.bound.cost_nusd


@dataclass(frozen=True, slots=True)
class Comparison:
    """All entries, policies first. `reference` is the offline schedule that meets as many classes as can be, at the
    least cost; `curve` the bound at several attainments. `best_threshold` names the threshold that costs least among
    those whose attainment is within a point of the thresholds' best."""

    world: World
    entries: tuple[Entry, ...]
    runs: tuple[Run, ...]
    reference: Bound | None = None
    curve: tuple[Bound, ...] = ()
    best_threshold: str | None = None

    @property
    def told(self) -> tuple[Entry, ...]:
        """The entries for a table: of the thresholds the best alone."""
        return tuple(
            entry
            for entry in self.entries
            if not entry.score.router.startswith(_THRESHOLD) or entry.score.router == self.best_threshold
        )

    def ratio(self, entry: Entry) -> float | None:
        """Cost over the reference's; None without one."""
        if self.reference is None or self.reference.cost_nusd <= 0:
            return None
        return entry.score.cost_nusd / self.reference.cost_nusd


_THRESHOLD = "threshold "


def compared(entrants: Sequence[tuple[World, Router]], baselines: Sequence[Router], bound: bool) -> Comparison:
    """Let each policy meet its world (they differ where the policies name other deployments), and the baselines the
    first one's; and work its bounds out where asked. Raises NoBound."""
    world = entrants[0][0]
    pairs = [*entrants, *((world, baseline) for baseline in baselines)]
    runs = [simulate(of, router) for of, router in pairs]
    scores = [score(of, run) for (of, _), run in zip(pairs, runs, strict=True)]
    entries = [
        Entry("policy" if index < len(entrants) else "baseline", own, tuple(_better(own, scores)))
        for index, own in enumerate(scores)
    ]
    best = _best_threshold(scores, baselines)
    if not bound:
        return Comparison(world, tuple(entries), tuple(runs), best_threshold=best)
    bounds = Bounds(world, max(own.ended_s for own in scores[: len(entrants)]))
    reference = bounds.reference()
    for index, (of, _) in enumerate(entrants):
        if of.policy.deployments == world.policy.deployments:
            own = scores[index]
            entries[index] = replace(entries[index], bound=bounds.least_cost(own.met, own.refused))
    curve = (*(bounds.least_cost(share * reference.attainment, rounds=1) for share in CURVE), reference)
    return Comparison(world, tuple(entries), tuple(runs), reference, curve, best)


def _better(own: Score, others: Sequence[Score]) -> Iterator[str]:
    """Those that dominate a score. Private requests that left would be no price to pay, so they count as well."""
    mine = (own.cost_nusd, -own.met, own.violations)
    for other in others:
        theirs = (other.cost_nusd, -other.met, other.violations)
        if theirs != mine and all(a <= b for a, b in zip(theirs, mine, strict=True)):
            yield other.router


def _best_threshold(scores: Sequence[Score], baselines: Sequence[Router]) -> str | None:
    names = {router.name for router in baselines if isinstance(router, Threshold)}
    thresholds = [own for own in scores if own.router in names]
    if not thresholds:
        return None
    most = max(own.met for own in thresholds)
    return min((own for own in thresholds if own.met >= most - WITHIN), key=lambda own: own.cost_nusd).router
