"""What a request asks of an engine at the very least, whoever schedules it: seconds of work, and how late it can be.

Owns the arithmetic of the step model that the lower bound (bound.py) stands on; its docstring has the proofs. Refuses
money and the choice of a deployment.

An engine's steps, each of `fixed + per_prompt_token * q + per_sequence * n + per_cached_token * k` seconds, follow one
another, and the work of a step is taken to be spread evenly over it. Of a step's fixed part each request is charged a
share: of its tokens in the budget, of its decoding in the places, or of its blocks in the cache (three ways, `SHARES`,
each of which charges at most the whole of it). So in any interval all requests together are charged no more seconds
than it has, and a single request no more than one second a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf
from typing import Literal

from gateway.simulate.step import EngineModel

Share = Literal["budget", "places", "cache"]
SHARES: tuple[Share, ...] = ("budget", "places", "cache")
AT_ONCE = inf
"""Seconds of work a second, for work that is counted whole or not at all."""


@dataclass(frozen=True, slots=True)
class Work:
    """At least `seconds` of charged work, none of it before `begins`, and all of it by `ends`. Of it at most `before`
    seconds a second can be done early, from `begins` on, and at most `after` seconds a second be left for later, until
    `ends`; so in an interval from `a` to `b` there are at least `seconds - before * (a - begins) - after * (ends - b)`
    (where a difference is not above 0, nothing is taken off).

    Where it `runs`, it goes on without a break from `foot` at the latest until all is done, at `after` seconds a second
    at least; so there are at least `after * (b - max(a, foot))`, or all that cannot have been done before `a`. What is
    done at once does not run."""

    begins: float
    ends: float
    seconds: float
    before: float
    after: float
    runs: bool = False

    @property
    def foot(self) -> float:
        """Until when all of it may be left."""
        return self.ends - self.seconds / self.after


class Least:
    """The least work of requests on one engine, with the fixed part of steps shared out in one way."""

    def __init__(self, engine: EngineModel, share: Share) -> None:
        self._engine = engine
        self._share = share
        self._cache = engine.num_blocks * engine.block_size
        self._budget = max(engine.max_batch_tokens, engine.max_running)  # decoding sequences are never held back
        # A chunk of one token costs what a decoding sequence does. There may be one at the end of each prompt, and one
        # in each step, where that is all that was left of the budget: the latter is taken from the step's fixed part.
        self._prompt_token = engine.per_prompt_token_s
        self._saved = max(0.0, engine.per_prompt_token_s - engine.per_sequence_s)
        self._fixed = engine.fixed_s - self._saved
        if self._fixed < 0:
            self._prompt_token, self._saved = engine.per_sequence_s, 0.0
            self._fixed = engine.fixed_s
        self._longest = longest_step_s(engine)

    def in_time(self, prompt: int, output: int, arrival: float, due: float, end: float) -> Iterator[Work]:
        """Of a request whose first token comes by `due`, and that is never preempted after it; all of it by `end`."""
        yield self._prompt(prompt, arrival, due)
        decoded = output - 1
        if not decoded:
            return
        first, whole = self._decoded(prompt, decoded)
        begins, shortest = arrival + least_prompt_s(self._engine, prompt), self._shortest(prompt)
        slowest = due + decoded * self._longest
        yield Work(begins, slowest, decoded * first, first / shortest, first / self._longest, runs=True)
        yield Work(begins, min(slowest, end), whole - decoded * first, AT_ONCE, AT_ONCE)

    def at_any_time(self, prompt: int, output: int, arrival: float, due: float, end: float) -> Iterator[Work]:
        """Of a request whose first token comes by `due`, and the rest by `end`, in pieces or not."""
        yield self._prompt(prompt, arrival, due)
        if output > 1:
            _, whole = self._decoded(prompt, output - 1)
            yield Work(arrival + least_prompt_s(self._engine, prompt), end, whole, 1.0, 1.0)

    def preempted(self, prompt: int, output: int, arrival: float, due: float, end: float) -> Iterator[Work]:
        """Of a request whose first token comes by `due`, and whose prompt is computed again as it lost its blocks."""
        first = self._prompt(prompt, arrival, due)
        yield first
        again = first.seconds + self._decoded(prompt, output - 1)[1]
        yield Work(arrival + least_prompt_s(self._engine, prompt), end, again, 1.0, 1.0)

    def _prompt(self, prompt: int, arrival: float, due: float) -> Work:
        engine = self._engine
        looked_back = engine.per_cached_token_s * _looked_back(prompt, engine.max_batch_tokens)
        held = ceil(prompt / engine.block_size) * engine.block_size / self._cache
        steps = ceil(prompt / engine.max_batch_tokens)
        shared = {"budget": prompt / self._budget, "places": 0.0, "cache": held * steps}[self._share]
        seconds = max(0.0, self._prompt_token * prompt - self._saved) + looked_back + self._fixed * shared
        most = self._prompt_token * engine.max_batch_tokens + engine.per_cached_token_s * prompt  # in one step
        part = self._fixed * {"budget": 1.0, "places": 0.0, "cache": held}[self._share]
        rate = min(1.0, (most + part) / (most + self._fixed)) if most + self._fixed else 1.0
        return Work(arrival, due, seconds, rate, rate)

    def _decoded(self, prompt: int, decoded: int) -> tuple[float, float]:
        """Seconds of the first token that is decoded, which is the cheapest, and of all of them: the lengths that are
        looked back at are from prompt + 1 to prompt + decoded."""
        engine, size = self._engine, self._engine.block_size
        lengths = decoded * prompt + decoded * (decoded + 1) / 2
        first = engine.per_sequence_s + engine.per_cached_token_s * (prompt + 1)
        whole = decoded * engine.per_sequence_s + engine.per_cached_token_s * lengths
        if self._share == "cache":
            blocks = _blocks_up_to(prompt + decoded, size) - _blocks_up_to(prompt, size)
            one, every = ceil((prompt + 1) / size) * size / self._cache, blocks * size / self._cache
        else:
            one = 1 / (self._budget if self._share == "budget" else engine.max_running)
            every = decoded * one
        return first + self._fixed * one, whole + self._fixed * every

    def _shortest(self, prompt: int) -> float:
        """Seconds that a step has at least in which a sequence of this prompt decodes."""
        return self._engine.step_s(0, 1, prompt + 1)


def least_prompt_s(engine: EngineModel, prompt: int) -> float:
    """Seconds that an engine needs for a prompt alone."""
    steps = ceil(prompt / engine.max_batch_tokens)
    single = min(engine.per_prompt_token_s, engine.per_sequence_s)  # a chunk of one token
    in_chunks = (prompt - steps) * engine.per_prompt_token_s + steps * (single + engine.fixed_s)
    looked_back = engine.per_cached_token_s * _looked_back(prompt, engine.max_batch_tokens)
    return min(in_chunks, prompt * (single + engine.fixed_s)) + looked_back


def longest_step_s(engine: EngineModel) -> float:
    """Seconds that no step exceeds: the whole cache looked back at, and the dearest mix of prompt tokens and decoding
    sequences that the budget leaves."""
    budget, places, cache = engine.max_batch_tokens, engine.max_running, engine.num_blocks * engine.block_size
    mixes = (0, min(budget, places), places)
    return max(engine.step_s(max(0, budget - decoding), decoding, cache) for decoding in mixes)


def _looked_back(prompt: int, most: int) -> float:
    """Cached tokens that a prompt's chunks look back at, at least. No chunk has more than `most` tokens, so before the
    last one all but so many were computed, before the last but one all but twice as many, and so on."""
    chunks = (prompt - 1) // most
    return chunks * prompt - most * chunks * (chunks + 1) / 2


def _blocks_up_to(length: int, size: int) -> float:
    """The sum of the blocks that sequences of the lengths 1 to `length` hold."""
    full, rest = divmod(length, size)
    return size * full * (full + 1) / 2 + rest * (full + 1)
