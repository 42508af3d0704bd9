"""Owns `hybridgate-engine calibrate`: how long this engine's steps take, as numbers that a simulation can use.

A step with q prompt tokens, n decoding sequences and k cached tokens that they look back at is taken to last
`fixed + q * per prompt token + n * per sequence + k * per cached token`. The four are fitted to steps of the real
runner over a grid, by least squares of the relative error, none of them below 0. Refuses HTTP, and text beyond token
ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from local_engine.batch import Batch, Chunk
from local_engine.choosing import Runner
from local_engine.config import Limits
from local_engine.sequence import Pick, SamplingParams
from local_engine.sequence import Sequence as TokenSequence

VERSION = 1
"""Of the document; gateway/simulate/step.py reads it."""

REPEATS = 5

_GREEDY = Pick(SamplingParams(max_tokens=1, temperature=0.0), 0.0)


@dataclass(frozen=True, slots=True)
class Load:
    """A step to measure: `sequences` that decode with `context` tokens each (the newest included), and a chunk of
    `prompt` tokens from position `start` on."""

    sequences: int = 0
    context: int = 1
    prompt: int = 0
    start: int = 0

    @property
    def looked_back(self) -> int:
        """Cached tokens that the step reads, as the simulated engine counts them."""
        return self.sequences * self.context + self.start


@dataclass(frozen=True, slots=True)
class Measured:
    """A step and how long it took: the median of its repeats, in seconds."""

    load: Load
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """The four numbers, in seconds."""

    fixed_s: float
    per_prompt_token_s: float
    per_sequence_s: float
    per_cached_token_s: float

    def seconds(self, load: Load) -> float:
        """What a step with this load is taken to last."""
        return (
            self.fixed_s
            + load.prompt * self.per_prompt_token_s
            + load.sequences * self.per_sequence_s
            + load.looked_back * self.per_cached_token_s
        )


def grid(limits: Limits) -> list[Load]:
    """Steps over the whole range that the limits allow: decoding alone, prompts alone, both."""
    decoding = list(_decoding(limits))
    prompts = list(_prompts(limits))
    most = max((load.sequences for load in decoding), default=1)
    mixed = [
        Load(both.sequences, both.context, load.prompt, load.start)
        for both in decoding
        for load in prompts
        if both.sequences in (1, max(1, most // 4)) and load.start == 0
    ]
    return [load for load in (*decoding, *prompts, *mixed) if _fits(load, limits)]


def _decoding(limits: Limits) -> Iterator[Load]:
    contexts = sorted({max(1, limits.capacity * share // 16) for share in (1, 4, 8, 15)})
    sequences = 1
    while sequences <= limits.max_running:
        for context in contexts:
            load = Load(sequences=sequences, context=context)
            if _fits(load, limits):
                yield load
        sequences *= 2


def _prompts(limits: Limits) -> Iterator[Load]:
    most = min(limits.max_batch_tokens, limits.capacity)
    for prompt in sorted({max(2, most // share) for share in (16, 8, 4, 2, 1)}):
        for start in sorted({0, limits.capacity // 4, limits.capacity // 2}):
            if start + prompt <= limits.capacity:
                yield Load(prompt=prompt, start=start)


def _fits(load: Load, limits: Limits) -> bool:
    blocks = load.sequences * -(-load.context // limits.block_size)
    blocks += -(-(load.start + load.prompt) // limits.block_size)
    return blocks <= limits.num_blocks and load.sequences + load.prompt <= limits.max_batch_tokens


def batch_of(load: Load, limits: Limits, vocabulary: int) -> Batch:
    """A batch with this load, over blocks that no two sequences share."""
    taken = 0

    def chunk(name: str, start: int, size: int) -> Chunk:
        nonlocal taken
        tokens = [(7919 * position + 13) % vocabulary for position in range(start + size)]
        count = -(-(start + size) // limits.block_size)
        blocks = tuple(range(taken, taken + count))
        taken += count
        sequence = TokenSequence(id=name, prompt_length=len(tokens), tokens=tokens, max_tokens=1)
        return Chunk(sequence, start, tuple(tokens[start:]), blocks, samples=True, fresh=start == 0)

    decode = tuple(chunk(str(index), load.context - 1, 1) for index in range(load.sequences))
    prefill = (chunk("prompt", load.start, load.prompt),) if load.prompt else ()
    return Batch(decode, prefill)


def measured(
    runner: Runner,
    limits: Limits,
    vocabulary: int,
    clock: Callable[[], float],
    repeats: int = REPEATS,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Every step of the grid, run and timed, its sampling included, as the engine's own loop does it. The first run of
    each is not counted. Nobody else may use the runner meanwhile."""
    found = []
    loads = grid(limits)
    for index, load in enumerate(loads):
        batch = batch_of(load, limits, vocabulary)
        rows = list(range(sum(1 for _ in batch)))
        times = []
        for _ in range(1 + repeats):
            began = clock()
            runner.sample(runner.forward(batch), rows, [_GREEDY] * len(rows))
            times.append(clock() - began)
        found.append(Measured(load, median(times[1:])))
        if index % 10 == 9:
            say(f"{index + 1} of {len(loads)} steps measured")
    return found


def fit(steps: Sequence[Measured]) -> Step:
    """The four numbers by least squares of the relative error; one that would be below 0 is 0, and the others are
    fitted without it."""
    rows = np.array([[1.0, m.load.prompt, m.load.sequences, m.load.looked_back] for m in steps])
    scaled = rows / np.array([[m.seconds] for m in steps])
    used = list(range(rows.shape[1]))
    while True:
        # Columns differ by orders of magnitude: brought to one length, lest the solver take a small one for nothing.
        lengths = np.linalg.norm(scaled[:, used], axis=0)
        lengths[lengths == 0.0] = 1.0
        found = np.linalg.lstsq(scaled[:, used] / lengths, np.ones(len(steps)), rcond=None)[0] / lengths
        if (found >= 0).all():
            break
        used.pop(int(np.argmin(found * lengths)))
    numbers = dict(zip(used, map(float, found), strict=True))
    return Step(*(numbers.get(column, 0.0) for column in range(rows.shape[1])))


def document(name: str, limits: Limits, steps: Sequence[Measured]) -> dict[str, Any]:
    """What is written down: the numbers, the engine's limits, and how far off the numbers are on the steps that they
    were fitted to."""
    step = fit(steps)
    errors = sorted(abs(step.seconds(m.load) / m.seconds - 1) for m in steps)
    return {
        "version": VERSION,
        "model": name,
        "step": asdict(step),
        "limits": {
            "num_blocks": limits.num_blocks,
            "block_size": limits.block_size,
            "max_batch_tokens": limits.max_batch_tokens,
            "max_running": limits.max_running,
            "max_waiting": limits.max_waiting,
            "max_waiting_tokens": limits.max_waiting_tokens,
            "window": limits.window,
        },
        "fit": {
            "steps": len(steps),
            "median_relative_error": round(median(errors), 4),
            "p95_relative_error": round(errors[int(0.95 * (len(errors) - 1))], 4),
        },
    }
