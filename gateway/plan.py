"""Whether a model fits, how fast it is, what it costs, and from which load on that is less than a cloud asks. Pure.

Owns the steady state of one engine under a load and the comparison of its month with a provider's. Memory and time of a
step are roofline.py's, prices are costs.py's. Refuses to hide what is assumed: a plan carries the efficiency that it
was made with.

Under `rate` requests a second an engine spends rate x prefill seconds on prompts, and the rest of each second on decode
steps. With b sequences in decode a step takes s(b), so an answer of n tokens takes n x s(b) / (1 - rate x prefill), and
by Little's law b is rate times that. The wait before a prompt is taken in is that of an M/D/1 queue
(Pollaczek-Khinchine: half of load x service time / (1 - load)), and half a decode step. The most that an engine can
carry is 1 / (prefill + n x s(B) / B) requests a second with its largest batch B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from gateway.charts import Chart, Series
from gateway.costs import HOURS_PER_MONTH, Owned, Rented, Running, Throughput
from gateway.roofline import Roofline
from gateway.types import NUSD_PER_USD, Price

SECONDS_PER_MONTH = HOURS_PER_MONTH * 3600
MAX_BATCH = 64
"""Sequences that our engine decodes together unless told otherwise (`hybridgate-engine serve --max-running`)."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked: requests a second, and tokens of an average prompt and answer."""

    rate: float
    prompt: int
    output: int

    @property
    def context(self) -> int:
        return self.prompt + self.output

    @property
    def tokens_per_month(self) -> float:
        return self.rate * self.context * SECONDS_PER_MONTH


@dataclass(frozen=True, slots=True)
class BreakEven:
    """A provider beside the engine. `usd_per_request` is its price for an average request, `own_usd_per_request` what
    one costs on an engine that is always busy. `tokens_per_month` is from where on one engine costs less, `utilization`
    how busy it is then; both None where it never does, however busy."""

    name: str
    price: Price
    usd_per_request: float
    own_usd_per_request: float
    tokens_per_month: float | None
    utilization: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One model on one kind of engine under one load. Times in seconds, money in USD.

    `batch` is the largest that fits and is allowed, `engines` how many of them the load needs, `concurrency` the
    sequences in decode on each. `first_token_idle_s` is a prompt alone; `first_token_s` the mean under the load,
    `token_s` the time between two tokens then. `utilization` is the share of each engine's capacity that the load
    takes.
    """

    roofline: Roofline
    load: Load
    context: int
    batch: int
    most_sequences: int
    engines: int
    concurrency: float
    most_requests_per_s: float
    first_token_idle_s: float
    first_token_s: float
    token_s: float
    utilization: float
    running: Running
    at_load: Running
    break_even: tuple[BreakEven, ...]

    @property
    def usd_per_month(self) -> float:
        """All engines, under the load."""
        idle = self.at_load.fixed_per_hour * HOURS_PER_MONTH * (self.engines - 1)
        seconds = self.load.rate * SECONDS_PER_MONTH
        return idle + self.at_load.usd_for(seconds * self.load.prompt, seconds * self.load.output)


def made(
    roofline: Roofline,
    held: Rented | Owned,
    load: Load,
    utilization: float,
    against: Mapping[str, Price],
    context: int | None = None,
    max_batch: int = MAX_BATCH,
) -> Plan:
    """The plan for a model that fits with at least one sequence of `context` tokens (`Roofline.most_sequences`)."""
    context = context or load.context
    most = roofline.most_sequences(context)
    assert most > 0, "asked before planning"
    batch = min(most, max_batch)
    prefill_s = roofline.prefill_s(load.prompt)
    step_s = roofline.decode_step_s(batch, batch * _average_context(load))
    most_rate = 1 / (prefill_s + load.output * step_s / batch)
    engines = max(1, ceil(load.rate / most_rate))
    rate = load.rate / engines
    concurrency = _concurrency(roofline, load, rate, prefill_s, batch)
    free = 1 - rate * prefill_s
    current = roofline.decode_step_s(max(1, round(concurrency)), max(1.0, concurrency) * _average_context(load))
    throughput = Throughput(load.prompt / prefill_s, batch / step_s, f"roofline, {batch} sequences")
    used = rate / most_rate
    return Plan(
        roofline=roofline,
        load=load,
        context=context,
        batch=batch,
        most_sequences=most,
        engines=engines,
        concurrency=concurrency,
        most_requests_per_s=most_rate,
        first_token_idle_s=prefill_s,
        first_token_s=prefill_s + rate * prefill_s**2 / (2 * free) + used * current / 2,
        token_s=current / free,
        utilization=used,
        running=Running(held, throughput, utilization),
        at_load=Running(held, throughput, max(used, 1e-6)),
        break_even=tuple(
            _break_even(name, price, Running(held, throughput, 1.0), load, most_rate) for name, price in against.items()
        ),
    )


def _average_context(load: Load) -> float:
    """Tokens in cache of a sequence halfway through its answer."""
    return load.prompt + load.output / 2


def _concurrency(roofline: Roofline, load: Load, rate: float, prefill_s: float, batch: int) -> float:
    """Sequences in decode at once, by Little's law; at most the batch. By bisection, since a step takes longer with
    more of them."""
    free = 1 - rate * prefill_s
    low, high = 0.0, float(batch)
    for _ in range(40):
        middle = (low + high) / 2
        count = max(1.0, middle)
        step_s = roofline.decode_step_s(max(1, round(count)), count * _average_context(load))
        needed = rate * load.output * step_s / free
        low, high = (middle, high) if needed > middle else (low, middle)
    return high


def _usd(price: Price, load: Load) -> float:
    return (price.input * load.prompt + price.output * load.output) / NUSD_PER_USD


def _break_even(name: str, price: Price, busy: Running, load: Load, most_rate: float) -> BreakEven:
    """A month costs F + e a request on an engine and c a request in the cloud, so they meet at F / (c - e) requests."""
    cloud, own = _usd(price, load), _usd(busy.full_price(), load)
    energy = busy.held.busy_per_hour * busy.busy_seconds(load.prompt, load.output) / 3600
    requests = busy.fixed_per_hour * HOURS_PER_MONTH / (cloud - energy) if cloud > energy else None
    if requests is None or requests > most_rate * SECONDS_PER_MONTH:
        return BreakEven(name, price, cloud, own, None, None)
    return BreakEven(name, price, cloud, own, requests * load.context, requests / (most_rate * SECONDS_PER_MONTH))


def chart(plan: Plan) -> Chart:
    """USD a month over tokens a month: engines are bought one by one, cloud tokens are not."""
    load = plan.load
    capacity = plan.most_requests_per_s * load.context * SECONDS_PER_MONTH  # tokens a month of one engine
    last = max(2 * capacity, 2 * load.tokens_per_month)
    volumes = [last * 10 ** (-4 + 4 * step / 200) for step in range(201)]
    series = [
        Series(
            f"{plan.roofline.model.name} on {_engine(plan.roofline)}",
            volumes,
            [_month(plan, v, capacity) for v in volumes],
        )
    ]
    for other in plan.break_even:
        usd_per_token = other.usd_per_request / load.context
        series.append(Series(other.name, volumes, [usd_per_token * volume for volume in volumes], "dashed"))
    met = [other for other in plan.break_even if other.tokens_per_month is not None]
    series.append(
        Series(
            "break-even",
            [other.tokens_per_month or 0.0 for other in met],
            [other.usd_per_request / load.context * (other.tokens_per_month or 0.0) for other in met],
            "points",
        )
    )
    series.append(Series("this load", [load.tokens_per_month], [], "vertical"))
    return Chart(
        f"{load.prompt} prompt and {load.output} answer tokens a request",
        "tokens a month",
        "USD a month",
        series,
        log_x=True,
        log_y=True,
    )


def _month(plan: Plan, tokens: float, capacity: float) -> float:
    """USD of as many engines as carry these tokens."""
    requests = tokens / plan.load.context
    engines = max(1, ceil(tokens / capacity - 1e-9))
    more = plan.running.fixed_per_hour * HOURS_PER_MONTH * (engines - 1)
    return more + plan.running.usd_for(requests * plan.load.prompt, requests * plan.load.output)


def _engine(roofline: Roofline) -> str:
    many = f"{roofline.count} x " if roofline.count > 1 else ""
    return f"{many}{roofline.hardware.name}, {roofline.quantization}"


def document(plan: Plan) -> dict[str, object]:
    """The plan as JSON: bytes, seconds, tokens and USD."""
    made, memory, load = plan.roofline, plan.roofline.memory, plan.load
    return {
        "fits": True,
        "model": made.model.name,
        "parameters": made.model.parameters,
        "active_parameters": made.model.active_parameters,
        "hardware": made.hardware.name,
        "count": made.count,
        "quantization": made.quantization,
        "memory_bytes": {
            "total": round(memory.total),
            "usable": round(memory.usable),
            "weights": round(memory.weights),
            "activations": round(memory.activations),
            "kv_cache": round(max(0.0, memory.free)),
            "kv_per_token": round(memory.kv_per_token),
        },
        "kv_capacity_tokens": made.kv_capacity_tokens,
        "context_tokens": plan.context,
        "most_sequences": plan.most_sequences,
        "load": {"requests_per_s": load.rate, "prompt_tokens": load.prompt, "output_tokens": load.output},
        "batch": plan.batch,
        "most_requests_per_s": plan.most_requests_per_s,
        "engines": plan.engines,
        "utilization": plan.utilization,
        "concurrency": plan.concurrency,
        "first_token_s": {"idle": plan.first_token_idle_s, "mean_under_load": plan.first_token_s},
        "token_s": plan.token_s,
        "tokens_per_s": {"input": plan.running.throughput.input, "output": plan.running.throughput.output},
        "efficiency": made.efficiency.source,
        "usd_per_month": plan.usd_per_month,
        "usd_per_million_tokens": {
            "marginal": _per_million(plan.running.price()),
            "at_utilization": {"utilization": plan.running.utilization, **_per_million(plan.running.full_price())},
            "at_this_load": {"utilization": plan.at_load.utilization, **_per_million(plan.at_load.full_price())},
        },
        "break_even": [
            {
                "model": other.name,
                "usd_per_million_tokens": _per_million(other.price),
                "usd_per_request": other.usd_per_request,
                "own_usd_per_request_when_always_busy": other.own_usd_per_request,
                "tokens_per_month": other.tokens_per_month,
                "utilization": other.utilization,
            }
            for other in plan.break_even
        ],
    }


def _per_million(price: Price) -> dict[str, float]:
    return {"input": price.input / 1000, "output": price.output / 1000}


def cheapest(plans: Sequence[Plan]) -> Plan:
    """The one whose month costs least under the load."""
    return min(plans, key=lambda plan: plan.usd_per_month)
