"""The least that any router could have paid for the same requests, and the most that it could have attained.

An offline schedule knows all lengths, all latencies and the future. The best one is a mixed-integer program that nobody
solves; its relaxation is a linear program that HiGHS does, and whose value no router can beat. It is relaxed only where
that favours the schedule:

- A request may be split: a third of it here, the rest there, each part paying and counting as much.
- A cloud never fails, is never full, and shows at once how fast it would have been (the weather that the routers met).
- An engine may compute what it wants in which order, as long as in each of many intervals of time it does not compute
  more than it can. Of a request that runs there, an interval counts what cannot be done outside of it.

What an engine can is its step model, summed over the steps of an interval of `L` seconds with `S` steps:

    fixed * S + per prompt token * q + per sequence * n + per cached token * k <= L
    q + n <= token budget * S        n <= most sequences * S        k <= cache * S

for `q` prompt tokens, `n` tokens decoded and `k` cached tokens looked back at (the first is chosen freely by the
program: it shares the fixed part out as well as can be). And what cannot be done outside of an interval, for a request
that comes at `t` with a first token due by `d` and `o` output tokens, is

- its whole prompt, if the first token comes in time and `t` to `d` lies in the interval;
- everything, if besides `t` to `d + (o - 1) * longest step` does: a sequence that is never preempted makes a token in
  each step, and no step is longer than `EngineModel.longest_step_s`;
- everything and its prompt once more, if it was preempted after its first token, for which only the end of the run is
  a limit; everything, if its first token comes late, likewise.

A class that limits the total time puts everything between `t` and that limit. Attainment is the share of requests whose
latency class is met; those without one always meet it. Requests that the invariants keep have no cloud to go to.
Refused requests cost nothing, so a bound is for at most so many refusals as the router made, and for schedules that end
no later than the router did.

The value is not taken on trust: by weak duality any prices of engine-seconds and of attainment give a bound, so what is
returned is worked out from the program's prices again, and a solver that errs gives a lower bound, not a wrong one.

scipy is an extra (`hybridgate[bound]`) and imported when a bound is asked for.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

from gateway.policy import Slo
from gateway.simulate.mix import Request
from gateway.simulate.step import EngineModel
from gateway.simulate.world import World
from gateway.types import NUSD_PER_USD, Usage

WIDTHS_S = (4.0, 32.0, 128.0)
"""Of the intervals, which begin every half of their width; besides those that last until the end. More of them make
the bound tighter and the program slower: seven times as many gave 3 % more on a bursty trace."""
LATE_STARTS = 4
_SLACK = 1e-9


class NoBound(Exception):
    """A bound that cannot be worked out, in a sentence with the fix."""


@dataclass(frozen=True, slots=True)
class Bound:
    """No router with at least this attainment, and as few refusals, pays less than `cost_nusd`. `local_share` is what
    the relaxed schedule keeps at the engines."""

    attainment: float
    cost_nusd: float
    local_share: float


@dataclass(frozen=True, slots=True)
class _Work:
    """What a choice asks of an engine between two times: prompt tokens, decoded ones, cached ones looked back at."""

    begins: float
    ends: float
    prompt: float
    decoded: float
    cached: float


@dataclass(frozen=True, slots=True)
class _Choice:
    """One way for a request to go. `works` is what it asks of `engine`; an interval counts those that lie within it."""

    request: int
    cost_nusd: float
    met: bool
    engine: str | None = None
    works: tuple[_Work, ...] = ()
    refused: bool = False


def met_in_s(slo: Slo | None) -> tuple[float, float]:
    """The seconds that a class leaves for the first token, and for the whole answer; infinite where it does not say."""
    if slo is None:
        return inf, inf
    first, total = slo.first_token_p95_ms, slo.total_p95_ms
    return (inf if first is None else first / 1000), (inf if total is None else total / 1000)


@dataclass
class _Program:
    """The linear program in the making: rows `a x <= b` as coordinates, one variable a choice and then one an
    interval."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)

    def row(self, limit: float) -> int:
        self.limits.append(limit)
        return len(self.limits) - 1

    def put(self, row: int, column: int, value: float) -> None:
        if value:
            self.rows.append(row)
            self.columns.append(column)
            self.values.append(value)


class Bounds:
    """The bounds of one world. `until` is when the schedules must have ended, in seconds from the first arrival."""

    def __init__(self, world: World, until: float) -> None:
        """Raises NoBound where scipy is missing."""
        try:
            import numpy  # noqa: PLC0415 - an extra
            from scipy.optimize import linprog  # noqa: PLC0415
            from scipy.sparse import csr_array  # noqa: PLC0415
        except ImportError:
            raise NoBound("the lower bound needs scipy: pip install 'hybridgate[bound]'") from None
        self._np: Any = numpy
        self._linprog: Any = linprog
        self._sparse: Any = csr_array
        self._world = world
        self._count = len(world.requests)
        last = world.requests[-1].arrival_s
        self._until = max(until, last) + _SLACK
        self._choices = [choice for request in world.requests for choice in _choices(world, request, self._until)]
        self._assemble()

    def most_attainable(self, refused: int = 0) -> float:
        """The share of requests whose class may be met at most."""
        value, _ = self._solved([-float(choice.met) for choice in self._choices], 0.0, refused)
        return min(1.0, -value / self._count)

    def least_cost(self, attainment: float, refused: int = 0) -> Bound:
        """The bound for schedules that meet the class of at least this share of requests. It must be attainable."""
        value, x = self._solved([choice.cost_nusd / NUSD_PER_USD for choice in self._choices], attainment, refused)
        local = sum(x[index] for index, choice in enumerate(self._choices) if choice.engine is not None)
        return Bound(attainment, max(0.0, value * NUSD_PER_USD), float(local) / self._count)

    def _assemble(self) -> None:
        """Everything but the objective, and the limits on attainment and refusals, which are the first two rows."""
        program, choices = _Program(), self._choices
        self._met_row, self._refused_row = program.row(0.0), program.row(0.0)
        for column, choice in enumerate(choices):
            program.put(self._met_row, column, -float(choice.met))
            program.put(self._refused_row, column, float(choice.refused))
        columns = len(choices)
        self._upper = [1.0] * columns
        starts = _grid(self._world.requests[-1].arrival_s, self._until)
        for name, engine in self._world.fleet.engines.items():
            mine = [(column, choice) for column, choice in enumerate(choices) if choice.engine == name]
            arrivals = [choice.works[0].begins for _, choice in mine]
            for begins, ends in starts:
                some = mine[bisect_left(arrivals, begins) : bisect_right(arrivals, ends)]
                held = list(_held(some, ends))
                if not held:
                    continue
                _interval(program, columns, engine, ends - begins, held)
                self._upper.append(_most_steps(engine, ends - begins, held))
                columns += 1
        shape = (len(program.limits), columns)
        self._a = self._sparse((program.values, (program.rows, program.columns)), shape=shape)
        self._b = self._np.array(program.limits)
        ones = [1.0] * len(choices)
        whole = ([c.request for c in choices], range(len(choices)))
        self._a_eq = self._sparse((ones, whole), shape=(self._count, columns))

    def _solved(self, objective: Sequence[float], attainment: float, refused: int) -> tuple[float, Any]:
        """The least value of the objective, as far as the program's prices prove it, and the schedule."""
        np = self._np
        limits = self._b.copy()
        limits[self._met_row], limits[self._refused_row] = -(attainment - _SLACK) * self._count, refused
        upper = np.array(self._upper)
        costs = np.zeros(len(upper))
        costs[: len(objective)] = objective
        ones = np.ones(self._count)
        found = self._linprog(
            costs,
            A_ub=self._a,
            b_ub=limits,
            A_eq=self._a_eq,
            b_eq=ones,
            bounds=np.stack([np.zeros(len(upper)), upper], axis=1),
            method="highs-ipm",
        )
        if found.x is None:
            raise NoBound("no schedule attains that much")
        prices, each = np.minimum(found.ineqlin.marginals, 0.0), found.eqlin.marginals
        reduced = costs - self._a.T @ prices - self._a_eq.T @ each
        return float(limits @ prices + each.sum() + np.minimum(reduced, 0.0) @ upper), found.x


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
    decoded = float(output - 1)
    cached = decoded * (prompt + output / 2)  # the lengths prompt + 1 to prompt + output - 1
    whole = _Work(arrival, until, prompt, decoded, cached)
    if first_by < inf or total_by < inf:
        yield _Choice(request.index, cost, met=False, engine=name, works=(whole,))
        if _least_prompt_s(engine, prompt) > first_by:
            return
    due = arrival + min(first_by, total_by)
    ends = min(until, arrival + total_by, due + decoded * engine.longest_step_s)
    first = _Work(arrival, min(due, until), prompt, 0.0, 0.0)
    rest = _Work(arrival, ends, 0.0, decoded, cached)
    yield _Choice(request.index, cost, met=True, engine=name, works=(first, rest))
    if ends < min(until, arrival + total_by):
        again = _Work(arrival, min(until, arrival + total_by), prompt, decoded, cached)
        yield _Choice(request.index, cost, met=True, engine=name, works=(first, again))


def _least_prompt_s(engine: EngineModel, prompt: int) -> float:
    """Seconds that an engine needs for a prompt alone. A chunk of one token costs what a decoding sequence does."""
    steps = ceil(prompt / engine.max_batch_tokens)
    single = min(engine.per_prompt_token_s, engine.per_sequence_s)
    in_chunks = (prompt - steps) * engine.per_prompt_token_s + steps * (single + engine.fixed_s)
    return min(in_chunks, prompt * (single + engine.fixed_s))


def _most_steps(engine: EngineModel, length: float, held: Sequence[_Held]) -> float:
    """Steps that an interval has at most, of those that compute what it holds: each computes a token at least."""
    tokens = sum(prompt + decoded for _, prompt, decoded, _, _ in held)
    return min(tokens, length / engine.fixed_s) if engine.fixed_s else tokens


def _grid(last: float, until: float) -> list[tuple[float, float]]:
    """The intervals that are looked at."""
    intervals = [(0.0, until)]
    for width in WIDTHS_S:
        count = int(2 * until / width)
        intervals += [(index * width / 2, index * width / 2 + width) for index in range(count)]
    intervals += [(last * index / LATE_STARTS, until) for index in range(1, LATE_STARTS)]
    return intervals


_Held = tuple[int, float, float, float, int]


def _held(mine: Sequence[tuple[int, _Choice]], ends: float) -> Iterator[_Held]:
    """Of the work that ends within the interval (all of it begins there): column, prompt tokens, decoded ones, cached
    ones looked back at, and how many prompts there are in it."""
    for column, choice in mine:
        within = [work for work in choice.works if work.ends <= ends]
        if within:
            yield (
                column,
                sum(work.prompt for work in within),
                sum(work.decoded for work in within),
                sum(work.cached for work in within),
                sum(work.prompt > 0 for work in within),
            )


def _interval(program: _Program, steps: int, engine: EngineModel, length: float, held: Sequence[_Held]) -> None:
    """The rows of one interval; `steps` is the column of its number of steps.

    A prompt's chunk of one token costs what a decoding sequence does. There may be one at the end of each prompt, and
    one in each step, where that is all that was left of the budget: so many prompt tokens are taken to cost that.
    """
    seconds, budget = program.row(length), program.row(0.0)
    places, cache = program.row(0.0), program.row(0.0)
    saved = max(0.0, engine.per_prompt_token_s - engine.per_sequence_s)
    program.put(seconds, steps, engine.fixed_s - saved)
    program.put(budget, steps, -engine.max_batch_tokens)
    program.put(places, steps, -engine.max_running)
    program.put(cache, steps, -engine.num_blocks * engine.block_size)
    for column, prompt, decoded, cached, prompts in held:
        work = prompt * engine.per_prompt_token_s - prompts * saved
        work += decoded * engine.per_sequence_s + cached * engine.per_cached_token_s
        program.put(seconds, column, work)
        program.put(budget, column, prompt + decoded)
        program.put(places, column, decoded)
        program.put(cache, column, cached)
