"""Owns how much of a step is the engine's own: scheduling, sampling, text and delivery, everything but the forward;
refuses HTTP."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from local_engine.batch import Batch
from local_engine.choosing import Runner
from local_engine.engine import Engine, Job, Model
from local_engine.output import Output
from local_engine.sequence import Likelihood, Pick, SamplingParams


class Timed:
    """A runner whose forwards' CPU time is counted, in seconds, while `counting`."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.thread_time) -> None:
        self._runner = runner
        self._clock = clock
        self.seconds = 0.0

    def forward(self, batch: Batch) -> Any:
        began = self._clock()
        try:
            return self._runner.forward(batch)
        finally:
            self.seconds += self._clock() - began

    def sample(self, logits: Any, rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return self._runner.sample(logits, rows, picks)

    def likelihoods(
        self, logits: Any, rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return self._runner.likelihoods(logits, rows, tokens, tops)


def overhead(load: Callable[[], Model], streams: int, *, prompt_tokens: int, new_tokens: int) -> float:
    """The share of this process's CPU time, over so many requests at once, that no forward takes. Raises
    what loading raises."""
    timed: list[Timed] = []

    def loaded() -> Model:
        model = load()
        timed.append(Timed(model.runner))
        return replace(model, runner=timed[0])

    async def run() -> float:
        changed = asyncio.Event()
        engine = Engine(loaded, on_change=changed.set)
        engine.start()
        await changed.wait()
        try:
            chance = random.Random(5)  # noqa: S311 - the same prompts each time
            size = engine.model.text.vocab_size
            params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
            cpu, forward = time.process_time(), timed[0].seconds
            outputs = [
                engine.add(Job(f"bench-{index}", tuple(chance.choices(range(4, size), k=prompt_tokens)), params))
                for index in range(streams)
            ]
            await asyncio.gather(*(_drained(output) for output in outputs))
            used = time.process_time() - cpu
            return 1 - (timed[0].seconds - forward) / used
        finally:
            engine.stop()

    return asyncio.run(run())


async def _drained(output: Output) -> None:
    async for _ in output:
        pass
