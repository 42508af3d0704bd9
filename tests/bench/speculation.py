"""What guessing tokens gains: `python -m tests.bench.speculation`.

The bundled model answers its blind questions through the engine, without HTTP: nothing guessed, by prompt lookup, and
with the bundled draft, in rounds that take turns. So many streams ask one question after the other. Prints a table of
tokens per second of CPU time and its ratio to plain decoding: the median of the rounds' ratios, since a neighbour on
the machine slows both down. The answers of all three are compared, and have to be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median

from local_engine.config import SPECULATIONS, Settings
from local_engine.conversation import Conversation, Message
from local_engine.demo_model import corpus as corpora
from local_engine.demo_model.evaluate import FOLDER
from local_engine.engine import Engine, Job
from local_engine.loading import load
from local_engine.sequence import SamplingParams

LONGEST = 96
PLAIN = "off"


@dataclass(frozen=True, slots=True)
class Round:
    """What one mode made of a round's questions."""

    tokens: int
    cpu_seconds: float
    answers: tuple[str, ...]

    @property
    def rate(self) -> float:
        return self.tokens / self.cpu_seconds


async def played(engine: Engine, prompts: Sequence[tuple[int, ...]], streams: int, temperature: float) -> Round:
    """All prompts, by so many streams."""
    answers = [""] * len(prompts)
    tokens = 0
    waiting = iter(enumerate(prompts))

    async def stream() -> None:
        nonlocal tokens
        for place, prompt in waiting:
            params = SamplingParams(max_tokens=LONGEST, temperature=temperature, seed=place)
            async for deltas in engine.add(Job(f"{time.monotonic_ns()}-{place}", prompt, params)):
                answers[place] += "".join(delta.text for delta in deltas)
                if deltas[-1].finish is not None:
                    tokens += deltas[-1].completion_tokens

    before = time.process_time()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return Round(tokens, time.process_time() - before, tuple(answers))


async def ready(mode: str) -> Engine:
    """An engine that has loaded the bundled model."""
    loaded = asyncio.Event()
    engine = Engine(lambda: load(Settings(model="demo", speculation=mode)), on_change=loaded.set)
    engine.start()
    await loaded.wait()
    return engine


def questions(engine: Engine, *, again: bool) -> Iterator[tuple[int, ...]]:
    """Prompts of the blind questions without end, in an order that mixes topics; or each asked a second time, after its
    right answer."""
    blind = corpora.load(FOLDER).blind
    prompts = []
    for case in (*blind.unseen, *blind.documented):
        messages = [Message(turn["role"], turn["content"]) for turn in case.messages]
        if again:
            messages += [Message("assistant", case.answer), *messages[-1:]]
        prompts.append(tuple(engine.model.text.encode_chat(Conversation(tuple(messages)))))
    return cycle(prompts[start] for step in range(7) for start in range(step, len(prompts), 7))


async def run(streams: Sequence[int], rounds: int, each: int, temperature: float, again: bool) -> None:
    engines = {mode: await ready(mode) for mode in SPECULATIONS}
    source = questions(engines[PLAIN], again=again)
    print(f"{'streams':>8} " + " ".join(f"{mode:>24}" for mode in SPECULATIONS))
    for count in streams:
        made: dict[str, list[Round]] = {mode: [] for mode in SPECULATIONS}
        for number in range(rounds + 1):  # the first warms up and is not counted
            asked = list(islice(source, max(each, 2 * count)))
            order = SPECULATIONS[number % 3 :] + SPECULATIONS[: number % 3]
            found = {mode: await played(engines[mode], asked, count, temperature) for mode in order}
            for mode in SPECULATIONS:
                if found[mode].answers != found[PLAIN].answers:
                    raise SystemExit(f"{mode} answers something else than plain decoding")
                if number:
                    made[mode].append(found[mode])
        cells = []
        for mode in SPECULATIONS:
            ratio = median(a.rate / b.rate for a, b in zip(made[mode], made[PLAIN], strict=True))
            report = engines[mode].report()
            acceptance = "" if report.acceptance is None else f" {report.acceptance:.0%}"
            cells.append(f"{median(r.rate for r in made[mode]):9.0f}/s {ratio:5.2f}x{acceptance:>5}")
        print(f"{count:>8} " + " ".join(f"{cell:>24}" for cell in cells), flush=True)
    for engine in engines.values():
        await asyncio.to_thread(engine.stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--questions", type=int, default=16, help="a round; at least two for each stream")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--again", action="store_true", help="each question a second time, after its answer")
    options = parser.parse_args()
    asyncio.run(run(options.streams, options.rounds, options.questions, options.temperature, options.again))


if __name__ == "__main__":
    main()
