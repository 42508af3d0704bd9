"""`python -m tests.bench.limits`: see README.md in tests/bench."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.bench.limits.failures import FAILURES, Row, failed
from tests.bench.limits.reconcile import MOST_CLIENTS, MOST_SECONDS, Reconciled, reconciled
from tests.bench.limits.report import of_failures, of_limits, of_records
from tests.bench.limits.scenarios import SCENARIOS, Pressure, Result, played
from tests.bench.program import BenchError


def say(line: str) -> None:
    """Progress goes to standard error, so that tables can be redirected."""
    print(line, file=sys.stderr, flush=True)


ALL = [*SCENARIOS, "records", "redis"]


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in ALL]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(ALL)}")
    return names


def _failures(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in FAILURES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(FAILURES)}")
    return names


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.limits",
        description="Hold gateways that share a Redis to their limits, as a provider sees it. Status 1 if one is not.",
    )
    parser.add_argument("--only", type=_names, default=ALL, help=f"of: {', '.join(ALL)}")
    parser.add_argument(
        "--failures", type=_failures, default=list(FAILURES), help=f"of Redis, of: {', '.join(FAILURES)}"
    )
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
    for every in kinds:
        for name in (name for name in options.only if name != "redis"):
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
    if results:
        print(of_limits(results))
    if sums:
        print(of_records(sums))
    if rows:
        print(of_failures(rows))
    return all(row.holds for row in rows) and all(result.holds for result in results) and all(one.holds for one in sums)


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
