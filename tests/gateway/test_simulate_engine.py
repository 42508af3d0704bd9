"""The simulated engine beside a table, and beside the real scheduler, which it follows step by step."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.simulate.engine import PATIENT, Engine
from gateway.simulate.pace import Pace
from gateway.simulate.step import EngineModel, of_calibration
from gateway.simulate.trace import TraceError
from local_engine.batch import Batch
from local_engine.config import Limits
from local_engine.errors import FirstTokenTooLate, Overloaded
from local_engine.pace import Pace as RealPace
from local_engine.scheduler import Scheduler
from local_engine.sequence import FinishReason
from local_engine.sequence import Sequence as RealSequence
from tests.worlds import ENGINE


def test_a_step_costs_what_the_model_says() -> None:
    """Two requests of 150 and 30 prompt tokens on an engine with a budget of 100: by hand."""
    engine = Engine(ENGINE)
    engine.add(0, 150, 3, 0, None)
    engine.add(1, 30, 2, 0, None)
    told = []
    while (seconds := engine.begin()) is not None:
        came = engine.end()
        told.append((round(seconds * 1000, 6), came.first, came.ended))
    assert told == [
        (110.0, [], []),  # 100 of the first prompt
        (90.0, [0, 1], []),  # the other 50 and all 30 of the second
        (14.0, [], [1]),  # both decode
        (12.0, [], [0]),
    ]
    assert engine.busy_s == pytest.approx(0.226)


def test_decoding_comes_first_and_prompts_get_the_rest_of_the_budget() -> None:
    engine = Engine(ENGINE)
    for key in range(5):
        engine.add(key, 20, 50, 0, None)
    engine.begin()
    engine.end()
    engine.add(9, 300, 1, 0, None)
    seconds = engine.begin()
    assert seconds == pytest.approx(0.010 + 95 * 0.001 + 5 * 0.002)


def test_a_lower_priority_waits_but_is_overtaken_a_bounded_number_of_times() -> None:
    engine = Engine(EngineModel(0.01, 0.001, 0.0, 0.0, num_blocks=64, max_batch_tokens=10, max_running=1, window=500))
    engine.add(0, 10, 1, 1, None)
    for key in range(1, 300):
        engine.add(key, 10, 1, 0, None)
        engine.begin()
        if 0 in engine.end().ended:
            break
    assert key == 256  # the 255 before it were served first


def model_of(limits: Limits) -> EngineModel:
    return EngineModel(
        0.01,
        0.001,
        0.002,
        0.00001,
        num_blocks=limits.num_blocks,
        block_size=limits.block_size,
        max_batch_tokens=limits.max_batch_tokens,
        max_running=limits.max_running,
        max_waiting=limits.max_waiting,
        max_waiting_tokens=limits.max_waiting_tokens,
        window=limits.window,
    )


class WithoutPrefixes(Scheduler):
    """Computes everything itself: the simulated engine knows nothing of prefixes, not even of those that a preempted
    sequence leaves behind."""

    def _found(self, sequence: RealSequence) -> list[int]:
        return []


class Twin:
    """The real scheduler and the simulated engine, told the same."""

    def __init__(self, limits: Limits) -> None:
        self.model = model_of(limits)
        self.real = WithoutPrefixes(limits)
        self.simulated = Engine(self.model)
        self.sequences: dict[int, RealSequence] = {}

    def add(self, key: int, prompt: int, output: int, priority: int, by: float | None) -> None:
        tokens = [key * 1000 + i for i in range(prompt)]  # no two prompts share a prefix
        sequence = RealSequence(str(key), prompt, tokens, output, priority=priority)
        try:
            self.real.add(sequence, first_token_by=by)
            answer = "taken"
            self.sequences[key] = sequence
        except Overloaded:
            answer = "full"
        except FirstTokenTooLate:
            answer = "late"
        taken = self.simulated.add(key, prompt, output, priority, by)
        assert (taken if isinstance(taken, str) else "taken") == answer

    def step(self) -> bool:
        """One step of both: the same time, first tokens and ends."""
        batch = self.real.schedule()
        seconds = self.simulated.begin()
        if not batch:
            assert seconds is None
            return False
        looked_back = sum(chunk.start + 1 for chunk in batch.decode) + sum(chunk.start for chunk in batch.prefill)
        real_seconds = self.model.step_s(batch.prefill_tokens, len(batch.decode), looked_back)
        assert seconds == pytest.approx(real_seconds)
        load = self.real.load()
        told = self.simulated.load()
        assert (told.waiting, told.running, told.free_blocks) == (load.waiting, load.running, load.free_blocks)
        self.real.pace.record(
            seconds=real_seconds, prefill_tokens=batch.prefill_tokens, decode_tokens=len(batch.decode)
        )
        first, ended = self._book(batch)
        came = self.simulated.end()
        assert (sorted(came.first), sorted(came.ended)) == (first, ended)
        assert self.real.preempted_total == self.simulated.preempted
        return True

    def _book(self, batch: Batch) -> tuple[list[int], list[int]]:
        first, ended = [], []
        for chunk in batch:
            if not self.real.complete(chunk) or not chunk.samples:
                continue
            sequence = chunk.sequence
            if sequence.generated == 0:
                first.append(int(sequence.id))
            # Tokens that repeat in no two sequences, so that no block is shared.
            if sequence.append(10**9 + int(sequence.id) * 10**5 + sequence.generated) is not None:
                self.real.finish(sequence, FinishReason.LENGTH)
                ended.append(int(sequence.id))
        return sorted(first), sorted(ended)


REQUESTS = st.tuples(
    st.integers(1, 60),
    st.integers(1, 40),
    st.sampled_from([0, 1, 2, PATIENT]),
    st.sampled_from([None, None, 0.05, 0.3]),
    st.integers(0, 5),
)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(REQUESTS, min_size=1, max_size=25),
    blocks=st.integers(8, 40),
    budget=st.integers(8, 40),
    running=st.integers(1, 8),
    waiting=st.integers(2, 20),
)
@example(  # 12 of 20 blocks are in use by three, and the fourth, who is patient, needs 5 of the other 8
    requests=[(50, 40, 0, None, 0), (50, 40, 0, None, 0), (50, 40, 0, None, 4), (70, 10, PATIENT, None, 3)],
    blocks=20,
    budget=40,
    running=8,
    waiting=8,
)
def test_it_does_in_each_step_what_the_real_scheduler_does(
    requests: list[tuple[int, int, int, float | None, int]], blocks: int, budget: int, running: int, waiting: int
) -> None:
    """Whatever comes when: the same batches, first tokens, ends, preemptions and refusals."""
    limits = Limits(
        num_blocks=blocks,
        window=100,
        block_size=16,
        max_batch_tokens=max(budget, running),
        max_running=running,
        max_waiting=waiting,
        max_waiting_tokens=400,
    )
    twin = Twin(limits)
    for key, (prompt, output, priority, by, steps) in enumerate(requests):
        if prompt + output <= limits.capacity:
            twin.add(key, prompt, output, priority, by)
        for _ in range(steps):
            twin.step()
    while twin.step():
        pass
    twin.real.check()
    assert twin.simulated.load().free_blocks == blocks


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 64), st.floats(0.5, 1.5)), max_size=200))
def test_its_pace_is_what_the_real_one_would_measure(steps: list[tuple[int, int, float]]) -> None:
    real, simulated = RealPace(), Pace()
    for prompt, decoded, noise in steps:
        seconds = 0.01 + prompt * 0.001 * noise
        real.record(seconds=seconds, prefill_tokens=prompt, decode_tokens=decoded)
        simulated.record(seconds, prompt, decoded)
    assert simulated.step_s == pytest.approx(real.step_seconds)
    assert simulated.decode_rate == pytest.approx(real.decode_rate)
    assert (simulated.prefill_rate is None) == (real.prefill_rate is None)
    assert simulated.prefill_rate == pytest.approx(real.prefill_rate or 0.0, rel=1e-6) or real.prefill_rate is None


@settings(max_examples=100, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(0, 4)), min_size=1, max_size=20),
    aborted=st.sets(st.integers(0, 19)),
)
def test_nothing_is_left_behind_by_requests_that_are_aborted(
    requests: list[tuple[int, int, int]], aborted: set[int]
) -> None:
    engine = Engine(EngineModel(0.01, 0.001, 0.002, 0.0, num_blocks=20, max_batch_tokens=16, max_running=6, window=100))
    open_ones = {}
    ended: list[int] = []
    for key, (prompt, output, steps) in enumerate(requests):
        taken = engine.add(key, prompt, output, 0, None)
        assert not isinstance(taken, str)
        open_ones[key] = taken
        for _ in range(steps):
            if engine.begin() is not None:
                if key in aborted and key not in ended:  # in the middle of a step
                    engine.abort(open_ones.pop(key))
                    aborted.discard(key)
                    ended.append(key)
                ended += engine.end().ended
    while engine.begin() is not None:
        ended += engine.end().ended
    assert sorted(ended) == list(range(len(requests)))
    load = engine.load()
    assert (load.free_blocks, load.running, load.waiting, load.queued_prefill_tokens) == (20, 0, 0, 0)


def test_the_least_that_a_request_takes_is_what_it_takes_in_full_steps() -> None:
    """A request of 100 prompt tokens fills a step of its own: 10 + 100 ms, and 2 decoded tokens at a hundredth of a
    step each."""
    assert ENGINE.least_s(100, 3) == pytest.approx(0.110 + 2 * (0.002 + 0.010 / 100))


CALIBRATION = """{"version": 1, "model": "demo",
 "step": {"fixed_s": 0.01, "per_prompt_token_s": 0.001, "per_sequence_s": 0.002, "per_cached_token_s": 1e-05},
 "limits": {"num_blocks": 64, "block_size": 16, "max_batch_tokens": 100, "max_running": 8, "max_waiting": 256,
            "max_waiting_tokens": 65536, "window": 1000}}"""


def test_a_calibration_becomes_an_engine() -> None:
    engine = of_calibration("engine.json", CALIBRATION)
    assert (engine.fixed_s, engine.per_cached_token_s, engine.num_blocks) == (0.01, 1e-05, 64)
    assert engine.source == "engine.json (demo)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "engine.json: is not JSON"),
        ("[]", "engine.json: is no calibration"),
        (CALIBRATION.replace('"version": 1', '"version": 2'), "engine.json: is no calibration"),
        (CALIBRATION.replace('"window": 1000', '"windows": 1'), 'engine.json: "limits.window" must be a number'),
        (CALIBRATION.replace("0.002", "-1"), 'engine.json: "step.per_sequence_s" must be a number of at least 0'),
        (CALIBRATION.replace("0.01,", "0,"), 'engine.json: "step.fixed_s" is 0, and no step takes no time'),
    ],
)
def test_a_calibration_that_is_none_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(TraceError) as error:
        of_calibration("engine.json", text)
    assert str(error.value).startswith(message)
