"""Owns what is measured, and in which order: all servers in each round, one after the other, with the same prompts;
refuses to judge it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

from local_engine.bench.load import Answered, ask, ask_all
from local_engine.bench.program import BenchError, Program
from local_engine.bench.shapes import prompts

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes in tokens; at least so many requests a run, one after the other where there are fewer streams."""

    streams: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    prompt_tokens: int = 54
    new_tokens: int = 64
    prefix_tokens: int = 1000
    least_requests: int = 3

    def requests(self, streams: int) -> int:
        """Requests of one run."""
        return max(streams, self.least_requests)


@dataclass(frozen=True, slots=True)
class Run:
    """One server with so many streams in one round. Times in seconds; `cpu` is nan where the system does not tell."""

    server: str
    precision: str
    streams: int
    round: int
    tokens: int
    seconds: float
    cpu: float
    first: float
    texts: tuple[str, ...]

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens a second of the server's CPU time."""
        return self.tokens / self.cpu if self.cpu else float("nan")


@dataclass(frozen=True, slots=True)
class Prefix:
    """Seconds to the first token of a long prompt, and of the same prompt asked again."""

    server: str
    precision: str
    round: int
    cold: float
    again: float


@dataclass(slots=True)
class Measured:
    """What came of all rounds. A server that fails is left out from there on; `failed` says why."""

    runs: list[Run] = field(default_factory=list)
    prefixes: list[Prefix] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def attempt(self, program: Program, say: Say, what: Callable[[], None]) -> None:
        """Do it, unless this server has failed before."""
        name = program.launch.name
        if name in self.failed:
            return
        try:
            what()
        except (BenchError, OSError, ExceptionGroup, TimeoutError) as error:
            self.failed[name] = f"{_reason(error)} ({program.last_words()})"
            say(f"{name} is left out: {self.failed[name]}")


def measure(programs: Sequence[Program], plan: Plan, precision: str, vocabulary: int, say: Say) -> Measured:
    """All rounds over these servers."""
    found = Measured()
    for program in programs:
        found.attempt(program, say, partial(_warm, program, plan, vocabulary))
    for number in range(plan.rounds):
        for streams in plan.streams:
            asked = prompts(1 + number * 1000 + streams, vocabulary, plan.prompt_tokens, plan.requests(streams))
            for program in _turned(programs, number):
                found.attempt(program, say, partial(_run, found.runs, program, plan, precision, streams, number, asked))
            said = _told(found.runs, number, streams)
            say(f"{precision}, round {number + 1} of {plan.rounds}, {streams} streams: {said}")
        (long,) = prompts(500_000 + number, vocabulary, plan.prefix_tokens, 1)
        for program in _turned(programs, number):
            found.attempt(program, say, partial(_prefix, found.prefixes, program, precision, number, long))
    return found


def _turned(programs: Sequence[Program], number: int) -> list[Program]:
    """In another order each round, so that nobody always runs behind the same neighbour."""
    start = number % len(programs)
    return [*programs[start:], *programs[:start]]


def _warm(program: Program, plan: Plan, vocabulary: int) -> None:
    asked = prompts(0, vocabulary, plan.prompt_tokens, min(4, max(plan.streams)))
    asyncio.run(ask_all(program.launch, asked, len(asked), 4))


def _run(
    runs: list[Run],
    program: Program,
    plan: Plan,
    precision: str,
    streams: int,
    number: int,
    asked: Sequence[str],
) -> None:
    cpu, began = program.cpu_seconds(), time.perf_counter()
    answers = asyncio.run(ask_all(program.launch, asked, streams, plan.new_tokens))
    seconds, used = time.perf_counter() - began, program.cpu_seconds() - cpu
    first, texts = median(answer.first for answer in answers), tuple(answer.text for answer in answers)
    tokens = plan.new_tokens * len(answers)
    runs.append(Run(program.launch.name, precision, streams, number, tokens, seconds, used, first, texts))


def _prefix(prefixes: list[Prefix], program: Program, precision: str, number: int, long: str) -> None:
    async def both() -> tuple[Answered, Answered]:
        return await ask(program.launch, long, 4), await ask(program.launch, long, 4)

    cold, again = asyncio.run(both())
    prefixes.append(Prefix(program.launch.name, precision, number, cold.first, again.first))


def _told(runs: Sequence[Run], number: int, streams: int) -> str:
    here = [run for run in runs if run.round == number and run.streams == streams]
    return ", ".join(f"{run.server} {run.rate:.0f} tok/s" for run in here)


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error) or type(error).__name__
