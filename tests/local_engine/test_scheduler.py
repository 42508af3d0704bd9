"""Which sequence runs when: no tensor in sight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from local_engine.config import Limits
from local_engine.errors import AccountingError, ContextLengthExceeded, FirstTokenTooLate, Overloaded
from local_engine.scheduler import Batch, Scheduler
from local_engine.sequence import FinishReason, Sequence


def sequence(name: str, prompt: int, max_tokens: int = 4, priority: int = 0) -> Sequence:
    return Sequence(name, prompt, list(range(1, prompt + 1)), max_tokens, frozenset({0}), priority)


def small(**changes: int) -> Scheduler:
    sizes = {"num_blocks": 8, "window": 96, "max_batch_tokens": 32, "max_running": 4, "max_waiting": 8} | changes
    return Scheduler(Limits(**sizes))


def step(scheduler: Scheduler, token: Callable[[Sequence], int] = lambda _: 1) -> Batch:
    """Schedule, pretend to compute, book."""
    batch = scheduler.schedule()
    for chunk in batch:
        if scheduler.complete(chunk) and chunk.samples and (end := chunk.sequence.append(token(chunk.sequence))):
            scheduler.finish(chunk.sequence, end)
    scheduler.check()
    return batch


def shape(batch: Batch) -> list[tuple[str, int]]:
    return [(chunk.sequence.id, len(chunk.tokens)) for chunk in batch]


def test_prompts_are_computed_in_chunks_under_the_budget_and_decoding_goes_first() -> None:
    scheduler = small()
    for name, prompt in (("a", 40), ("b", 20)):
        scheduler.add(sequence(name, prompt))
    assert [shape(step(scheduler)) for _ in range(4)] == [
        [("a", 32)],
        [("a", 8), ("b", 20)],
        [("a", 1), ("b", 1)],
        [("a", 1), ("b", 1)],
    ]


def test_a_decoding_sequence_is_never_held_up_by_a_long_prompt() -> None:
    scheduler = small()
    scheduler.add(sequence("short", 4, max_tokens=8))
    step(scheduler)
    scheduler.add(sequence("long", 90))
    assert [shape(step(scheduler)) for _ in range(3)] == [
        [("short", 1), ("long", 31)],
        [("short", 1), ("long", 31)],
        [("short", 1), ("long", 28)],
    ]


def test_a_chunk_samples_only_when_it_ends_with_the_newest_token() -> None:
    scheduler = small()
    scheduler.add(sequence("a", 40))
    assert [[chunk.samples for chunk in step(scheduler)] for _ in range(3)] == [[False], [True], [True]]


@pytest.mark.parametrize(
    ("priorities", "order"),
    [((0, 0, 0), "abc"), ((1, 0, 0), "bca"), ((2, 1, 0), "cba"), ((0, -1, 5), "bac")],
)
def test_lower_priority_numbers_start_first_and_equals_in_order_of_arrival(
    priorities: tuple[int, ...], order: str
) -> None:
    scheduler = small(max_running=1)
    for name, priority in zip("abc", priorities, strict=True):
        scheduler.add(sequence(name, 4, max_tokens=1, priority=priority))
    assert "".join(step(scheduler).prefill[0].sequence.id for _ in order) == order


def test_a_more_urgent_prompt_overtakes_one_that_is_half_computed() -> None:
    scheduler = small()
    scheduler.add(sequence("long", 64))
    step(scheduler)
    scheduler.add(sequence("urgent", 8, priority=-1))
    assert shape(step(scheduler)) == [("urgent", 8), ("long", 24)]


def test_when_blocks_run_out_the_last_in_order_is_computed_again_later() -> None:
    scheduler = small(num_blocks=4, window=64)
    first, second = sequence("first", 31, max_tokens=30), sequence("second", 14, max_tokens=30)
    for each in (first, second):
        scheduler.add(each)
    while not scheduler.preempted_total:
        step(scheduler)
    assert (second.preemptions, first.preemptions, second.computed, second.blocks) == (1, 0, 0, [])
    generated = second.generated
    while scheduler.has_work:
        step(scheduler)
    assert generated > 0
    assert (first.generated, second.generated) == (30, 30)


def test_a_prompt_waits_where_it_would_soon_be_preempted() -> None:
    """Two of four blocks are free and the prompt needs both, but the running sequence is about to grow into one."""
    scheduler = small(num_blocks=4, window=64)
    scheduler.add(sequence("growing", 31, max_tokens=8))
    step(scheduler)
    scheduler.add(sequence("waiting", 20, max_tokens=8))
    step(scheduler)
    assert (scheduler.load().running, scheduler.load().waiting) == (1, 1)
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.preempted_total == 0


@pytest.mark.parametrize(
    ("end", "reason", "generated"),
    [(lambda s: 0 if s.generated == 2 else 1, FinishReason.STOP, 3), (lambda _: 1, FinishReason.LENGTH, 4)],
)
def test_a_sequence_ends_at_an_end_token_or_at_its_length(
    end: Callable[[Sequence], int], reason: FinishReason, generated: int
) -> None:
    scheduler, only = small(), sequence("a", 4)
    scheduler.add(only)
    while scheduler.has_work:
        step(scheduler, end)
    assert (only.finish, only.generated, scheduler.load().free_blocks) == (reason, generated, 8)


@pytest.mark.parametrize(("prompt", "max_tokens", "fits"), [(92, 4, True), (93, 4, False), (4, 93, False)])
def test_what_can_never_fit_is_refused_on_arrival(prompt: int, max_tokens: int, fits: bool) -> None:
    scheduler = small()
    if fits:
        scheduler.add(sequence("a", prompt, max_tokens))
    else:
        with pytest.raises(ContextLengthExceeded):
            scheduler.add(sequence("a", prompt, max_tokens))
    assert scheduler.has_work is fits


@pytest.mark.parametrize(("limit", "prompt"), [({"max_waiting": 2}, 4), ({"max_waiting_tokens": 20}, 10)])
def test_the_waiting_queue_is_bounded_by_sequences_and_by_tokens(limit: dict[str, int], prompt: int) -> None:
    scheduler = small(**limit)
    for name in "ab":
        scheduler.add(sequence(name, prompt))
    with pytest.raises(Overloaded):
        scheduler.add(sequence("c", prompt))
    assert scheduler.load().waiting == 2


class TestDeadlines:
    """First token by: (queued prefill tokens) / (measured prefill rate) + one step."""

    def measured(self) -> Scheduler:
        scheduler = small()
        scheduler.pace.record(seconds=0.010, prefill_tokens=0, decode_tokens=1)
        scheduler.pace.record(seconds=0.110, prefill_tokens=100, decode_tokens=0)
        return scheduler  # 1,000 tokens a second, 10 ms a step

    def test_nothing_is_refused_before_anything_was_measured(self) -> None:
        scheduler = small()
        scheduler.add(sequence("a", 90), first_token_by=1e-6)
        assert scheduler.load().waiting == 1

    def test_the_wait_counts_what_goes_first_and_the_prompt_itself(self) -> None:
        scheduler = self.measured()
        scheduler.add(sequence("first", 50))
        scheduler.add(sequence("lazy", 40, priority=9))
        with pytest.raises(FirstTokenTooLate) as caught:
            scheduler.add(sequence("late", 20), first_token_by=0.079)
        assert caught.value.predicted_wait_ms == pytest.approx(80, abs=1)
        assert scheduler.load().waiting == 2
        scheduler.add(sequence("in time", 20), first_token_by=0.081)


def test_an_abort_frees_the_blocks_at_once_and_its_chunk_is_not_booked() -> None:
    scheduler = small()
    a, b = sequence("a", 20), sequence("b", 10)
    for each in (a, b):
        scheduler.add(each)
    batch = scheduler.schedule()
    assert scheduler.finish(a, FinishReason.ABORT)
    assert not scheduler.finish(a, FinishReason.ABORT)
    scheduler.check()
    assert [scheduler.complete(chunk) for chunk in batch] == [False, True]
    assert (a.computed, scheduler.load().free_blocks) == (0, 7)


def test_the_check_finds_a_leaked_block() -> None:
    scheduler = small()
    leaky = sequence("a", 20)
    scheduler.add(leaky)
    scheduler.schedule()
    leaky.blocks.pop()
    with pytest.raises(AccountingError):
        scheduler.check()


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Arrivals, steps, ends and aborts in any order: accounts stay exact, and everything that was accepted ends."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = small(num_blocks=6, window=80)
        self.open: list[Sequence] = []
        self.names = 0

    @rule(prompt=st.integers(1, 70), max_tokens=st.integers(1, 40), priority=st.integers(-1, 1))
    def add(self, prompt: int, max_tokens: int, priority: int) -> None:
        new = sequence(str(self.names), prompt, max_tokens, priority)
        self.names += 1
        try:
            self.scheduler.add(new)
        except (ContextLengthExceeded, Overloaded):
            assert prompt + max_tokens > 80 or self.scheduler.load().waiting == 8
        else:
            self.open.append(new)

    @rule(ends=st.lists(st.booleans(), min_size=4, max_size=4))
    def step(self, ends: list[bool]) -> None:
        batch = step(self.scheduler, lambda s: 0 if ends[int(s.id) % 4] else 1)
        names = [chunk.sequence.id for chunk in batch]
        assert len(names) == len(set(names)) <= 4
        assert sum(len(chunk.tokens) for chunk in batch) <= 32
        assert bool(batch) or not self.scheduler.has_work
        for chunk in batch:
            assert len(chunk.blocks) * 16 >= chunk.start + len(chunk.tokens)
        self.open = [each for each in self.open if each.finish is None]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.open:
            index = data.draw(st.integers(0, len(self.open) - 1))
            assert self.scheduler.finish(self.open.pop(index), FinishReason.ABORT)

    @invariant()
    def accounts_are_exact(self) -> None:
        self.scheduler.check()
        load = self.scheduler.load()
        assert load.waiting + load.running == len(self.open)

    def teardown(self) -> None:
        # Each open sequence needs few steps alone; recomputing after preemption is the only reason for more.
        for _ in range(1000):
            if not self.scheduler.has_work:
                break
            step(self.scheduler)
        assert not self.scheduler.has_work
        assert all(each.finish is FinishReason.LENGTH for each in self.open)
        assert self.scheduler.load().free_blocks == 6


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
TestAnyOrderOfEvents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
