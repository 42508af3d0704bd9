"""What a provider saw, and whether limits held. Pure.

Owns the judgement: nothing of it comes from the gateway. Times are seconds since 1970, as the provider read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Seen:
    """One call as the provider saw it: from its arrival `at` to its end `until`, and what it bills, however it ended.
    `how`: `ok`, `gone` (the gateway hung up), or the fault that it was asked for. `name` is the question's number."""

    name: str
    at: float
    until: float
    tokens: int
    nusd: int
    how: str


Amount = Callable[[Seen], int]


def one(_: Seen) -> int:
    """Each call counts."""
    return 1


def most_within(calls: Iterable[Seen], seconds: float, amount: Amount = one) -> int:
    """The largest sum over any window of so many seconds, wherever it begins."""
    ordered = sorted(calls, key=lambda call: call.at)
    most = total = first = 0
    for call in ordered:
        total += amount(call)
        while ordered[first].at <= call.at - seconds:
            total -= amount(ordered[first])
            first += 1
        most = max(most, total)
    return most


def most_at_once(calls: Iterable[Seen]) -> int:
    """The largest number of calls that were open at one moment."""
    changes = sorted(change for call in calls for change in ((call.at, 1), (call.until, -1)))
    most = now = 0
    for _, change in changes:  # an end before a beginning at the same moment
        now += change
        most = max(most, now)
    return most


def open_seconds(calls: Iterable[Seen], since: float, until: float) -> float:
    """Seconds of calls within a time, added up."""
    return sum(max(0.0, min(call.until, until) - max(call.at, since)) for call in calls)


def whole_minutes(calls: Iterable[Seen], until: float) -> tuple[int, list[Seen]]:
    """How many whole minutes there were from the first call on, one at least, and the calls in them. Between two lies a
    second that does not count, because a ledger that keeps amounts by the second counts the oldest one whole."""
    ordered = sorted(calls, key=lambda call: call.at)
    if not ordered:
        return 1, []
    first = ordered[0].at
    minutes = max(1, int((until - first) // (MINUTE + 1)))
    counted = [call for call in ordered if (call.at - first) % (MINUTE + 1) < MINUTE]
    return minutes, [call for call in counted if call.at < first + minutes * (MINUTE + 1)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one limit: `most` is it, `peak` the largest that any window or moment saw, `used` of `permitted` in all."""

    limit: str
    most: float
    peak: float
    used: float
    permitted: float

    @property
    def share(self) -> float:
        """Of what was permitted, how much was used."""
        return self.used / self.permitted if self.permitted else 1.0

    @property
    def kept(self) -> bool:
        """Whether it was never exceeded."""
        return self.peak <= self.most


def a_minute(limit: str, calls: Sequence[Seen], most: int, until: float, amount: Amount = one) -> Verdict:
    """Of a limit on what calls take within any minute, each counted at its arrival. It permits all of itself in each
    whole minute until then."""
    minutes, counted = whole_minutes(calls, until)
    return Verdict(limit, most, most_within(calls, MINUTE, amount), sum(map(amount, counted)), most * minutes)


def at_once(calls: Sequence[Seen], most: int, since: float, until: float, held: float = 0.0) -> Verdict:
    """Of a limit on open requests. `held`: seconds of slots that leases of killed gateways held meanwhile."""
    used = open_seconds(calls, since, until)
    return Verdict("concurrent", most, most_at_once(calls), used, most * (until - since) - held)


def money(calls: Sequence[Seen], most_nusd: int, held_nusd: int = 0) -> Verdict:
    """Of a budget that began with the first call; in US dollars. `held_nusd`: what is booked of calls whose gateways
    were killed, beyond what the provider bills for them; it is permitted to nobody else."""
    spent = sum(call.nusd for call in calls) / 1e9
    return Verdict("usd", most_nusd / 1e9, spent, spent, (most_nusd - held_nusd) / 1e9)
