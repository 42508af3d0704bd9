"""Clouds as a caller sees them: the time to the first token and of each token after it, rate limits, outages.

Owns the distributions and what is drawn from them. Every request has its luck with every cloud drawn before the world
begins, so that all policies, and the bound, meet the same weather. Refuses queues: a cloud has as many machines as it
needs, or says that it has not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from random import Random

from gateway.simulate.mix import Request
from gateway.simulate.synthetic import lognormal

_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Quantiles:
    """A lognormal duration in seconds, by its median and 95th percentile."""

    p50: float
    p95: float

    def drawn(self, chance: Random) -> float:
        mean, deviation = lognormal(self.p50, self.p95)
        return exp(mean + deviation * chance.gauss(0.0, 1.0))


@dataclass(frozen=True, slots=True)
class CloudModel:
    """A cloud deployment. `prompt_s_per_token` comes on top of the first token's time. Limits are per minute, counted
    over the last 60 s. In an outage (`start`, `end` in seconds of the trace) it answers with an error after
    `fails_after_s`; `failure_share` of the requests meet one besides."""

    first_token: Quantiles = Quantiles(0.30, 0.60)
    per_token: Quantiles = Quantiles(0.010, 0.020)
    prompt_s_per_token: float = 5e-6
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    outages: tuple[tuple[float, float], ...] = ()
    fails_after_s: float = 0.25
    failure_share: float = 0.0

    def down(self, now: float) -> bool:
        """Whether there is an outage."""
        return any(start <= now < end for start, end in self.outages)


@dataclass(frozen=True, slots=True)
class Luck:
    """What a request would meet at a cloud: seconds to the first token, seconds for each after it, or an error."""

    first_s: float
    each_s: float
    fails: bool = False

    def total_s(self, output_tokens: int) -> float:
        return self.first_s + self.each_s * (output_tokens - 1)


Weather = Mapping[str, Sequence[Luck]]


def weather(clouds: Mapping[str, CloudModel], requests: Sequence[Request], seed: int) -> Weather:
    """Each request's luck with each cloud, by name and index."""
    drawn: dict[str, list[Luck]] = {}
    for name, cloud in clouds.items():
        chance = Random(f"{seed}:{name}")  # noqa: S311 - a seeded draw is what is wanted
        drawn[name] = [
            Luck(
                cloud.first_token.drawn(chance) + request.prompt_tokens * cloud.prompt_s_per_token,
                cloud.per_token.drawn(chance),
                chance.random() < cloud.failure_share,
            )
            for request in requests
        ]
    return drawn


class RateLimit:
    """How much of a cloud's limits the last minute has used. Invariant: what is held is what was admitted in the last
    60 s, and its sums."""

    def __init__(self, cloud: CloudModel) -> None:
        self._cloud = cloud
        self._admitted: deque[tuple[float, int]] = deque()
        self._tokens = 0

    def admit(self, tokens: int, now: float) -> float | None:
        """Count a request of so many tokens; or, where a limit is reached, seconds until there is room again."""
        while self._admitted and self._admitted[0][0] <= now - _MINUTE:
            self._tokens -= self._admitted.popleft()[1]
        cloud = self._cloud
        requests, most = cloud.requests_per_minute, cloud.tokens_per_minute
        if (requests is not None and len(self._admitted) >= requests) or (
            most is not None and self._admitted and self._tokens + tokens > most
        ):
            return self._admitted[0][0] + _MINUTE - now
        self._admitted.append((now, tokens))
        self._tokens += tokens
        return None
