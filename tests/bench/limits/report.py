"""Results as Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gateway.limits import OnDown
from tests.bench.limits import failover
from tests.bench.limits.failover import Fell
from tests.bench.limits.failures import MOST_WAIT_MS, TIGHT, Row
from tests.bench.limits.reconcile import Reconciled
from tests.bench.limits.scenarios import LEAST_USED, Result


def of_limits(results: Sequence[Result]) -> str:
    """A row for each limit of each scenario."""
    lines = [
        "| scenario | kills | open at once | limit | most at any time | used of what was permitted | holds |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for verdict in result.verdicts:
            tightest = verdict.share == result.used
            holds = verdict.kept and (result.holds or not tightest)
            lines.append(
                f"| {result.title} | {result.kills} | {result.most_open} | {verdict.most:g} {verdict.limit} "
                f"| {verdict.peak:g} | {verdict.used:.6g} of {verdict.permitted:.6g} ({verdict.share:.1%}) "
                f"| {'yes' if holds else 'NO'} |"
            )
    return "\n".join(lines)


def of_records(results: Sequence[Reconciled]) -> str:
    """A row for each run."""
    lines = [
        "| run | requests | without an answer | kills | the ledger holds | records sum to "
        "| reservations that nobody ended hold | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        ledger, records, left = (
            f"{sums.tokens} tokens, {sums.nusd / 1e9:.9f} USD" for sums in (one.ledger, one.records, one.left)
        )
        lines.append(
            f"| {one.title} | {one.requests} | {one.failed} | {one.kills} | {ledger} | {records} "
            f"| {one.unended}: {left} | {'yes' if one.holds else 'NO'} |"
        )
    return "\n".join(lines)


def of_failures(rows: Sequence[Row]) -> str:
    """A row for each failure and each `on_redis_down`."""
    lines = [
        f"| Redis is | `on_redis_down` | answered | added p50, p95 | longest wait for Redis (machine late by) "
        f"| of {TIGHT} a minute: before, meanwhile | counted again after | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        back = f"{row.back_s:.1f} s" if row.failure.down else ""
        lines.append(
            f"| {row.failure.title} | `{row.on_down}` | {row.answered:.1%} "
            f"| {row.added_p50_ms:+.1f}, {row.added_p95_ms:+.1f} ms | {row.longest_wait_ms:.0f} ms ({row.late_ms:.0f}) "
            f"| {row.before}, {row.during} | {back} | {'yes' if row.holds else 'NO'} |"
        )
    return "\n".join(lines)


def of_failovers(falls: Sequence[Fell]) -> str:
    """A row for each fall."""
    lines = [
        "| the primary is | acknowledged and lost | history lost "
        "| not counted together: `closed`, `local_share`, `open` "
        f"| beyond {failover.TIGHT} a minute (lost there): `closed`, `local_share`, `open` "
        f"| beyond a strict {failover.BUDGET / 1e9:g} USD (lost there) | longest wait (machine late by) | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order: Sequence[OnDown] = ("closed", "local_share", "open")
    for one in falls:
        lost = f"{one.lost.count}: {one.lost.tokens} tokens, {one.lost.nusd / 1e9:.4f} USD"
        apart = ", ".join(f"{one.apart[policy]:.1f}" for policy in order)
        over = ", ".join(f"{one.over[policy]} ({one.lost_there[policy]})" for policy in order)
        lines.append(
            f"| {one.fall.title} | {lost} | {one.lost.seconds:.2f} s | {apart} s | {over} "
            f"| {one.budget_over / 1e9:.4f} ({one.budget_lost / 1e9:.4f}) "
            f"| {one.longest_wait_ms:.0f} ms ({one.late_ms:.0f}) | {'yes' if one.holds else 'NO'} |"
        )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Judged:
    """One thing that was judged: of which run, what, what it may be and what it was."""

    run: str
    what: str
    may_be: str
    was: str
    holds: bool


def _with_kills(title: str, kills: int) -> str:
    return f"{title}, {kills} kill{'s' * (kills != 1)}" if kills else title


def limits_judged(results: Sequence[Result]) -> Iterator[Judged]:
    """Each limit, and that the tightest was used."""
    for result in results:
        run = _with_kills(result.title, result.kills)
        for verdict in result.verdicts:
            yield Judged(run, f"{verdict.limit}, most", f"{verdict.most:g}", f"{verdict.peak:g}", verdict.kept)
        used = f"{result.used:.1%}"
        yield Judged(run, "used of what is permitted", f">= {LEAST_USED:.0%}", used, result.used >= LEAST_USED)


def records_judged(results: Sequence[Reconciled]) -> Iterator[Judged]:
    """The ledger against the records."""
    for one in results:
        may_be, was = f"{one.left.tokens} tokens", f"{(one.ledger - one.records).tokens} tokens"
        yield Judged(_with_kills("records", one.kills), "ledger less records", may_be, was, one.holds)


def failures_judged(rows: Sequence[Row]) -> Iterator[Judged]:
    """Each failure and each `on_redis_down`."""
    for row in rows:
        was = f"{row.answered:.1%}; {row.during}; {row.longest_wait_ms:.0f} ms (machine late by {row.late_ms:.0f})"
        what = f"answered; let in of {TIGHT} used up; longest wait"
        may_be = f"as it says; {MOST_WAIT_MS:g} ms and the machine's"
        yield Judged(f"Redis {row.failure.title}, {row.on_down}", what, may_be, was, row.holds)


def failovers_judged(falls: Sequence[Fell]) -> Iterator[Judged]:
    """Each fall of a primary."""
    for one in falls:
        was = f"{one.lost.seconds:.2f} s; {one.over['closed']} (lost {one.lost_there['closed']}); "
        was += f"{one.budget_over / 1e9:.4f} USD (lost {one.budget_lost / 1e9:.4f})"
        what = "history lost; beyond a closed limit; beyond a strict budget"
        may_be = f"{one.fall.most_lost:g} s; what was lost; what was lost"
        yield Judged(f"failover: {one.fall.title}", what, may_be, was, one.holds)


def of_judged(judged: Sequence[Judged]) -> str:
    """One table of all."""
    lines = ["| run | judged | may be | was | holds |", "|---|---|---|---|---|"]
    for one in judged:
        lines.append(f"| {one.run} | {one.what} | {one.may_be} | {one.was} | {'yes' if one.holds else 'NO'} |")
    return "\n".join(lines)
