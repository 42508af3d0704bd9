"""`python -m tests.bench.simulated`: the simulated engine beside the real one, on the same arrivals.

Calibrates the bundled model, replays a drawn trace on the real scheduler and the real model, simulates the same trace,
and prints first-token and total times of both. By default all times are the processor's, and the replay's clock is
moved on by what each step took of it, so that neighbours on the machine do not count. With `--wall` the trace is
replayed on the whole engine, threads and event loop included, by the clock on the wall, and needs a machine with
nothing else to do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.simulate.engine import Engine as SimulatedEngine
from gateway.simulate.score import quantile
from gateway.simulate.step import EngineModel, of_calibration
from gateway.simulate.synthetic import synthetic, synthetic_of
from gateway.simulate.trace import Row
from local_engine.calibrate import document, measured
from local_engine.config import Settings
from local_engine.engine import Engine, Job, Model
from local_engine.loading import load
from local_engine.scheduler import Scheduler
from local_engine.sequence import FinishReason, Pick, SamplingParams
from local_engine.sequence import Sequence as TokenSequence

TRACE = "poisson,rate=6,seconds=30,prompt=120,output=30,seed=1"
LONGEST = 400  # tokens of a prompt, and of an answer: both fit the bundled model's window together


@dataclass(frozen=True)
class Times:
    """Seconds from arrival to the first token and to the last, one for each request."""

    first: Sequence[float]
    total: Sequence[float]


def rows_of(text: str) -> list[Row]:
    """The trace, with lengths that the bundled model holds."""
    return [
        Row(row.arrival_s, min(row.prompt_tokens, LONGEST), min(max(2, row.output_tokens), LONGEST))
        for row in synthetic(synthetic_of(text)).rows
    ]


def prompt_of(index: int, row: Row, vocabulary: int) -> tuple[int, ...]:
    """A prompt of the row's length. No two share a prefix, since the simulated engine knows nothing of prefixes."""
    return tuple((7919 * (index + 1) + 31 * position) % vocabulary for position in range(row.prompt_tokens))


async def on_the_real_engine(model: Model, rows: Sequence[Row]) -> Times:
    """Replay the arrivals on the whole engine, by the clock on the wall."""
    ready = asyncio.Event()
    engine = Engine(lambda: model, on_change=ready.set)
    engine.start()
    await ready.wait()
    began = time.perf_counter()
    vocabulary = model.text.vocab_size

    async def one(index: int, row: Row) -> tuple[float, float]:
        await asyncio.sleep(max(0.0, row.arrival_s - (time.perf_counter() - began)))
        prompt = prompt_of(index, row, vocabulary)
        params = SamplingParams(max_tokens=row.output_tokens, temperature=1.0, seed=index, ignore_eos=True)
        sent = time.perf_counter()
        first: float | None = None
        async for _ in engine.add(Job(str(index), prompt, params)):
            first = first or time.perf_counter() - sent
        return first or 0.0, time.perf_counter() - sent

    try:
        times = await asyncio.gather(*(one(index, row) for index, row in enumerate(rows)))
    finally:
        engine.stop()
    return Times([first for first, _ in times], [total for _, total in times])


def on_the_real_scheduler(model: Model, rows: Sequence[Row]) -> Times:
    """The real scheduler plans, the real model computes; time is what that takes of the processor."""
    scheduler, first, total = Scheduler(model.limits), [0.0] * len(rows), [0.0] * len(rows)
    now, arrived, open_requests = 0.0, 0, len(rows)
    while open_requests:
        while arrived < len(rows) and rows[arrived].arrival_s <= now:
            prompt = prompt_of(arrived, rows[arrived], model.text.vocab_size)
            scheduler.add(TokenSequence(str(arrived), len(prompt), list(prompt), rows[arrived].output_tokens))
            arrived += 1
        began = time.thread_time()
        batch = scheduler.schedule()
        if not batch:
            now = rows[arrived].arrival_s
            continue
        sampling = [chunk for chunk in batch if chunk.samples]
        picks = [Pick(SamplingParams(max_tokens=1, temperature=0.0), 0.0)] * len(sampling)
        logits = model.runner.forward(batch)
        tokens = model.runner.sample(logits, list(range(len(sampling))), picks) if sampling else []
        seconds = time.thread_time() - began
        now += seconds
        scheduler.pace.record(seconds=seconds, prefill_tokens=batch.prefill_tokens, decode_tokens=len(batch.decode))
        for chunk in batch:
            scheduler.complete(chunk)
        for chunk, token in zip(sampling, tokens, strict=True):
            index = int(chunk.sequence.id)
            if chunk.sequence.generated == 0:
                first[index] = now - rows[index].arrival_s
            if chunk.sequence.append(token or 0) is not None:
                scheduler.finish(chunk.sequence, FinishReason.LENGTH)
                total[index] = now - rows[index].arrival_s
                open_requests -= 1
    return Times(first, total)


def simulated(model: EngineModel, rows: Sequence[Row]) -> Times:
    """The same arrivals in virtual time."""
    engine, first, total = SimulatedEngine(model), [0.0] * len(rows), [0.0] * len(rows)
    now, arrived, open_requests = 0.0, 0, len(rows)
    while open_requests:
        while arrived < len(rows) and rows[arrived].arrival_s <= now:
            engine.add(arrived, rows[arrived].prompt_tokens, rows[arrived].output_tokens, 0, None)
            arrived += 1
        seconds = engine.begin()
        if seconds is None:
            now = rows[arrived].arrival_s
            continue
        now += seconds
        came = engine.end()
        for key in came.first:
            first[key] = now - rows[key].arrival_s
        for key in came.ended:
            total[key] = now - rows[key].arrival_s
            open_requests -= 1
    return Times(first, total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trace", default=TRACE, help=f"what arrives (default {TRACE})")
    parser.add_argument("--wall", action="store_true", help="the whole engine, by the clock on the wall")
    arguments = parser.parse_args()
    model = load(Settings(model="demo"))
    clock = time.perf_counter if arguments.wall else time.thread_time
    steps = measured(model.runner, model.limits, model.text.vocab_size, clock)
    calibration = document("demo", model.limits, steps)
    rows = rows_of(arguments.trace)
    real = asyncio.run(on_the_real_engine(model, rows)) if arguments.wall else on_the_real_scheduler(model, rows)
    virtual = simulated(of_calibration("measured", json.dumps(calibration)), rows)
    sys.stdout.write(f"{len(rows)} requests; calibration: {json.dumps(calibration['step'])}\n")
    sys.stdout.write(f"fit: {json.dumps(calibration['fit'])}\n{'':17}{'real':>8}{'simulated':>12}{'off by':>8}\n")
    for name, theirs, ours in (("first token", real.first, virtual.first), ("whole answer", real.total, virtual.total)):
        for q in (0.5, 0.95):
            a, b = (1000 * (quantile(sorted(times), q) or 0.0) for times in (theirs, ours))
            label = f"{name} p{q * 100:.0f}"
            sys.stdout.write(f"{label:<17}{a:>5.0f} ms{b:>9.0f} ms{b / a - 1:>+8.0%}\n")


if __name__ == "__main__":
    main()
