"""Results as Markdown tables. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.limits.failures import TIGHT, Row
from tests.bench.limits.reconcile import Reconciled
from tests.bench.limits.scenarios import Result


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
