"""The thread between the event loop and the model, with a model that is a few lines of arithmetic."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from local_engine.batch import Batch
from local_engine.config import Limits
from local_engine.engine import Engine, Job, Model
from local_engine.errors import DeviceLost, EngineError, LoadError, NotReady, OutOfMemory, Overloaded
from local_engine.grammar import Grammar, Matcher
from local_engine.output import Delta, Output
from local_engine.report import Report, State
from local_engine.sequence import FinishReason, Likelihood, Pick, SamplingParams
from local_engine.text import Text

END = 255
BAD_FORWARD, BAD_SAMPLE, NOT_A_NUMBER, BAD_TEXT, UNDECODABLE = 300, 301, 302, 303, 2**40


class CountingRunner:
    """The next token is the last plus one; special tokens in a prompt make it fail in special ways.

    With `gate`, each forward waits for one release, so that a test decides when a step happens.
    """

    def __init__(self, gate: threading.Semaphore | None = None) -> None:
        self.gate = gate
        self.forwards: list[list[str]] = []
        self.threads: set[int] = set()

    def forward(self, batch: Batch) -> list[int]:
        self.forwards.append([chunk.sequence.id for chunk in batch])
        self.threads.add(threading.get_ident())
        if self.gate is not None:
            self.gate.acquire()
        if any(BAD_FORWARD in chunk.tokens for chunk in batch):
            raise RuntimeError("the device said no")
        return [chunk.tokens[-1] for chunk in batch if chunk.samples]

    def sample(self, logits: list[int], rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        last = [logits[row] for row in rows]
        if BAD_SAMPLE in last:
            raise RuntimeError("no such row")
        return [None if token == NOT_A_NUMBER else UNDECODABLE if token == BAD_TEXT else token + 1 for token in last]

    def likelihoods(
        self, logits: list[int], rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
    ) -> list[Likelihood]:
        return [Likelihood(token, 0.0) for token in tokens]


class RandomRunner(CountingRunner):
    """The next token follows the request's own draw."""

    def sample(self, logits: list[int], rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        return [10 + int(pick.draw * 200) for pick in picks]


def job(name: str, *prompt: int, max_tokens: int = 4, stop: tuple[str, ...] = (), seed: int | None = None) -> Job:
    return Job(name, prompt or (20,), SamplingParams(max_tokens=max_tokens, stop=stop, seed=seed))


def model(text: Text, runner: CountingRunner, **limits: int) -> Model:
    sizes = {"num_blocks": 32, "window": 128, "max_waiting": 8} | limits
    return Model("fake", runner, text, Limits(**sizes), frozenset({END}), "")


@asynccontextmanager
async def started(load: Callable[[], Model]) -> AsyncIterator[Engine]:
    loaded = asyncio.Event()
    engine = Engine(load, on_change=loaded.set)
    engine.start()
    try:
        await loaded.wait()
        yield engine
    finally:
        assert await asyncio.to_thread(engine.stop)


async def drained(output: Output) -> list[Delta]:
    return [delta async for deltas in output for delta in deltas]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - what is waited for happens on the engine's thread
            await asyncio.sleep(0.001)


def test_every_request_gets_its_text_and_exactly_one_final_delta(text: Text) -> None:
    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, CountingRunner())) as engine:
            outputs = [engine.add(job(str(n), 40 + n, max_tokens=5)) for n in range(8)]
            return list(await asyncio.gather(*map(drained, outputs)))

    for n, deltas in enumerate(asyncio.run(run())):
        assert [delta.finish for delta in deltas] == [None] * (len(deltas) - 1) + [FinishReason.LENGTH]
        assert deltas[-1].completion_tokens == 5
        answer = text.decoder([40 + n], [])
        assert "".join(d.text for d in deltas) == "".join(map(answer.add, range(41 + n, 46 + n))) + answer.flush()


def test_only_one_thread_touches_the_model_and_it_is_not_the_loops(text: Text) -> None:
    runner = CountingRunner()

    async def run() -> int:
        async with started(lambda: model(text, runner)) as engine:
            await asyncio.gather(*(drained(engine.add(job(str(n)))) for n in range(4)))
        return threading.get_ident()

    loop_thread = asyncio.run(run())
    assert len(runner.threads) == 1
    assert loop_thread not in runner.threads


def test_a_stop_string_ends_the_sequence_and_is_not_shown(text: Text) -> None:
    stop = "".join(map(text.decoder([20], []).add, (22, 23)))

    async def run() -> list[Delta]:
        async with started(lambda: model(text, CountingRunner())) as engine:
            return await drained(engine.add(job("a", 20, max_tokens=9, stop=(stop,))))

    deltas = asyncio.run(run())
    assert "".join(delta.text for delta in deltas) == text.decoder([20], []).add(21)
    assert (deltas[-1].finish, deltas[-1].completion_tokens) == (FinishReason.STOP, 3)


def test_an_end_token_ends_the_sequence_and_counts(text: Text) -> None:
    async def run() -> list[Delta]:
        async with started(lambda: model(text, CountingRunner())) as engine:
            return await drained(engine.add(job("a", END - 1)))

    deltas = asyncio.run(run())
    assert [(d.text, d.finish, d.completion_tokens) for d in deltas] == [("", FinishReason.STOP, 1)]


def test_an_abort_during_a_forward_frees_its_blocks_before_the_next_step(text: Text) -> None:
    gate = threading.Semaphore(0)
    runner = CountingRunner(gate)

    async def run() -> tuple[list[Delta], int, int]:
        async with started(lambda: model(text, runner)) as engine:
            first, second = engine.add(job("a", *range(40, 90), max_tokens=50)), engine.add(job("b", 20, max_tokens=3))
            gate.release()
            await until(lambda: len(runner.forwards) >= 2)
            before = engine.scheduler.load().free_blocks
            engine.abort("a")
            after = engine.scheduler.load().free_blocks
            gate.release(100)
            await drained(second)
            assert engine.totals.aborted == 1
            return await drained(first), before, after

    deltas, before, after = asyncio.run(run())
    assert deltas[-1].finish is FinishReason.ABORT
    assert after - before == 4
    in_flight = next(index for index, names in enumerate(runner.forwards) if names == ["a", "b"])
    assert all("a" not in names for names in runner.forwards[in_flight + 2 :])


def test_closing_an_output_aborts_it_once(text: Text) -> None:
    gate = threading.Semaphore(0)

    async def run() -> int:
        async with started(lambda: model(text, CountingRunner(gate))) as engine:
            output = engine.add(job("a"))
            output.close()
            output.close()
            assert [delta.finish for delta in await drained(output)] == [FinishReason.ABORT]
            assert engine.idle
            gate.release(10)
            return engine.totals.aborted

    assert asyncio.run(run()) == 1


def test_an_abort_is_harmless_whenever_it_comes(text: Text) -> None:
    """Of nobody, while waiting, twice, while preempted, and after the end."""
    gate = threading.Semaphore(0)
    runner = CountingRunner(gate)

    async def run() -> None:
        async with started(lambda: model(text, runner, num_blocks=8, max_running=2)) as engine:
            engine.abort("nobody")
            # Two that come to 4 blocks each and then want a fifth: the later one gives its blocks back.
            outputs = {
                name: engine.add(job(name, *range(first, first + 44), max_tokens=40))
                for first, name in enumerate(("a", "b", "c"), 40)
            }
            await until(lambda: len(runner.forwards) == 1)
            engine.abort("c")
            engine.abort("c")
            while engine.scheduler.preempted_total == 0:
                steps = len(runner.forwards)
                gate.release(1)
                await until(lambda: len(runner.forwards) > steps)  # noqa: B023
            assert engine.scheduler.load().waiting == 1
            engine.abort("b")
            gate.release(1000)
            finals = {name: (await drained(output))[-1].finish for name, output in outputs.items()}
            assert finals == {"a": FinishReason.LENGTH, "b": FinishReason.ABORT, "c": FinishReason.ABORT}
            engine.abort("a")
            assert (engine.totals.finished, engine.totals.aborted) == (1, 2)
            assert engine.scheduler.load().free_blocks == 8
            engine.scheduler.check()

    asyncio.run(run())


@pytest.mark.parametrize("bad", [BAD_SAMPLE, NOT_A_NUMBER, BAD_TEXT])
def test_one_requests_error_ends_that_request_only(text: Text, bad: int) -> None:
    runner = CountingRunner()

    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, runner)) as engine:
            outputs = [engine.add(job("good", 40)), engine.add(job("bad", bad)), engine.add(job("fine", 50))]
            made = list(await asyncio.gather(*map(drained, outputs)))
            assert engine.scheduler.load().free_blocks == 32
            return made

    good, bad_one, fine = asyncio.run(run())
    assert (good[-1].finish, fine[-1].finish) == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert bad_one[-1].finish is FinishReason.ERROR
    assert bad_one[-1].error is not None


class Panic(BaseException):
    """As a library in Rust raises it: no Exception."""


@pytest.mark.parametrize("error", [ValueError, RuntimeError, Panic])
@pytest.mark.parametrize("where", ["allowed", "add"])
def test_a_grammar_that_fails_ends_its_request_only(text: Text, error: type[BaseException], where: str) -> None:
    class Failing(Matcher):
        def __init__(self) -> None:
            pass

        complete = False

        def allowed(self) -> bytes:
            self._or_fail("allowed")
            return bytes([255] * 40)

        def allowed_along(self, tokens: Sequence[int]) -> list[bytes]:
            return [self.allowed()] * (len(tokens) + 1)

        def add(self, token: int) -> None:
            self._or_fail("add")

        def _or_fail(self, at: str) -> None:
            if at == where:
                raise error("of a secret")

    class FailingGrammar(Grammar):
        def __init__(self) -> None:
            pass

        def matcher(self) -> Matcher:
            return Failing()

    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, CountingRunner())) as engine:
            bad = replace(job("bad", 40), grammar=FailingGrammar())
            outputs = [engine.add(each) for each in (job("good", 40), bad, job("fine", 50))]
            async with asyncio.timeout(30):
                return list(await asyncio.gather(*map(drained, outputs)))

    good, bad, fine = asyncio.run(run())
    assert (good[-1].finish, fine[-1].finish) == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert bad[-1].error is not None
    assert "secret" not in bad[-1].error.message


def test_likelihoods_that_fail_end_the_request_that_asked_for_them(text: Text) -> None:
    class Unlikely(CountingRunner):
        def likelihoods(
            self, logits: list[int], rows: Sequence[int], tokens: Sequence[int], tops: Sequence[int]
        ) -> list[Likelihood]:
            if 5 in tops:
                raise RuntimeError("no such row")
            return super().likelihoods(logits, rows, tokens, tops)

    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, Unlikely())) as engine:
            asked = [
                job("plain"),
                *(
                    replace(each, params=replace(each.params, logprobs=top))
                    for each, top in ((job("good"), 2), (job("bad"), 5))
                ),
            ]
            return list(await asyncio.gather(*map(drained, [engine.add(each) for each in asked])))

    plain, good, bad = asyncio.run(run())
    assert (plain[-1].finish, good[-1].finish) == (FinishReason.LENGTH, FinishReason.LENGTH)
    assert all(delta.likelihoods for delta in good)
    assert bad[-1].error is not None


def test_a_panic_outside_any_request_leaves_nobody_waiting(text: Text) -> None:
    class Panicking(CountingRunner):
        def forward(self, batch: Batch) -> list[int]:
            raise Panic

    async def run() -> list[Delta]:
        async with started(lambda: model(text, Panicking())) as engine:
            async with asyncio.timeout(30):
                deltas = await drained(engine.add(job("a")))
            assert engine.state is State.FAILED
            return deltas

    assert asyncio.run(run())[-1].error is not None


def test_a_defect_while_a_step_is_booked_leaves_nobody_without_an_end(text: Text) -> None:
    """Not even those of the same step that had ended before it."""
    gate = threading.Semaphore(0)
    runner = CountingRunner(gate)

    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, runner)) as engine:
            outputs = [engine.add(job("first", 30, max_tokens=9))]
            await until(lambda: len(runner.forwards) == 1)
            outputs += [engine.add(job(name, 40, max_tokens=1)) for name in ("ending", "beside")]
            gate.release(1)
            await until(lambda: len(runner.forwards) == 2)
            # A running sequence that the scheduler has lost: a defect of ours, whatever it may be.
            engine.scheduler._running.remove(engine._generations["beside"].sequence)
            gate.release(100)
            async with asyncio.timeout(30):
                made = list(await asyncio.gather(*map(drained, outputs)))
            assert engine.state is State.FAILED
            return made

    first, ending, beside = asyncio.run(run())
    assert ending[-1].finish is FinishReason.LENGTH
    assert isinstance(first[-1].error, NotReady)
    assert isinstance(beside[-1].error, NotReady)


def test_a_failed_forward_ends_its_batch_with_an_error_and_the_loop_goes_on(text: Text) -> None:
    gate = threading.Semaphore(0)
    runner = CountingRunner(gate)

    async def run() -> list[list[Delta]]:
        async with started(lambda: model(text, runner)) as engine:
            outputs = [engine.add(job("bad", BAD_FORWARD)), engine.add(job("beside", 40))]
            gate.release(100)
            made = list(await asyncio.gather(*map(drained, outputs)))
            made.append(await drained(engine.add(job("later", 50))))
            engine.scheduler.check()
            return made

    bad, _, later = asyncio.run(run())
    assert bad[-1].finish is FinishReason.ERROR
    assert bad[-1].error is not None
    assert "said no" not in bad[-1].error.message
    assert later[-1].finish is FinishReason.LENGTH


def test_the_same_seed_gives_the_same_tokens_whatever_runs_beside_it(text: Text) -> None:
    async def run(neighbours: int) -> str:
        async with started(lambda: model(text, RandomRunner(), num_blocks=6)) as engine:
            others = [engine.add(job(str(n), 30, max_tokens=20)) for n in range(neighbours)]
            answer = await drained(engine.add(job("seeded", 20, max_tokens=20, seed=5)))
            for other in others:
                await drained(other)
            return "".join(delta.text for delta in answer)

    alone, crowded = asyncio.run(run(0)), asyncio.run(run(5))
    assert alone == crowded
    assert len(set(alone)) > 5


def test_what_is_refused_leaves_nothing_behind(text: Text) -> None:
    gate = threading.Semaphore(0)

    async def run() -> None:
        async with started(lambda: model(text, CountingRunner(gate), max_waiting=1, max_running=1)) as engine:
            running = engine.add(job("a"))
            await until(lambda: engine.scheduler.load().running == 1)
            engine.add(job("b"))
            with pytest.raises(Overloaded):
                engine.add(job("c"))
            assert engine.scheduler.load().waiting == 1
            gate.release(100)
            await drained(running)
            await until(lambda: engine.idle)

    asyncio.run(run())


def test_stopping_ends_open_requests_with_an_error_and_takes_no_new_ones(text: Text) -> None:
    gate = threading.Semaphore(0)

    async def run() -> None:
        async with started(lambda: model(text, CountingRunner(gate))) as engine:
            output = engine.add(job("a", max_tokens=100))
            engine.drain()
            with pytest.raises(NotReady, match="shutting down"):
                engine.add(job("b"))
            assert not engine.idle
            gate.release(1)
            engine.abort_all()
            final = (await drained(output))[-1]
            assert isinstance(final.error, NotReady)
            gate.release(100)

    asyncio.run(run())


def test_until_the_model_is_loaded_everything_is_not_ready(text: Text) -> None:
    gate = threading.Event()

    def load() -> Model:
        gate.wait()
        return model(text, CountingRunner())

    async def run() -> None:
        engine = Engine(load)
        engine.start()
        assert engine.state is State.LOADING
        with pytest.raises(NotReady, match="loading"):
            engine.add(job("a"))
        gate.set()
        await until(lambda: engine.state is State.READY)
        assert (await drained(engine.add(job("a"))))[-1].finish is FinishReason.LENGTH
        engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "said"),
    [(LoadError("no such model: name one"), "no such model: name one"), (TypeError("x"), "TypeError")],
)
def test_a_model_that_does_not_load_leaves_a_reason(error: Exception, said: str) -> None:
    def load() -> Model:
        raise error

    async def run() -> None:
        async with started(load) as engine:
            assert engine.state is State.FAILED
            assert said in str(engine.failure)
            with pytest.raises(EngineError):
                engine.add(job("a"))

    asyncio.run(run())


def test_a_defect_outside_any_batch_ends_everyone_with_an_error_instead_of_hanging(text: Text) -> None:
    gate = threading.Semaphore(0)
    runner = CountingRunner(gate)

    async def run() -> None:
        async with started(lambda: model(text, runner)) as engine:
            outputs = [engine.add(job("a")), engine.add(job("b"))]
            await until(lambda: len(runner.forwards) == 1)
            engine.scheduler._waiting.append(None)  # type: ignore[arg-type]
            gate.release(10)
            for output in outputs:
                assert isinstance((await drained(output))[-1].error, NotReady)
            assert engine.state is State.FAILED
            assert "the engine stopped on AttributeError" in str(engine.failure)

    asyncio.run(run())


class SmallDevice(CountingRunner):
    """Has memory for so many tokens and so many sequences a step."""

    def __init__(self, tokens: int, sequences: int) -> None:
        super().__init__()
        self._tokens, self._sequences = tokens, sequences
        self.refused = 0

    def forward(self, batch: Batch) -> list[int]:
        chunks = list(batch)
        if len(chunks) > self._sequences or sum(len(chunk.tokens) for chunk in chunks) > self._tokens:
            self.refused += 1
            raise OutOfMemory("too much")
        return super().forward(batch)


def test_a_lack_of_memory_makes_batches_smaller_and_ends_no_request(text: Text) -> None:
    runner = SmallDevice(tokens=24, sequences=3)

    async def run() -> tuple[list[list[Delta]], Report]:
        async with started(lambda: model(text, runner, max_waiting=16)) as engine:
            jobs = [job(str(n), *range(n, 60 + n), max_tokens=5) for n in range(8)]
            answers = list(await asyncio.gather(*map(drained, map(engine.add, jobs))))
            engine.scheduler.check()
            return answers, engine.report()

    answers, report = asyncio.run(run())
    assert [deltas[-1].finish for deltas in answers] == [FinishReason.LENGTH] * 8
    assert [deltas[-1].completion_tokens for deltas in answers] == [5] * 8
    for n, deltas in enumerate(answers):
        answer = text.decoder(range(n, 60 + n), [])
        expected = "".join(map(answer.add, range(60 + n, 65 + n))) + answer.flush()
        assert "".join(delta.text for delta in deltas) == expected
    assert report.shrunk == runner.refused > 1


def test_a_single_request_that_memory_never_suffices_for_ends_alone(text: Text) -> None:
    runner = SmallDevice(tokens=20, sequences=0)

    async def run() -> tuple[list[Delta], State]:
        async with started(lambda: model(text, runner)) as engine:
            return await drained(engine.add(job("a"))), engine.state

    deltas, state = asyncio.run(run())
    assert (deltas[-1].finish, state) == (FinishReason.ERROR, State.READY)


class LostInForward(CountingRunner):
    def forward(self, batch: Batch) -> list[int]:
        raise DeviceLost("gone")


class LostInSampling(CountingRunner):
    """A CUDA device computes while the host goes on: its errors show where the host first waits for it."""

    def sample(self, logits: list[int], rows: Sequence[int], picks: Sequence[Pick]) -> list[int | None]:
        raise DeviceLost("gone")


@pytest.mark.parametrize("lost", [LostInForward, LostInSampling])
def test_a_lost_device_ends_all_requests_and_shows_on_the_engine(text: Text, lost: type[CountingRunner]) -> None:
    async def run() -> tuple[list[Delta], State]:
        async with started(lambda: model(text, lost())) as engine:
            return await drained(engine.add(job("a"))), engine.state

    deltas, state = asyncio.run(run())
    assert (deltas[-1].finish, state) == (FinishReason.ERROR, State.FAILED)
    assert isinstance(deltas[-1].error, NotReady)
