"""The paged forward against transformers' own generate."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from local_engine.attention import PAGED_ATTENTION, KvCache
from local_engine.config import Limits
from local_engine.errors import DeviceLost, OutOfMemory
from local_engine.linear import prepare
from local_engine.runner import ModelRunner
from local_engine.scheduler import Scheduler
from local_engine.sequence import Pick, SamplingParams, Sequence
from tests.tiny_models import KINDS, VOCABULARY

NEW_TOKENS = 24
GREEDY = Pick(SamplingParams(max_tokens=NEW_TOKENS, temperature=0), 0.0)


def prompts(*lengths: int) -> list[list[int]]:
    chance = random.Random(11)
    return [[chance.randrange(4, VOCABULARY) for _ in range(length)] for length in lengths]


class Case:
    """A model, what `generate` makes of prompts, and what the paged engine makes of them."""

    def __init__(self, directory: Path) -> None:
        # Eager: with other attention some releases of transformers leave Gemma 2's bound on scores out.
        self.reference: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.paged: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation=PAGED_ATTENTION
        ).eval()
        prepare(self.paged)  # as loading does
        self._known: dict[tuple[int, ...], list[int]] = {}

    def generated(self, prompt: list[int]) -> list[int]:
        """What `generate` makes of it; asked once, because it is most of these tests' time."""
        key = tuple(prompt)
        if key not in self._known:
            self._known[key] = self._generate(prompt)
        return self._known[key]

    def _generate(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        made = self.reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=0
        )
        tokens: list[int] = made[0].tolist()
        return tokens

    def runner(self, num_blocks: int) -> ModelRunner:
        config = self.paged.config
        cache = KvCache(
            layers=config.num_hidden_layers,
            num_blocks=num_blocks,
            block_size=16,
            kv_heads=config.num_key_value_heads,
            head_size=config.head_dim,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        return ModelRunner(self.paged, cache)

    def guesses(self, sequence: Sequence, chance: random.Random) -> list[int]:
        """What `generate` says comes next, up to six tokens, one of which may be wrong."""
        known = self.generated(sequence.tokens[: sequence.prompt_length])
        next_ones = known[len(sequence.tokens) : len(sequence.tokens) + chance.randrange(7)]
        if next_ones and chance.random() < 0.5:
            next_ones[chance.randrange(len(next_ones))] = chance.randrange(4, VOCABULARY)
        return next_ones

    def paged_all(
        self, asked: list[list[int]], limits: Limits, guessing: random.Random | None = None
    ) -> tuple[list[list[int]], Scheduler]:
        """All prompts together, one arriving each step, so that batches mix prefill and decode, and with `guessing`
        the verification of guesses as well."""
        scheduler, runner = Scheduler(limits), self.runner(limits.num_blocks)
        sequences = [Sequence(str(i), len(p), list(p), NEW_TOKENS, frozenset({0})) for i, p in enumerate(asked)]
        arriving = iter(sequences)
        while (new := next(arriving, None)) or scheduler.has_work:
            if new:
                scheduler.add(new)
            made = {each.id: self.guesses(each, guessing) for each in scheduler.decoding()} if guessing else {}
            batch = scheduler.schedule(made)
            logits = runner.forward(batch)
            tokens = iter(runner.sample(logits, range(len(logits)), [GREEDY] * len(logits)))
            for chunk in batch:
                scheduler.complete(chunk)
                chosen = [next(tokens) for _ in range(chunk.rows)]
                pairs = zip(chosen, chunk.guesses, strict=False)
                right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                for token in chosen[: right + 1]:
                    assert token is not None
                    if end := chunk.sequence.append(token):
                        scheduler.finish(chunk.sequence, end)
                        break
                if chunk.guessed:
                    scheduler.accept(chunk, right)
            scheduler.check()
        return [sequence.tokens for sequence in sequences], scheduler


@pytest.fixture(scope="module", params=sorted(KINDS))
def case(request: pytest.FixtureRequest, write_model: Any) -> Case:
    return Case(write_model(request.param))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 100])
def test_alone_it_equals_generate_token_for_token(case: Case, length: int) -> None:
    (prompt,) = prompts(length)
    paged, _ = case.paged_all([prompt], Limits(num_blocks=16, window=256))
    assert paged == [case.generated(prompt)]


@pytest.mark.parametrize(
    ("limits", "preempts"),
    [
        (Limits(num_blocks=64, window=256), False),
        (Limits(num_blocks=64, window=256, max_batch_tokens=19, max_running=8), False),  # chunks that fit no block
        (Limits(num_blocks=9, window=256, max_batch_tokens=32, max_running=8), True),
    ],
    ids=["mixed", "chunked", "preempted"],
)
def test_in_a_mixed_batch_it_equals_generate_token_for_token(case: Case, limits: Limits, preempts: bool) -> None:
    asked = prompts(5, 40, 1, 90, 17, 16, 33, 2)
    paged, scheduler = case.paged_all(asked, limits)
    assert paged == [case.generated(prompt) for prompt in asked]
    assert (scheduler.preempted_total > 0) == preempts


@pytest.mark.parametrize(
    ("limits", "preempts"),
    [
        (Limits(num_blocks=64, window=256), False),
        (Limits(num_blocks=64, window=256, max_batch_tokens=19, max_running=8), False),
        (Limits(num_blocks=9, window=256, max_batch_tokens=32, max_running=8), True),
    ],
    ids=["mixed", "chunked", "preempted"],
)
def test_with_guesses_right_and_wrong_it_equals_generate_token_for_token(
    case: Case, limits: Limits, preempts: bool
) -> None:
    (base,) = prompts(70)
    asked = [*prompts(5, 40, 1, 90, 17, 16, 33, 2), base, base[:40]]
    paged, scheduler = case.paged_all(asked, limits, random.Random(3))
    assert paged == [case.generated(prompt) for prompt in asked]
    assert (scheduler.preempted_total > 0) == preempts
    assert 0 < scheduler.accepted_total < scheduler.guessed_total
    alone, _ = case.paged_all(asked[:1], limits, random.Random(4))
    assert alone == paged[:1]


@pytest.mark.parametrize("budget", [19, 512], ids=["chunked", "whole"])
def test_with_prefixes_that_others_computed_it_equals_generate_token_for_token(case: Case, budget: int) -> None:
    (base,) = prompts(70)
    own = prompts(1, 5, 30)
    asked = [base, base, base[:33], *([*base[:50], *rest] for rest in own), *([*base[:64], *rest] for rest in own)]
    limits = Limits(num_blocks=40, window=256, max_batch_tokens=budget, max_running=4)
    paged, scheduler = case.paged_all(asked, limits)
    assert paged == [case.generated(prompt) for prompt in asked]
    assert scheduler.prefix_found_total > 200


@contextmanager
def poisoned(model: Any, token: int) -> Iterator[None]:
    """While inside, whatever attends to this token is not a number."""
    weights = model.get_input_embeddings().weight
    sound = weights[token].clone()
    with torch.no_grad():
        weights[token] = float("nan")
        try:
            yield
        finally:
            weights[token] = sound


def test_a_neighbours_broken_numbers_do_not_leak_through_padding_or_reused_blocks(case: Case) -> None:
    long, short = prompts(40, 5)
    expected = [case.generated(prompt)[: len(prompt) + 3] for prompt in (short, long)]
    runner = case.runner(16)

    def steps(count: int, *asked: list[int]) -> tuple[list[Sequence], list[int | None]]:
        scheduler = Scheduler(Limits(num_blocks=16, window=256))
        sequences = [Sequence(str(i), len(p), list(p), 99) for i, p in enumerate(asked)]
        for sequence in sequences:
            scheduler.add(sequence)
        for _ in range(count):
            batch = scheduler.schedule()
            tokens = runner.sample(runner.forward(batch), range(len(asked)), [GREEDY] * len(asked))
            for chunk, token in zip(batch, tokens, strict=True):
                scheduler.complete(chunk)
                chunk.sequence.append(-1 if token is None else token)
        return sequences, tokens

    with poisoned(case.paged, long[0]):
        (broken, _), tokens = steps(1, long, short)
    assert tokens == [None, case.generated(short)[5]]
    # The same blocks again, as after an abort: the short one's tail is now where the broken one's numbers were.
    again, _ = steps(3, short, long)
    assert again[0].blocks[0] == broken.blocks[0]
    assert [sequence.tokens for sequence in again] == expected


class Failing:
    """A model, and logits, whose device fails when it is waited for."""

    device = torch.device("cpu")

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __call__(self, **_: object) -> None:
        raise self.error

    def max(self, dim: int) -> None:
        raise self.error

    def float(self) -> None:
        raise self.error

    def __getitem__(self, rows: object) -> Failing:
        return self


@pytest.mark.parametrize(
    ("theirs", "answers", "ours"),
    [
        (torch.OutOfMemoryError("no"), True, OutOfMemory),
        (torch.AcceleratorError("no"), True, DeviceLost),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, OutOfMemory),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), False, DeviceLost),
        (RuntimeError("shapes do not fit"), True, RuntimeError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_what_a_device_raises_becomes_an_error_of_ours_wherever_it_is_waited_for(
    theirs: Exception, answers: bool, ours: type[Exception]
) -> None:
    failing = Failing(theirs)
    cache = KvCache(
        layers=1, num_blocks=8, block_size=16, kv_heads=1, head_size=4, dtype=torch.float32, device=failing.device
    )
    scheduler = Scheduler(Limits(num_blocks=8, window=64))
    scheduler.add(Sequence(id="a", prompt_length=20, tokens=list(range(20)), max_tokens=2))
    runner = ModelRunner(failing, cache, answers=lambda device: answers)
    logits: Any = failing
    for work in (
        lambda: runner.forward(scheduler.schedule()),
        lambda: runner.sample(logits, [0], [GREEDY]),
        lambda: runner.likelihoods(logits, [0], [1], [0]),
    ):
        with pytest.raises(ours) as raised:
            work()
        assert type(raised.value) is ours
