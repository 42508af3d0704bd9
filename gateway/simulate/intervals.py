"""Which intervals of time a fractional schedule overfills: the cutting planes of the lower bound (bound.py).

Owns the search over all pairs of a beginning and an end at once. Refuses to know requests: it sees works (works.py),
each with the column of the linear program that it belongs to. Needs numpy, so it is imported when a bound is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gateway.simulate.works import AT_ONCE, Work

MOST_BEGINNINGS = 1500
MOST_ENDS = 3000
"""So many beginnings and ends are looked at in one search, evenly chosen, others in the next one."""
_LEAST = 1e-6
_NEAR = 0.1

Floats = Any  # numpy arrays of floats


@dataclass(frozen=True, slots=True)
class Overfull:
    """An interval in which there are `excess` seconds of work too many."""

    begins: float
    ends: float
    excess: float


class Works:
    """Works on one engine, sorted by when they can begin. `until` is the end of all time: every work is done by then,
    whatever its own end."""

    def __init__(self, columns: Sequence[int], works: Sequence[Work], until: float) -> None:
        some = [(column, work) for column, work in zip(columns, works, strict=True) if work.seconds > 0]
        some.sort(key=lambda pair: pair[1].begins)
        rows = [(w.begins, w.ends, w.seconds, w.before, w.after, w.foot) for _, w in some]
        table = np.array(rows, float).reshape(-1, 6)
        self._columns = np.array([column for column, _ in some], int)
        self._runs = np.array([work.runs and work.after < AT_ONCE for _, work in some], bool)
        self._begins, self._ends, self._seconds, self._before, self._after, self._foot = table.T.copy()
        self._until = until

    def within(self, begins: float, ends: float) -> tuple[Floats, Floats]:
        """Columns and the seconds of work that each has in an interval at least, sorted by column."""
        seconds = self._seconds - _done(self._before, begins - self._begins)
        if ends < self._until:
            running = np.minimum(seconds, _done(self._after, ends - np.maximum(begins, self._foot)))
            seconds -= _done(self._after, self._ends - ends)
            seconds = np.where(self._runs, running, seconds)
        some = np.nonzero(seconds > 0)[0]
        columns, places = np.unique(self._columns[some], return_inverse=True)
        return columns, np.bincount(places, seconds[some], len(columns))

    def overfull(self, schedule: Floats, turn: int) -> list[Overfull]:
        """For each beginning that is looked at in this turn the interval with the most excess, and that with the most
        in relation to its length. `schedule` has the share of each column that is taken."""
        share = schedule[self._columns]
        some = np.nonzero((share > 1e-7) & (self._seconds > 1e-12))[0]
        if not len(some):
            return []
        return list(_Search(self, some, share[some], turn).found())


class _Search:
    """One search. The work in an interval that begins at `a` is, as a function of its end `b`, a sum of ramps, each of
    which rises at the rate `after` until `ends`, or from `foot` on where it runs. They are kept as changes of slope and
    height at each end that is looked at, and summed up once for each `a`. Going back in time, works are added when `a`
    passes their beginning; those that can be partly done before `a` have ramps of their own, computed anew for each
    `a`."""

    def __init__(self, works: Works, some: Floats, share: Floats, turn: int) -> None:
        self._begins, self._seconds, self._share = works._begins[some], works._seconds[some], share
        self._before, self._after, self._due = works._before[some], works._after[some], works._ends[some]
        ends = np.minimum(self._due, works._until)
        self._at = np.append(_some(np.unique(ends), MOST_ENDS, turn), works._until)
        self._from = _some(np.unique(self._begins), MOST_BEGINNINGS, turn)
        self._runs, self._foot = works._runs[some], works._foot[some]
        self._partly = self._begins + self._seconds / self._before  # until when all may be done before
        self._longest = float((self._partly - self._begins).max())
        self._slopes, self._heights = np.zeros(len(self._at) + 1), np.zeros(len(self._at) + 1)

    def found(self) -> Iterator[Overfull]:
        reached = len(self._begins)
        for a in self._from[::-1]:
            first = int(np.searchsorted(self._begins, a))
            self._ramps(a, np.arange(first, reached), self._seconds[first:reached], self._slopes, self._heights)
            reached = first
            slopes, heights = self._slopes, self._heights
            near = np.arange(int(np.searchsorted(self._begins, a - self._longest)), first)
            partly = near[(self._partly[near] > a) & (self._due[near] > a)]
            if len(partly):
                slopes, heights = slopes.copy(), heights.copy()
                left = self._seconds[partly] - self._before[partly] * (a - self._begins[partly])
                self._ramps(a, partly, left, slopes, heights)
            after = int(np.searchsorted(self._at, a, side="right"))
            lengths = self._at[after:] - a
            work = np.cumsum(slopes)[after:-1] * self._at[after:] + np.cumsum(heights)[after:-1]
            excess = work - lengths
            for best in {int(np.argmax(excess)), int(np.argmax(excess / lengths))} if len(excess) else ():
                if excess[best] > _LEAST:
                    yield Overfull(float(a), float(self._at[after + best]), float(excess[best]))

    def _ramps(self, a: float, which: Floats, seconds: Floats, slopes: Floats, heights: Floats) -> None:
        """Add the ramps that these works, of which so many seconds are left at `a`, have in intervals from there."""
        after, share = self._after[which], self._share[which]
        runs, due = self._runs[which], self._due[which]
        foot = np.where(runs, np.maximum(self._foot[which], a), due - seconds / after)
        top = np.minimum(np.searchsorted(self._at, np.where(runs, foot + seconds / after, due)), len(self._at) - 1)
        low = np.minimum(np.searchsorted(self._at, foot), top)
        rise = np.where(after < AT_ONCE, after * share, 0.0)
        np.add.at(slopes, low, rise)
        np.add.at(heights, low, -rise * foot)
        np.add.at(slopes, top, -rise)
        np.add.at(heights, top, rise * foot + seconds * share)


def _done(rates: Floats, lengths: Floats) -> Floats:
    """Seconds of work that is done at such rates in so long; none where the length is not above 0, even at once."""
    return np.multiply(rates, lengths, out=np.zeros(len(rates)), where=lengths > 0)


def _some(values: Floats, most: int, turn: int) -> Floats:
    """At most so many of the values, evenly, and in each turn others."""
    stride = -(-len(values) // most)
    return values[turn % stride :: stride] if stride > 1 else values


def chosen(found: Sequence[Overfull], most: int) -> list[Overfull]:
    """Those with the most excess, without such as almost repeat another one."""
    kept: list[Overfull] = []
    for one in sorted(found, key=lambda one: -one.excess):
        near = (_NEAR * min(one.ends - one.begins, other.ends - other.begins) for other in kept)
        if all(
            abs(one.begins - other.begins) + abs(one.ends - other.ends) >= limit
            for other, limit in zip(kept, near, strict=True)
        ):
            kept.append(one)
            if len(kept) == most:
                break
    return kept
