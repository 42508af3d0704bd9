"""The measuring: every scenario against every target in turn, round after round, so that what drifts on the machine
drifts for all of them.

Owns the scenarios and what is read around each. Refuses to time a target that does not answer rightly when it is
asked politely first.
"""

from __future__ import annotations

import http.client
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter

import psutil

from tests.bench import load, wire
from tests.bench.program import BenchError, Program, running
from tests.bench.targets import Target

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load. `for_rate`: its rate matters, so slow targets get longer runs; the others are about latency.
    `least_seconds`: a run takes at least so long. `spread` as in `Load`."""

    name: str
    kind: wire.Kind
    concurrency: int
    marker: str = ""
    for_rate: bool = False
    spread: float = 0.0
    least_seconds: float = 0.0


PACED = f"[pace {wire.PACE_MS} ms]"
PACED_STREAM_SECONDS = wire.CHUNKS * wire.PACE_MS / 1000
SCENARIOS = (
    Scenario("requests_64", "plain", 64, for_rate=True),
    Scenario("requests_1", "plain", 1),
    Scenario("requests_8", "plain", 8),
    Scenario("streams_32", "stream", 32, for_rate=True),
    Scenario("streams_1", "stream", 1),
    Scenario("streams_8", "stream", 8),
    Scenario("paced_100", "stream", 100, PACED, least_seconds=4 * PACED_STREAM_SECONDS),
    Scenario(
        "paced_100_spread", "stream", 100, PACED, spread=PACED_STREAM_SECONDS, least_seconds=4 * PACED_STREAM_SECONDS
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long. Seconds of a run, of a slow target's run for a rate, and of each warm-up; rounds over all targets."""

    seconds: float = 4.0
    slow_seconds: float = 12.0
    warm_seconds: float = 1.0
    rounds: int = 3
    scenarios: tuple[Scenario, ...] = SCENARIOS

    def seconds_of(self, target: Target, scenario: Scenario) -> float:
        """How long one run takes."""
        seconds = self.slow_seconds if target.slow and scenario.for_rate else self.seconds
        return max(seconds, scenario.least_seconds)


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one run showed. Times in ms; `cpu_ms` a right answer, drained ones included; None where no answer was
    right.

    `share` is the part of its core that the target used, `neighbours` the part that went to anything else: both 0 to
    1, while the load was on and drained. A rate whose share is well below 1 was limited by something else.
    """

    scenario: str
    answers: int
    errors: dict[str, int]
    per_second: float
    cpu_ms: float | None
    p50_ms: float | None
    p99_ms: float | None
    first_p50_ms: float | None
    first_p99_ms: float | None
    share: float
    neighbours: float


@dataclass(slots=True)
class Visit:
    """One target in one round. `failure` says why it was not (wholly) measured."""

    target: str
    round: int
    start_seconds: float | None = None
    rss_mb: float | None = None
    load_average: tuple[float, float, float] = (0.0, 0.0, 0.0)
    measurements: list[Measurement] = field(default_factory=list)
    failure: str | None = None


def quantile(values: Sequence[float], part: float) -> float | None:
    """The nearest-rank quantile, None of nothing: the smallest value that at least `part` of all do not exceed."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1000


def _busy_seconds(core: int) -> float:
    """CPU seconds that the core has spent on anything, since boot."""
    times = psutil.cpu_times(percpu=True)[core]
    return float(times.user + times.nice + times.system)


def measured(target: Target, program: Program, core: int, scenario: Scenario, seconds: float) -> Measurement:
    """Run one scenario against a running target; `core` is the target's."""
    body = wire.request_body(scenario.kind, scenario.marker)
    began, busy, cpu = perf_counter(), _busy_seconds(core), program.cpu_seconds()
    tally = load.run(target.address, load.Load(scenario.kind, body, scenario.concurrency, seconds, scenario.spread))
    used = program.cpu_seconds() - cpu
    others, took = _busy_seconds(core) - busy - used, perf_counter() - began
    answers = len(tally.latencies)
    return Measurement(
        scenario=scenario.name,
        answers=answers,
        errors=dict(tally.errors),
        per_second=tally.per_second,
        cpu_ms=used / answers * 1000 if answers else None,
        p50_ms=_ms(quantile(tally.latencies, 0.5)),
        p99_ms=_ms(quantile(tally.latencies, 0.99)),
        first_p50_ms=_ms(quantile(tally.first_tokens, 0.5)),
        first_p99_ms=_ms(quantile(tally.first_tokens, 0.99)),
        share=used / took,
        neighbours=max(0.0, others) / took,
    )


def answers_rightly(address: load.Address) -> bool:
    """Whether one plain request is answered in full. Raises `OSError` or `http.client.HTTPException` while nothing
    listens."""
    return why_wrong(address, "plain") is None


def why_wrong(address: load.Address, kind: wire.Kind) -> str | None:
    """Ask once, parse the answer as a client would, and say what is wrong with it."""
    reply = load.ask(address, wire.request_body(kind))
    if reply.status != 200:
        return f"status {reply.status}"
    try:
        said = wire.said(kind, reply.body)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return f"not an OpenAI answer ({type(error).__name__})"
    if said.text != wire.TEXT:
        return "not the upstream's text"
    return None if said.done else "no [DONE]"


def _warm_up(target: Target, seconds: float) -> None:
    for kind in ("plain", "stream"):
        body = wire.request_body(kind)
        load.run(target.address, load.Load(kind, body, 8, seconds))


def _started(target: Target, upstream: Program, core: int, work: Path) -> AbstractContextManager[Program]:
    if target.launch is None:
        return nullcontext(upstream)
    log = work / "log" / f"{target.name}.log"
    return running(target.title, target.launch, core, log, partial(answers_rightly, target.address))


def _ready(target: Target, program: Program, seconds: float) -> None:
    """Check one answer of each kind, then warm up. Raises `BenchError` where an answer is wrong."""
    for kind in ("plain", "stream"):
        if wrong := why_wrong(target.address, kind):
            raise BenchError(f"{target.title} answers a {kind} request wrongly: {wrong} (log: {program.log})")
    _warm_up(target, seconds)


class Round:
    """One round: every target is started, then every scenario is run against each in turn, then all are stopped.

    Invariant: a target with a failure is not measured any further in this round, and the others are.
    """

    def __init__(
        self, number: int, targets: Sequence[Target], upstream: Program, cores: tuple[int, int], work: Path
    ) -> None:
        self._targets = targets
        self._upstream = upstream
        self._cores = cores
        self._work = work
        self._programs: dict[str, Program] = {}
        self.visits = {target.name: Visit(target.name, number) for target in targets}

    def run(self, plan: Plan) -> list[Visit]:
        """Measure; the visits are in the order of the targets."""
        with ExitStack() as started:
            for target in self._targets:
                self._start(target, plan, started)
            for scenario in plan.scenarios:
                for target in self._targets:
                    self._measure(target, scenario, plan.seconds_of(target, scenario))
            for name, program in self._programs.items():
                self.visits[name].rss_mb = program.rss_mb()
        return list(self.visits.values())

    def _core(self, target: Target) -> int:
        return self._cores[0] if target.launch else self._cores[1]

    def _start(self, target: Target, plan: Plan, started: ExitStack) -> None:
        visit = self.visits[target.name]
        visit.load_average = os.getloadavg()
        try:
            program = started.enter_context(_started(target, self._upstream, self._core(target), self._work))
            _ready(target, program, plan.warm_seconds)
        except (BenchError, OSError, http.client.HTTPException) as error:
            visit.failure = str(error)
            return
        visit.start_seconds = program.start_seconds if target.launch else None
        self._programs[target.name] = program

    def _measure(self, target: Target, scenario: Scenario, seconds: float) -> None:
        program = self._programs.get(target.name)
        if program is None:
            return
        visit = self.visits[target.name]
        visit.measurements.append(measured(target, program, self._core(target), scenario, seconds))
        if program.ended():
            visit.failure = f"it ended during {scenario.name}: {program.last_words()} (log: {program.log})"
            del self._programs[target.name]


def measure(
    targets: Sequence[Target], plan: Plan, upstream: Program, cores: tuple[int, int], work: Path, say: Say
) -> list[Visit]:
    """All rounds. `say` is told what came of each visit, a line for each."""
    visits: list[Visit] = []
    for number in range(1, plan.rounds + 1):
        done = Round(number, targets, upstream, cores, work).run(plan)
        for visit in done:
            rate = next((one.per_second for one in visit.measurements if one.scenario == "requests_64"), 0.0)
            outcome = visit.failure or f"{rate:,.0f} requests/s"
            say(f"round {number} of {plan.rounds}: {visit.target}: {outcome}")
        visits += done
    return visits
