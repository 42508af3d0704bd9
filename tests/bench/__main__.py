"""`python -m tests.bench`: prepare the targets, measure them in turn, print the table. See README.md beside this
file."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from tests.bench import report
from tests.bench.load import Address
from tests.bench.measure import Plan, answers_rightly, measure
from tests.bench.program import ROOT, BenchError, cores, free_port, pin, running
from tests.bench.targets import BASELINE, TITLES, Missing, Target, prepare, upstream_launch

QUICK = Plan(seconds=1.0, slow_seconds=3.0, warm_seconds=0.3, rounds=1)


def say(line: str) -> None:
    """Progress goes to standard error, so that the table can be redirected."""
    print(line, file=sys.stderr, flush=True)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in TITLES]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(TITLES)}")
    return [name for name in TITLES if name in names or name == BASELINE]


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value <= 600:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 600")
    return value


def _rounds(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError("must be 1 to 100")
    return value


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description="Measure Hybridgate against its floor and its peers."
    )
    parser.add_argument(
        "--only",
        type=_names,
        default=list(TITLES),
        help=f"comma-separated, of: {', '.join(TITLES)} (direct always runs)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="one round of 1 s runs: to see that it works, not for figures"
    )
    parser.add_argument(
        "--seconds",
        type=_positive,
        help="of a run (default 4); slow targets' rates are measured for at least three times that",
    )
    parser.add_argument("--rounds", type=_rounds, help="over all targets (default 3)")
    parser.add_argument("--json", type=Path, help="write everything that was measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file as well")
    parser.add_argument(
        "--work", type=Path, default=ROOT / ".bench", help="where peers are installed and logs lie (default .bench)"
    )
    return parser.parse_args(arguments)


def plan_of(quick: bool, seconds: float | None, rounds: int | None) -> Plan:
    """The plan that the options ask for."""
    base = QUICK if quick else Plan()
    if seconds is not None:
        base = replace(
            base, seconds=seconds, slow_seconds=max(3 * seconds, base.slow_seconds), warm_seconds=min(1.0, seconds)
        )
    return replace(base, rounds=rounds or base.rounds)


def _load_average() -> str:
    return " ".join(f"{value:.2f}" for value in os.getloadavg())


def _machine_line(pinned: tuple[int, int]) -> str:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0] if models else cpu
    system = f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    return f"{os.cpu_count()} × {cpu}, {system}; target on core {pinned[0]}, load and upstream on core {pinned[1]}"


def bench(names: Sequence[str], plan: Plan, work: Path) -> dict[str, Any]:
    """Prepare, measure, and return the report's document. Raises `BenchError` where not even the fake upstream
    starts."""
    pinned = cores()
    port = free_port()
    prepared = []
    for name in names:
        say(f"preparing {TITLES[name]}")
        prepared.append(prepare(name, work, port))
    missing = [one for one in prepared if isinstance(one, Missing)]
    targets = [one for one in prepared if isinstance(one, Target)]
    for one in missing:
        say(f"{one.title} cannot be measured: {one.reason}")
    machine: dict[str, Any] = {"line": _machine_line(pinned), "load_before": _load_average()}
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    pin(pinned[1])
    direct = Address(port)
    try:
        log = work / "log" / "upstream.log"
        with running(
            "the fake upstream", upstream_launch(port), pinned[1], log, partial(answers_rightly, direct)
        ) as upstream:
            visits = measure(targets, plan, upstream, pinned, work, say)
    finally:
        if usable is not None:
            os.sched_setaffinity(0, usable)
    machine["load_after"] = _load_average()
    return report.document(visits, missing, plan, machine)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when it ran, whatever it showed, 1 when it could not."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that the servers are stopped then as well
    try:
        measured = bench(options.only, plan_of(options.quick, options.seconds, options.rounds), options.work.resolve())
    except BenchError as error:
        say(f"bench: {error}")
        return 1
    table = report.markdown(measured)
    if options.json:
        options.json.write_bytes(orjson.dumps(measured, option=orjson.OPT_INDENT_2))
    if options.markdown:
        options.markdown.write_text(table)
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
