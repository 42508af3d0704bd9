"""`python -m tests.bench.limits`: see README.md in tests/bench."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.limits.failover import FALLS, RATE, Fell, fell_over
from tests.bench.limits.failures import FAILURES, Row, failed
from tests.bench.limits.reconcile import MOST_CLIENTS, MOST_SECONDS, Reconciled, reconciled
from tests.bench.limits.report import (
    failovers_judged,
    failures_judged,
    limits_judged,
    of_failovers,
    of_failures,
    of_judged,
    of_limits,
    of_records,
    records_judged,
)
from tests.bench.limits.scenarios import SCENARIOS, Pressure, Result, played
from tests.bench.program import BenchError


def say(line: str) -> None:
    """Progress goes to standard error, so that tables can be redirected."""
    print(line, file=sys.stderr, flush=True)


ALL = [*SCENARIOS, "records", "redis", "failover"]


def _of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        named = list(known) if text == "all" else [name.strip() for name in text.split(",")]
        if unknown := [name for name in named if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from all, {', '.join(known)}")
        return named

    return names


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.limits",
        description="Hold gateways that share a Redis to their limits, as a provider sees it. Status 1 if one is not. "
        "Runs of one kind print their own table, runs of several one table of all that was judged.",
    )
    parser.add_argument("--only", type=_of(ALL), default=ALL, help=f"of: {', '.join(ALL)}; `all` is the default")
    parser.add_argument(
        "--failures", type=_of(list(FAILURES)), default=list(FAILURES), help=f"of Redis, of: {', '.join(FAILURES)}"
    )
    parser.add_argument("--falls", type=_of(list(FALLS)), default=list(FALLS), help=f"of a primary: {', '.join(FALLS)}")
    parser.add_argument("--rate", type=float, default=RATE, help=f"reservations/s of each key then (default {RATE:g})")
    parser.add_argument("--tables", action="store_true", help="print each kind's own table as well")
    parser.add_argument("--clients", type=int, default=2_000, help="at once (default 2000)")
    parser.add_argument("--seconds", type=float, default=75.0, help="of each scenario (default 75)")
    parser.add_argument("--gateways", type=int, default=4, help="processes (default 4)")
    parser.add_argument(
        "--kill-every", type=float, default=15.0, help="seconds between kills, of the runs with kills (default 15)"
    )
    parser.add_argument("--without-kills", action="store_true", help="leave out the runs with kills")
    parser.add_argument("--only-kills", action="store_true", help="leave out the runs without")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--work", type=Path, help="where logs and records are kept (default: nowhere)")
    return parser.parse_args(arguments)


async def run(options: argparse.Namespace, work: Path) -> bool:
    """Whether all holds."""
    pressure = Pressure(options.clients, options.seconds, gateways=options.gateways, seed=options.seed)
    kinds = [
        every
        for every, left_out in ((0.0, options.only_kills), (options.kill_every, options.without_kills))
        if not left_out
    ]
    results: list[Result] = []
    sums: list[Reconciled] = []
    rows: list[Row] = []
    falls: list[Fell] = []
    for every in kinds:
        for name in (name for name in options.only if name not in ("redis", "failover")):
            if name in SCENARIOS and SCENARIOS[name].at is not None and not every:
                continue  # it is about kills
            title = f"{name}{'-killed' if every else ''}"
            say(f"{title}: {options.gateways} gateways")
            if name == "records":
                few = min(options.clients, MOST_CLIENTS)
                seconds = min(options.seconds, MOST_SECONDS)
                sums.append(await reconciled(every, seconds, few, options.gateways, options.seed, work / title, say))
            else:
                results.append(await played(SCENARIOS[name], replace(pressure, kill_every=every), work / title, say))
    if "redis" in options.only:
        rows = await failed(options.failures, options.gateways, work / "redis", say)
    if "failover" in options.only:
        falls = await fell_over(options.falls, options.rate, work / "failover", say)
    by_kind = (
        of_limits(results) if results else "",
        of_records(sums) if sums else "",
        of_failures(rows) if rows else "",
        of_failovers(falls) if falls else "",
    )
    tables = [table for table in by_kind if table]
    judged = [*limits_judged(results), *records_judged(sums), *failures_judged(rows), *failovers_judged(falls)]
    if len(tables) == 1 or options.tables:
        print("\n\n".join(tables))
    if len(tables) != 1:
        print(of_judged(judged))
    return all(one.holds for one in judged)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where all holds, 1 where something does not, or the processes cannot be started."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # so that processes are stopped then as well
    with tempfile.TemporaryDirectory(prefix="hybridgate-limits-") as folder:
        try:
            return 0 if asyncio.run(run(options, options.work or Path(folder))) else 1
        except BenchError as error:
            say(f"limits: {error}")
            return 1


if __name__ == "__main__":
    sys.exit(main())
