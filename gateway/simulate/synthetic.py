"""Traces that never happened: arrivals and lengths drawn from a seed, for those who have no recording.

Owns the draws and what they are asked for as text. Refuses any chance but the seed's: the same words give the same
trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import isfinite, log
from random import Random
from typing import Literal, get_args

from gateway.simulate.trace import Row, Trace, TraceError

Arrivals = Literal["poisson", "bursty"]
SPREAD = 0.8  # of the lengths' logarithm: between Azure's prompts of conversations (1.0) and answers (0.7)
PHASE_S = 10.0
_LONGEST = 1_000_000


@dataclass(frozen=True, slots=True)
class Synthetic:
    """What to draw: `rate` requests a second for `seconds`, prompts and outputs of these mean lengths in tokens
    (lognormal). Bursty arrivals alternate between phases of `PHASE_S` seconds in the mean, busy ones with `burst` times
    the arrivals of quiet ones."""

    arrivals: Arrivals = "poisson"
    rate: float = 1.0
    seconds: float = 600.0
    prompt: float = 1000.0
    output: float = 200.0
    burst: float = 4.0
    seed: int = 0


def synthetic_of(text: str) -> Synthetic:
    """What `poisson,rate=5,seconds=600,prompt=1200,output=200` asks for. Raises TraceError."""
    kind, *pairs = (part.strip() for part in text.split(","))
    if kind not in get_args(Arrivals):
        raise TraceError(
            f"synthetic: begins with poisson or bursty, then {_KEYS}; for example poisson,rate=5,seconds=60"
        )
    values: dict[str, float] = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if name not in _NAMES or not (isfinite(value) and value >= (0 if name == "seed" else 1e-9)):
            raise TraceError(f"synthetic: each part must be one of {_KEYS} with a positive number")
        values[name] = value
    seed = int(values.pop("seed", 0))
    made = Synthetic(arrivals="bursty" if kind == "bursty" else "poisson", seed=seed, **values)
    if made.rate * made.seconds > _LONGEST:
        raise TraceError(
            f"synthetic: {made.rate:g} a second for {made.seconds:g} s are more than {_LONGEST:,} requests"
        )
    return made


_NAMES = frozenset(field.name for field in fields(Synthetic)) - {"arrivals"}
_KEYS = ", ".join(f"{field.name}=" for field in fields(Synthetic) if field.name != "arrivals")


def synthetic(asked: Synthetic) -> Trace:
    """The trace. Raises TraceError where nothing arrives."""
    chance = Random(asked.seed)  # noqa: S311 - a seeded draw is what is wanted
    arrivals = (
        _bursty(asked, chance) if asked.arrivals == "bursty" else _poisson(asked.rate, 0.0, asked.seconds, chance)
    )
    rows = tuple(Row(moment, _length(asked.prompt, chance), _length(asked.output, chance)) for moment in arrivals)
    if not rows:
        raise TraceError("synthetic: nothing arrives; ask for more seconds or a higher rate")
    return Trace(f"synthetic {asked.arrivals}", rows)


def _poisson(rate: float, start: float, end: float, chance: Random) -> Iterator[float]:
    moment = start + chance.expovariate(rate)
    while moment < end:
        yield moment
        moment += chance.expovariate(rate)


def _bursty(asked: Synthetic, chance: Random) -> Iterator[float]:
    quiet = 2 * asked.rate / (1 + asked.burst)  # phases last alike, so that the mean of both rates is the one asked for
    start, busy = 0.0, False
    while start < asked.seconds:
        end = start + chance.expovariate(1 / PHASE_S)
        yield from _poisson(quiet * asked.burst if busy else quiet, start, min(end, asked.seconds), chance)
        start, busy = end, not busy


def _length(mean: float, chance: Random) -> int:
    """A lognormal length of this mean, at least 1."""
    return max(1, round(chance.lognormvariate(log(mean) - SPREAD**2 / 2, SPREAD)))


def lognormal(p50: float, p95: float) -> tuple[float, float]:
    """Mean and deviation of the logarithm of what has this median and 95th percentile."""
    return log(p50), max(0.0, log(p95 / p50)) / _Z95


_Z95 = 1.6448536269514722
