"""The least that any router could have paid for the same requests, and the most that it could have attained.

An offline schedule knows all lengths, all latencies and the future. The best one is a mixed-integer program that nobody
solves; its relaxation is a linear program that HiGHS does, and whose value no router in front of these engines can
beat, one that holds requests back included. It is relaxed only where that favours the schedule:

- A request may be split: a third of it here, the rest there, each part paying and counting as much.
- A cloud never fails, is never full, and shows at once how fast it would have been (the weather that the routers met).
- An engine may compute what it wants in which order, as long as in no interval of time it computes more than it can. Of
  a request that runs there, an interval counts what cannot be done outside of it.

What an engine can is its step model. Let the work of each step be spread evenly over the step; then with `S` steps, `q`
prompt tokens, `n` decoded tokens, `k` cached tokens looked back at, and `m` tokens' room held in the cache, each summed
over the steps (or parts of them) within an interval of `L` seconds,

    fixed * S + per prompt token * q + per sequence * n + per cached token * k <= L
    q + n <= token budget * S        n <= most sequences * S        m <= cache * S

and without `S`: the fixed part, shared out by `q + n`, by `n` or by `m`, is at most all of it, three rows an interval.
What cannot be done outside of an interval from `a` to `b`, for a request that comes at `t` with a first token due by
`d`, and `o` output tokens, follows from what the engine never does (works.py has the arithmetic):

- One request is never charged more than one second a second: of its prompt's work `P` no more than `a - t` was done
  before, no more than `d - b` is left for later, if its first token comes in time.
- A prompt's blocks are held in each of its steps, and no chunk is longer than the budget, so later chunks look back at
  all but the last ones.
- It decodes after its prompt. A sequence that is not preempted makes a token in each step. So it has made at most
  `(a - t - P) / shortest step` by `a`, the shortest being one in which it decodes alone; and from there, or from `d`
  on, it makes at least one in each `longest step` until `b`, unless it is at its end.
- One that is preempted after its first token computes its prompt once more, and has only the end of the run as a limit
  for that and for what it decodes; one whose first token comes late has it for everything.

A class that limits the total time puts everything between `t` and that limit. Attainment is the share of requests whose
latency class is met; those without one always meet it. Requests that the invariants keep have no cloud to go to.
Refused requests cost nothing, so a bound is for at most so many refusals as the router made, and for schedules that end
no later than the router did.

There are as many intervals as pairs of times. The program begins with a few; then those that its solution overfills are
found (intervals.py) and added, until that changes next to nothing.

The value is not taken on trust: by weak duality any prices of engine-seconds and of attainment give a bound, so what is
returned is worked out from the program's prices again, and a solver that errs gives a lower bound, not a wrong one.

scipy is an extra (`hybridgate[bound]`) and imported when a bound is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from gateway.policy import Slo
from gateway.simulate.mix import Request
from gateway.simulate.step import EngineModel
from gateway.simulate.works import SHARES, Least, Work, least_prompt_s, longest_step_s
from gateway.simulate.world import World
from gateway.types import NUSD_PER_USD, Usage

WIDTHS_S = (8.0, 32.0, 128.0)
"""Of the intervals that the program begins with, each half of its width after the one before."""
MOST_ROUNDS = 12
ROWS_A_ROUND = 60
"""Intervals that are added after a solution at most, for each way to share out the fixed part of steps."""
WORTH = 2e-4
"""The relative gain of a round below which it is the last."""
IDLE_ROUNDS = 3
"""An interval that had no price in so many solutions in a row is dropped."""
_SLACK = 1e-9
_ROUNDING = 1e-7
"""Of attainments: what the solver's tolerance may take away from what it found attainable."""


class NoBound(Exception):
    """A bound that cannot be worked out, in a sentence with the fix."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No router with at least this attainment, and as few refusals, pays less than `cost_nusd`. `local_share` is what
    the relaxed schedule keeps at the engines."""

    attainment: float
    cost_nusd: float
    local_share: float


def met_in_s(slo: Slo | None) -> tuple[float, float]:
    """The seconds that a class leaves for the first token, and for the whole answer; infinite where it does not say."""
    if slo is None:
        return inf, inf
    first, total = slo.first_token_p95_ms, slo.total_p95_ms
    return (inf if first is None else first / 1000), (inf if total is None else total / 1000)


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way for a request to go. `works` is what it asks of `engine` at least, for each way of `SHARES`."""

    request: int
    cost_nusd: float
    met: bool
    engine: str | None = None
    works: tuple[tuple[Work, ...], ...] = ()
    refused: bool = False


@dataclass(slots=True)
class _Row:
    """An interval of an engine: the columns that have work in it, how much, and how much there may be. `idle` counts
    solutions in which more time there would not have helped."""

    columns: Any
    seconds: Any
    length: float
    idle: int = 0


@dataclass(frozen=True, slots=True)
class _Solution:
    """A relaxed schedule; `value` is what its prices prove of the objective."""

    value: float
    schedule: Any


class Bounds:
    """The bounds of one world. `until` is when the schedules must have ended, in seconds from the first arrival."""

    def __init__(self, world: World, until: float) -> None:
        """Raises NoBound where scipy is missing."""
        try:
            import numpy  # noqa: PLC0415 - an extra
            from scipy.optimize import linprog  # noqa: PLC0415
            from scipy.sparse import csr_array  # noqa: PLC0415

            from gateway.simulate import intervals  # noqa: PLC0415
        except ImportError:
            raise NoBound("the lower bound needs scipy: pip install 'hybridgate[bound]'") from None
        self._np: Any = numpy
        self._linprog: Any = linprog
        self._sparse: Any = csr_array
        self._most = intervals.chosen
        self._count = len(world.requests)
        self._until = max(until, world.requests[-1].arrival_s) + _SLACK
        self._choices = [choice for request in world.requests for choice in _choices(world, request, self._until)]
        self._works = [
            intervals.Works(*_columns(self._choices, name, share), self._until)
            for name in world.fleet.engines
            for share in range(len(SHARES))
        ]
        ones = numpy.ones(len(self._choices))
        whole = ([choice.request for choice in self._choices], range(len(self._choices)))
        self._whole = csr_array((ones, whole), shape=(self._count, len(ones)))
        self._met = numpy.array([float(choice.met) for choice in self._choices])
        self._refused = numpy.array([float(choice.refused) for choice in self._choices])
        self._rows: list[_Row] = []

        self._turn = 0
        for index in range(len(self._works)):
            for begins, ends in _grid(self._until):
                self._add(index, begins, ends)

    def most_attainable(self, refused: int = 0) -> float:
        """The share of requests whose class may be met at most."""
        return min(1.0, -self._solved(-self._met, 0.0, refused, MOST_ROUNDS).value / self._count)

    def reference(self) -> Bound:
        """The bound for schedules that refuse nothing and attain as much as can be."""
        for _ in range(MOST_ROUNDS):
            try:
                return self.least_cost(self.most_attainable())
            except NoBound:  # the intervals that were added on the way show that not so much is attainable
                continue
        raise NoBound("how much is attainable was not found out")

    def least_cost(self, attainment: float, refused: int = 0, rounds: int = MOST_ROUNDS) -> Bound:
        """The bound for schedules that meet the class of at least this share of requests. With fewer `rounds` it is
        found sooner, and is less tight where no bound for about as much was worked out before. Raises NoBound where so
        much is not attainable."""
        costs = self._np.array([choice.cost_nusd / NUSD_PER_USD for choice in self._choices])
        solved = self._solved(costs, attainment, refused, rounds)
        local = sum(solved.schedule[index] for index, choice in enumerate(self._choices) if choice.engine is not None)
        return Bound(attainment, max(0.0, solved.value * NUSD_PER_USD), float(local) / self._count)

    def _solved(self, objective: Any, attainment: float, refused: int, rounds: int) -> _Solution:
        """The relaxation with as many intervals as are worth it. Raises NoBound where nothing is feasible."""
        best: _Solution | None = None
        for turn in range(rounds):
            solved = self._relaxed(objective, attainment, refused)
            if solved is None:
                raise NoBound("no schedule attains that much")
            gain = inf if best is None else solved.value - best.value
            if best is None or gain > 0:
                best = solved
            if gain <= WORTH * abs(best.value) or turn == rounds - 1 or not self._cut(solved.schedule):
                break
        assert best is not None
        return best

    def _relaxed(self, objective: Any, attainment: float, refused: int) -> _Solution | None:
        """The least value of the objective with the intervals that there are, as far as its prices prove it; None where
        nothing is feasible."""
        np = self._np
        matrix, limits = self._matrix(), [-(attainment - _ROUNDING) * self._count, float(refused)]
        limits = np.array(limits + [row.length for row in self._rows])
        upper = np.where(self._refused > 0, min(1.0, refused), 1.0)
        found = self._linprog(
            objective,
            A_ub=matrix,
            b_ub=limits,
            A_eq=self._whole,
            b_eq=np.ones(self._count),
            bounds=np.stack([np.zeros(len(upper)), upper], axis=1),
            method="highs-ipm",
        )
        if found.x is None:
            return None
        prices, each = np.minimum(found.ineqlin.marginals, 0.0), found.eqlin.marginals
        for row, price in zip(self._rows, prices[2:], strict=True):
            row.idle = 0 if price < 0 else row.idle + 1
        reduced = objective - matrix.T @ prices - self._whole.T @ each
        value = float(limits @ prices + each.sum() + np.minimum(reduced, 0.0) @ upper)
        return _Solution(value, found.x)

    def _matrix(self) -> Any:
        """Attainment, refusals and the intervals, as rows `a x <= b`."""
        np, every = self._np, self._np.arange(len(self._choices))
        columns = [every, every, *(row.columns for row in self._rows)]
        values = [-self._met, self._refused, *(row.seconds for row in self._rows)]
        ends = np.cumsum([0, *map(len, columns)])
        shape = (len(columns), len(self._choices))
        return self._sparse((np.concatenate(values), np.concatenate(columns), ends), shape=shape)

    def _cut(self, schedule: Any) -> bool:
        """Add the intervals that a schedule overfills most, and drop those that were no use; whether there are any to
        add."""
        self._rows = [row for row in self._rows if row.idle < IDLE_ROUNDS]
        added = [
            self._add(index, one.begins, one.ends)
            for index, works in enumerate(self._works)
            for one in self._most(works.overfull(schedule, self._turn), ROWS_A_ROUND)
        ]
        self._turn += 1
        return any(added)

    def _add(self, index: int, begins: float, ends: float) -> bool:
        columns, seconds = self._works[index].within(begins, ends)
        if float(seconds.sum()) <= ends - begins:
            return False
        self._rows.append(_Row(columns, seconds, ends - begins))
        return True


def _columns(choices: Sequence[_Choice], engine: str, share: int) -> tuple[list[int], list[Work]]:
    """The works on one engine, each with its choice."""
    pairs = [
        (column, work)
        for column, choice in enumerate(choices)
        if choice.engine == engine
        for work in choice.works[share]
    ]
    return [column for column, _ in pairs], [work for _, work in pairs]


def _choices(world: World, request: Request, until: float) -> Iterator[_Choice]:
    """The ways for one request: each engine, in time or not, and of the clouds the cheapest, and the cheapest that
    meets its class."""
    policy, facts = world.policy, request.facts
    permit = policy.permit(facts)
    first_by, total_by = met_in_s(policy.slo[facts.slo] if facts.slo is not None else None)
    usage = Usage(request.prompt_tokens, request.output_tokens)
    yield _Choice(request.index, 0.0, met=False, refused=True)
    clouds: list[_Choice] = []
    for name, deployment in policy.deployments.items():
        if deployment.price is None or permit.passage(deployment.zone) is None:
            continue
        if facts.deployments is not None and name not in facts.deployments:
            continue
        cost = deployment.price.cost(usage)
        if name in world.fleet.clouds:
            luck = world.weather[name][request.index]
            met = luck.first_s <= first_by and luck.total_s(request.output_tokens) <= total_by
            clouds.append(_Choice(request.index, cost, met))
        elif name in world.fleet.engines:
            yield from _at_engine(request, name, world.fleet.engines[name], cost, first_by, total_by, until)
    clouds.sort(key=lambda choice: choice.cost_nusd)
    yield from clouds[:1]
    if clouds and not clouds[0].met:
        yield from [choice for choice in clouds if choice.met][:1]


def _at_engine(
    request: Request, name: str, engine: EngineModel, cost: float, first_by: float, total_by: float, until: float
) -> Iterator[_Choice]:
    arrival, prompt, output = request.arrival_s, max(1, request.prompt_tokens), request.output_tokens
    if prompt + output > engine.capacity:
        return
    ways = [Least(engine, share) for share in SHARES]

    def choice(met: bool, works: Iterable[Iterable[Work]]) -> _Choice:
        return _Choice(request.index, cost, met, name, tuple(map(tuple, works)))

    if first_by < inf or total_by < inf:
        yield choice(False, (way.at_any_time(prompt, output, arrival, until, until) for way in ways))
        if least_prompt_s(engine, prompt) > min(first_by, total_by):
            return
    due, end = min(until, arrival + min(first_by, total_by)), min(until, arrival + total_by)
    if output > 1 and due < until and due + (output - 1) * longest_step_s(engine) < arrival + total_by:
        yield choice(True, (way.in_time(prompt, output, arrival, due, end) for way in ways))
        yield choice(True, (way.preempted(prompt, output, arrival, due, end) for way in ways))
    else:
        yield choice(True, (way.at_any_time(prompt, output, arrival, due, end) for way in ways))


def _grid(until: float) -> Iterator[tuple[float, float]]:
    """The intervals that the program begins with."""
    yield 0.0, until
    for width in WIDTHS_S:
        for index in range(int(2 * until / width)):
            yield index * width / 2, index * width / 2 + width
