"""Decoding in place and recorded steps, on a CPU: what is recorded here is run again one operation after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from local_engine.batch import Batch, Chunk
from local_engine.config import Limits
from local_engine.graphs import RecordedSteps, Replay
from local_engine.paged import gathered
from local_engine.rows import Rows, bucket_sizes, rows_of
from local_engine.runner import ModelRunner
from local_engine.sequence import Sequence
from tests.local_engine.test_runner import Case, prompts
from tests.tiny_models import KINDS


class Rerun:
    """`Recorder` that writes every run's logits to the same memory, as a CUDA graph does. Counts runs by rows."""

    def __init__(self) -> None:
        self.runs: dict[int, int] = {}

    def __call__(self, step: Callable[[], Tensor]) -> Replay:
        logits = step()
        self.runs[len(logits)] = 0

        def replay() -> Tensor:
            self.runs[len(logits)] += 1
            return logits.copy_(step())

        return replay


class InPlace(Case):
    """The same, with decoding in place; recorded where `most_rows` is above 0."""

    most_rows = 0

    def runner(self, num_blocks: int) -> ModelRunner:
        plain = super().runner(num_blocks)
        if not self.most_rows:
            return ModelRunner(self.paged, plain.cache, gathered)
        self.recorder = Rerun()
        return recorded(self.paged, plain, bucket_sizes(self.most_rows), self.recorder)


class Recorded(InPlace):
    most_rows = 5  # so that some batches have too many


def recorded(model: Any, plain: ModelRunner, sizes: tuple[int, ...], recorder: Rerun) -> ModelRunner:
    steps = RecordedSteps(model, plain.cache, gathered, sizes=sizes, longest=256, block_size=16)
    steps.record(recorder, lambda line: None)
    return ModelRunner(model, plain.cache, gathered, steps)


@pytest.fixture(scope="module", params=["gemma2", "llama", "mistral-window", "qwen3moe"])
def kind(request: pytest.FixtureRequest) -> str:
    assert request.param in KINDS
    return str(request.param)


@pytest.fixture(scope="module", params=[InPlace, Recorded], ids=lambda cls: cls.__name__)
def case(request: pytest.FixtureRequest, kind: str, write_model: Any) -> InPlace:
    made: InPlace = request.param(write_model(kind))
    return made


LIMITS = [
    Limits(num_blocks=64, window=256),
    Limits(num_blocks=64, window=256, max_batch_tokens=19, max_running=8),
    Limits(num_blocks=9, window=256, max_batch_tokens=32, max_running=8),
]


@pytest.mark.parametrize("limits", LIMITS, ids=["mixed", "chunked", "preempted"])
def test_in_mixed_batches_it_equals_generate_token_for_token(case: InPlace, limits: Limits) -> None:
    asked = prompts(5, 40, 1, 90, 17, 16, 33, 2)
    paged, _ = case.paged_all(asked, limits)
    assert paged == [case.generated(prompt) for prompt in asked]
    if isinstance(case, Recorded):
        assert sum(case.recorder.runs.values()) > 5
        assert min(case.recorder.runs) == 1


@pytest.mark.parametrize("limits", LIMITS, ids=["mixed", "chunked", "preempted"])
def test_guesses_are_verified_as_rows_of_their_own(case: InPlace, limits: Limits) -> None:
    asked = prompts(5, 40, 1, 33)
    paged, scheduler = case.paged_all(asked, limits, random.Random(3))
    assert paged == [case.generated(prompt) for prompt in asked]
    assert 0 < scheduler.accepted_total < scheduler.guessed_total


def test_what_fits_is_run_as_recorded_short_prompts_too(write_model: Any) -> None:
    case = Recorded(write_model("llama"))
    runner = case.runner(64)
    assert set(case.recorder.runs) == {1, 2, 4, 8}
    sequence = Sequence(id="a", prompt_length=9, tokens=list(range(9)), max_tokens=1)

    def decoding(number: int, *, samples: bool = True) -> tuple[Chunk, ...]:
        return tuple(Chunk(sequence, 8, (8,), (row,), samples=samples) for row in range(number))

    def runs_of(batch: Batch) -> dict[int, int]:
        before = dict(case.recorder.runs)
        rows = sum(chunk.rows for chunk in batch)
        assert len(runner.forward(batch)) == rows
        return {size: runs - before[size] for size, runs in case.recorder.runs.items() if runs > before[size]}

    prompt = Chunk(sequence, 0, tuple(range(8)), (9,), samples=True)
    guessed = Chunk(sequence, 8, (8, 1, 2), (10,), samples=True, guessed=2)
    assert runs_of(Batch(decode=decoding(3))) == {4: 1}
    assert runs_of(Batch(decode=decoding(8))) == {8: 1}
    assert runs_of(Batch(decode=decoding(9))) == {}
    assert runs_of(Batch(decode=decoding(3), prefill=(prompt,))) == {}
    assert runs_of(Batch(prefill=(prompt,))) == {8: 1}
    assert runs_of(Batch(decode=decoding(3), prefill=(Chunk(sequence, 0, (0, 1, 2), (9,), samples=False),))) == {8: 1}
    assert runs_of(Batch(decode=decoding(3), verify=(guessed,))) == {8: 1}
    assert runs_of(Batch(decode=(*decoding(1), *decoding(1, samples=False)))) == {2: 1}
    assert runs_of(Batch(decode=decoding(3, samples=False))) == {4: 1}  # nobody's logits


def test_rows_left_over_write_to_a_block_that_nobody_reads(write_model: Any) -> None:
    case = Recorded(write_model("llama"))
    runner = case.runner(8)
    cache = runner.cache
    sequence = Sequence(id="a", prompt_length=1, tokens=[5], max_tokens=1)
    cache.clear(torch.arange(10))  # recording has written to the scratch block
    runner.forward(Batch(decode=tuple(Chunk(sequence, 0, (5,), (row,), samples=True) for row in range(3))))
    written = {int(slot) // 16 for part in cache.slots(0) for slot in part.any(dim=-1).any(dim=-1).nonzero()}
    assert written == {0, 1, 2, cache.scratch_slot // 16}
    assert cache.padding_block not in written


def test_rows_with_more_blocks_than_there_is_room_for_are_left_to_others(write_model: Any) -> None:
    case = Recorded(write_model("llama"))
    steps = RecordedSteps(case.paged, case.runner(64).cache, gathered, sizes=(1, 2), longest=32, block_size=16)
    steps.record(Rerun(), lambda line: None)
    sequence = Sequence(id="a", prompt_length=1, tokens=[5], max_tokens=1)
    chunks = [Chunk(sequence, 40, (5,), (0, 1, 2), samples=True) for _ in range(2)]
    assert steps.forward(rows_of(chunks, 16)) is None
    assert steps.forward(Rows()) is None


def test_recording_tells_how_far_it_is_the_largest_first(write_model: Any) -> None:
    case = Recorded(write_model("llama"))
    told: list[str] = []
    seen: list[int] = []

    def recorder(step: Callable[[], Tensor]) -> Replay:
        seen.append(len(step()))
        return step

    steps = RecordedSteps(case.paged, case.runner(8).cache, gathered, sizes=(1, 2, 4), longest=64, block_size=16)
    steps.record(recorder, told.append)
    assert seen == [4, 2, 1]
    assert told == [f"recorded decoding steps: {number} of 3" for number in (1, 2, 3)]
