"""Which sequence runs when: no tensor in sight."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from local_engine.batch import Batch, Chunk
from local_engine.config import Limits
from local_engine.errors import AccountingError, ContextLengthExceeded, FirstTokenTooLate, Overloaded
from local_engine.scheduler import PATIENT, SMALLEST_BUDGET, STEPS_UNTIL_GROWTH, Scheduler
from local_engine.sequence import OVERTAKING, FinishReason, Sequence


def sequence(name: str, prompt: int, max_tokens: int = 4, priority: int = 0, like: str | None = None) -> Sequence:
    """Prompts of different names share nothing; one that is `like` another begins as that one does."""
    first = 1 + 1000 * sum(map(ord, name if like is None else like))
    return Sequence(name, prompt, list(range(first, first + prompt)), max_tokens, frozenset({0}), priority)


def small(**changes: int) -> Scheduler:
    sizes = {"num_blocks": 8, "window": 96, "max_batch_tokens": 32, "max_running": 4, "max_waiting": 8} | changes
    return Scheduler(Limits(**sizes))


def step(
    scheduler: Scheduler,
    token: Callable[[Sequence], int] = lambda _: 1,
    guesses: Callable[[Sequence], tuple[int, ...]] = lambda _: (),
) -> Batch:
    """Schedule, pretend to compute, book; guesses are right as long as they are what `token` says."""
    batch = scheduler.schedule({each.id: guesses(each) for each in scheduler.decoding()})
    scheduler.check()
    for chunk in batch:
        if scheduler.complete(chunk) and chunk.samples:
            book(scheduler, chunk, token)
    scheduler.check()
    return batch


def book(scheduler: Scheduler, chunk: Chunk, token: Callable[[Sequence], int]) -> None:
    accepted = 0
    for guess in (*chunk.guesses, None):
        chosen = token(chunk.sequence)
        if end := chunk.sequence.append(chosen):
            scheduler.finish(chunk.sequence, end)
            break
        if chosen != guess:
            break
        accepted += 1
    if chunk.guessed:
        scheduler.accept(chunk, accepted)


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


@pytest.mark.parametrize(("priority", "starts"), [(0, True), (PATIENT - 1, True), (PATIENT, False)])
def test_who_is_patient_leaves_some_blocks_to_those_in_a_hurry(priority: int, starts: bool) -> None:
    """38 of 40 blocks would be taken: a running one's next block is counted, and 2 are left free by who is patient."""
    scheduler = small(num_blocks=40, window=640, max_batch_tokens=640)
    scheduler.add(sequence("running", 15 * 16, max_tokens=8))
    step(scheduler)
    scheduler.add(sequence("next", 22 * 16, priority=priority))
    step(scheduler)
    assert scheduler.load().running == 1 + starts


def test_who_is_patient_starts_in_the_last_blocks_where_nobody_runs() -> None:
    scheduler = small(num_blocks=40, window=640)
    scheduler.add(sequence("before", 100, max_tokens=8))
    step(scheduler)
    scheduler.add(sequence("patient", 630, max_tokens=8, priority=PATIENT))
    for moment in range(100):
        if moment < 10:
            scheduler.add(sequence(f"hurry {moment}", 20))
        step(scheduler)
    assert not scheduler.has_work


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
    """First token by: (queued prefill tokens) / (measured prefill rate) + one step, or a place if that comes later."""

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
        assert caught.value.position == 2  # behind `first`, before `lazy`
        assert scheduler.load().waiting == 2
        scheduler.add(sequence("in time", 20), first_token_by=0.081)

    def test_the_wait_counts_places_that_others_have(self) -> None:
        """Of four places one is left every 50 / 4 steps of 10 ms, as far as is known from those that ended."""
        scheduler = self.measured()
        running = [sequence(name, 3, 20) for name in ("a", "b", "c", "d")]
        for each in running:
            scheduler.add(each)
        scheduler.schedule()
        newcomer = sequence("e", 5)
        newcomer.arrival = 99
        assert scheduler.predicted_wait(newcomer) == pytest.approx(12 / 1000 + 0.005 + 0.010)  # nobody has ended yet
        for _ in range(50):
            scheduler.pace.record(seconds=0.010, prefill_tokens=0, decode_tokens=1)
        scheduler.finish(running.pop(), FinishReason.STOP)
        assert scheduler.predicted_wait(newcomer) == pytest.approx(9 / 1000 + 0.005 + 0.010)  # its place is free
        scheduler.add(sequence("f", 5))  # goes first, into that place
        assert scheduler.predicted_wait(newcomer) == pytest.approx(50 * 0.010 / 3 + 0.005 + 0.010, rel=0.01)
        with pytest.raises(FirstTokenTooLate):
            scheduler.add(sequence("g", 5), first_token_by=0.15)
        scheduler.add(sequence("patient", 5), first_token_by=0.2)


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


class TestPrefixes:
    """What was computed once is not computed again while its blocks last."""

    def finished(self, scheduler: Scheduler, *sequences: Sequence) -> list[list[tuple[str, int]]]:
        """Run them one after the other; the prefill chunks of each."""
        chunks: list[list[tuple[str, int]]] = []
        for each in sequences:
            scheduler.add(each)
            chunks.append([])
            while scheduler.has_work:
                chunks[-1] += [(c.sequence.id, len(c.tokens)) for c in step(scheduler).prefill]
        return chunks

    @pytest.mark.parametrize(("prompt", "computed"), [(15, 15), (32, 16), (33, 1), (40, 8), (48, 16), (60, 12)])
    def test_full_blocks_of_an_earlier_prompt_are_found_and_the_last_token_is_always_computed(
        self, prompt: int, computed: int
    ) -> None:
        scheduler = small()
        later = sequence("b", prompt, like="a")
        self.finished(scheduler, sequence("a", 60), later)
        assert later.prompt_length - later.cached == computed
        assert scheduler.prefix_found_total == later.cached

    def test_an_answer_is_found_by_the_next_turn_of_the_conversation(self) -> None:
        scheduler, first = small(), sequence("a", 20, max_tokens=20)
        self.finished(scheduler, first)
        turn = Sequence("b", 50, [*first.tokens, *range(10)], 4)
        self.finished(scheduler, turn)
        assert turn.cached == 32  # of 39 that were computed: the last sampled token never was

    def test_prompts_with_another_salt_share_nothing(self) -> None:
        scheduler, other = small(), sequence("b", 60, like="a")
        other.salt = b"other tenant"
        self.finished(scheduler, sequence("a", 60), other)
        assert other.cached == 0

    def test_running_sequences_share_blocks_and_an_end_frees_only_its_own(self) -> None:
        scheduler = small()
        a, b = sequence("a", 40, max_tokens=20), sequence("b", 40, max_tokens=20, like="a")
        scheduler.add(a)
        step(scheduler), step(scheduler)
        scheduler.add(b)
        step(scheduler)
        assert b.blocks[:2] == a.blocks[:2] and b.blocks[2] != a.blocks[2]
        assert scheduler.load().free_blocks == 4
        scheduler.finish(a, FinishReason.ABORT)
        scheduler.check()
        assert scheduler.load().free_blocks == 5

    def test_the_longest_unused_prefix_makes_room_and_its_end_goes_first(self) -> None:
        scheduler = small(num_blocks=6)
        old, new, filler = sequence("old", 33, 1), sequence("new", 33, 1), sequence("filler", 33, 1)
        self.finished(scheduler, old, new, filler)
        again_old, again_new = sequence("x", 33, 1, like="old"), sequence("y", 33, 1, like="new")
        self.finished(scheduler, again_new)
        assert again_new.cached == 32
        self.finished(scheduler, again_old)
        assert again_old.cached < 32

    def test_a_preempted_sequence_takes_up_what_is_left_of_its_own(self) -> None:
        scheduler = small(num_blocks=5, window=80)
        first, second = sequence("first", 31, max_tokens=20), sequence("second", 30, max_tokens=30)
        for each in (first, second):
            scheduler.add(each)
        while not scheduler.preempted_total:
            step(scheduler)
        found = scheduler.prefix_found_total
        while scheduler.has_work:
            step(scheduler)
        assert (first.generated, second.generated) == (20, 30)
        assert scheduler.prefix_found_total > found

    def test_what_an_error_left_behind_is_not_found(self) -> None:
        scheduler, broken, later = small(), sequence("a", 40), sequence("b", 40, like="a")
        scheduler.add(broken)
        step(scheduler), step(scheduler)
        scheduler.finish(broken, FinishReason.ERROR)
        self.finished(scheduler, later)
        assert later.cached == 0

    def test_the_predicted_wait_knows_the_prefix(self) -> None:
        scheduler = TestDeadlines().measured()
        self.finished(scheduler, sequence("a", 80))
        scheduler.pace = TestDeadlines().measured().pace
        scheduler.add(sequence("b", 81, like="a"), first_token_by=0.012)
        with pytest.raises(FirstTokenTooLate):
            scheduler.add(sequence("c", 81), first_token_by=0.012)

    def test_one_that_waits_for_its_twin_holds_up_nobody(self) -> None:
        scheduler = small(max_batch_tokens=16)
        first, twin, other = sequence("first", 40), sequence("twin", 40, like="first"), sequence("other", 4)
        twin.parent = first
        for each in (first, twin, other):
            scheduler.add(each)
        batches = [shape(step(scheduler)) for _ in range(4)]
        assert batches[:3] == [[("first", 16)], [("first", 16)], [("first", 8), ("other", 4)]]
        assert ("twin", 8) in batches[3] and twin.cached == 32

    def test_a_prompt_that_several_share_is_counted_once(self) -> None:
        """In the load, in the wait that is predicted, and against what may wait."""
        scheduler = small(max_waiting_tokens=90, max_running=1)
        first, *twins = (sequence("choice", 60) for _ in range(4))
        for twin in twins:
            twin.parent = first
        scheduler.pace = TestDeadlines().measured().pace  # 1,000 tokens a second, 10 ms a step
        for each in (first, *twins):
            scheduler.add(each, first_token_by=0.075)
        assert scheduler.load().queued_prefill_tokens == 63
        step(scheduler)
        assert scheduler.load().queued_prefill_tokens == 28 + 3
        scheduler.finish(first, FinishReason.ABORT)
        assert scheduler.load().queued_prefill_tokens >= 60  # the next one computes it now
        while scheduler.has_work:
            step(scheduler)


def test_a_later_request_overtakes_by_its_priority_but_a_bounded_number_of_them() -> None:
    scheduler = small(max_running=1, max_waiting=10_000, max_waiting_tokens=10**6)
    patient = sequence("patient", 4, max_tokens=1, priority=1)
    scheduler.add(patient)
    overtaken = 0
    while patient.finish is None:
        scheduler.add(sequence(f"urgent {overtaken}", 4, max_tokens=1))
        step(scheduler)
        overtaken += 1
    assert overtaken == OVERTAKING  # the last of them came as it started


class TestGuesses:
    """What a decoding sequence may say next is computed along, and booked as far as it was right."""

    def begun(self, scheduler: Scheduler, prompt: int = 10, max_tokens: int = 40, name: str = "a") -> Sequence:
        new = sequence(name, prompt, max_tokens)
        scheduler.add(new)
        step(scheduler)
        return new

    @pytest.mark.parametrize(
        ("guesses", "generated", "accepted"),
        [((), 2, 0), ((1, 1, 1), 5, 3), ((1, 2, 1), 3, 1), ((2, 1, 1), 2, 0)],
    )
    def test_as_many_as_are_right_are_booked_and_one_more(
        self, guesses: tuple[int, ...], generated: int, accepted: int
    ) -> None:
        scheduler = small()
        only = self.begun(scheduler)
        batch = step(scheduler, guesses=lambda _: guesses)
        assert shape(batch) == [("a", 1 + len(guesses))]
        assert (only.generated, only.pending) == (generated, 1)
        assert (scheduler.guessed_total, scheduler.accepted_total) == (len(guesses), accepted)

    def test_what_wrong_ones_took_is_given_back(self) -> None:
        scheduler = small()
        only = self.begun(scheduler)
        batch = scheduler.schedule({"a": [2] * 20})
        assert (len(only.blocks), scheduler.load().free_blocks) == (2, 6)
        book(scheduler, batch.verify[0], lambda _: 1)
        assert (len(only.blocks), scheduler.load().free_blocks) == (1, 7)

    def test_right_ones_that_fill_a_block_are_found_by_others(self) -> None:
        scheduler = small()
        only = self.begun(scheduler)
        step(scheduler, guesses=lambda _: (1,) * 9)
        scheduler.finish(only, FinishReason.ABORT)
        later = Sequence("b", 30, [*only.tokens, *range(7)][:30], 4)
        scheduler.add(later)
        step(scheduler)
        assert later.cached == 16

    def test_none_is_computed_beyond_the_last_token_that_may_come(self) -> None:
        scheduler = small()
        only = self.begun(scheduler, max_tokens=4)
        assert shape(step(scheduler, guesses=lambda _: (1,) * 9)) == [("a", 3)]
        assert (only.generated, only.finish) == (4, FinishReason.LENGTH)

    def test_they_preempt_nobody_and_take_no_block_that_another_needs_to_decode(self) -> None:
        scheduler = small(num_blocks=3, window=48, max_batch_tokens=96)
        first, second = self.begun(scheduler, 15, 20), self.begun(scheduler, 15, 20, "b")
        batch = scheduler.schedule({"a": (1,) * 18, "b": (1,) * 18})
        assert shape(batch) == [("b", 1), ("a", 16)]
        assert (len(first.blocks), len(second.blocks), scheduler.preempted_total) == (2, 1, 0)

    @pytest.mark.parametrize(
        ("budget", "blocks", "expected"),
        [(21, 8, [("a", 11), ("b", 10)]), (96, 4, [("a", 22), ("b", 20)])],
        ids=["budget", "blocks"],
    )
    def test_half_of_the_budget_stays_for_prompts_and_one_that_starts_has_its_blocks_first(
        self, budget: int, blocks: int, expected: list[tuple[str, int]]
    ) -> None:
        scheduler = small(num_blocks=blocks, max_batch_tokens=budget)
        self.begun(scheduler)
        scheduler.add(sequence("b", 20))
        assert shape(scheduler.schedule({"a": (1,) * 30})) == expected

    def test_where_memory_does_not_suffice_nothing_is_guessed_for_a_while(self) -> None:
        scheduler = small()
        only = self.begun(scheduler)
        assert scheduler.shrink(scheduler.schedule({"a": (1,) * 20}))
        scheduler.check()
        assert (scheduler.decoding(), len(only.blocks)) == ([], 1)
        for _ in range(STEPS_UNTIL_GROWTH):
            scheduler.stepped()
        assert scheduler.decoding() == [only]

    def test_a_sequence_that_is_not_to_be_trusted_is_computed_again_and_nobody_finds_it(self) -> None:
        scheduler = small()
        only = self.begun(scheduler, 40)
        batch = step(scheduler)
        scheduler.recompute(only)
        scheduler.check()
        assert (only.blocks, only.computed) == ([], 0)
        batch = step(scheduler)
        assert (only.cached, batch.prefill[0].start) == (0, 0)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Arrivals, steps, ends and aborts in any order: accounts stay exact, and everything that was accepted ends."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = small(num_blocks=6, window=80)
        self.open: list[Sequence] = []
        self.names = 0

    @rule(
        prompt=st.integers(1, 70),
        max_tokens=st.integers(1, 40),
        priority=st.integers(-1, 1),
        like=st.sampled_from(["x", "y", None]),
        fork=st.booleans(),
    )
    def add(self, prompt: int, max_tokens: int, priority: int, like: str | None, fork: bool) -> None:
        new = sequence(str(self.names), prompt, max_tokens, priority, like)
        self.names += 1
        if fork and self.open:
            parent = self.open[-1]
            new.tokens, new.prompt_length, new.parent = (
                parent.tokens[: parent.prompt_length],
                parent.prompt_length,
                parent,
            )
            prompt = new.prompt_length
        try:
            self.scheduler.add(new)
        except (ContextLengthExceeded, Overloaded):
            assert prompt + max_tokens > 80 or self.scheduler.load().waiting == 8
        else:
            self.open.append(new)

    @rule(
        ends=st.lists(st.booleans(), min_size=4, max_size=4),
        guesses=st.lists(st.lists(st.integers(0, 2), max_size=20), min_size=3, max_size=3),
    )
    def step(self, ends: list[bool], guesses: list[list[int]]) -> None:
        batch = step(self.scheduler, lambda s: 0 if ends[int(s.id) % 4] else 1, lambda s: tuple(guesses[int(s.id) % 3]))
        names = [chunk.sequence.id for chunk in batch]
        assert len(names) == len(set(names)) <= 4
        assert sum(len(chunk.tokens) for chunk in batch) <= 32
        assert bool(batch) or not self.scheduler.has_work
        for chunk in batch:
            assert len(chunk.blocks) * 16 >= chunk.start + len(chunk.tokens)
        self.open = [each for each in self.open if each.finish is None]

    @rule(guesses=st.lists(st.integers(0, 2), max_size=20), recomputed=st.booleans(), ended=st.integers(0, 3))
    def fail(self, guesses: list[int], recomputed: bool, ended: int) -> None:
        """A step that comes to nothing: memory does not suffice, or what it computed is not to be trusted; and one of
        its sequences has ended meanwhile."""
        batch = self.scheduler.schedule({each.id: guesses for each in self.scheduler.decoding()})
        for chunk in list(batch)[ended : ended + 1]:
            assert self.scheduler.finish(chunk.sequence, FinishReason.ABORT)
        if recomputed:
            for chunk in batch:
                if self.scheduler.complete(chunk):
                    self.scheduler.recompute(chunk.sequence)
        else:
            self.scheduler.shrink(batch)
            for chunk in batch:
                if chunk.sequence.finish is None and self.scheduler.load().running == 1:
                    self.scheduler.finish(chunk.sequence, FinishReason.ERROR)
        self.open = [each for each in self.open if each.finish is None]

    @rule(data=st.data(), reason=st.sampled_from([FinishReason.ABORT, FinishReason.ERROR]))
    def abort(self, data: st.DataObject, reason: FinishReason) -> None:
        if self.open:
            index = data.draw(st.integers(0, len(self.open) - 1))
            assert self.scheduler.finish(self.open.pop(index), reason)

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


@pytest.mark.slow
def test_a_hundred_thousand_steps_of_anything_leak_nothing_and_starve_nobody() -> None:
    """Arrivals that share prefixes, twins, aborts and errors, from one seed; the accounts are checked at every step."""
    chance = random.Random(7)
    scheduler = small(num_blocks=12, window=120, max_running=5, max_waiting=12)
    opened: dict[str, tuple[Sequence, int]] = {}
    longest = 0
    for moment in range(100_000):
        if chance.random() < 0.3:
            like = chance.choice(["x", "y", "z", None])
            new = sequence(str(moment), chance.randint(1, 90), chance.randint(1, 30), chance.randint(0, 2), like)
            if opened and chance.random() < 0.2:
                new.parent = chance.choice([s for s, _ in opened.values()])
                new.tokens = new.parent.tokens[: new.parent.prompt_length]
                new.prompt_length = len(new.tokens)
            with suppress(Overloaded, ContextLengthExceeded):
                scheduler.add(new)
                opened[new.id] = (new, moment)
        if opened and chance.random() < 0.05:
            ended, _ = opened[chance.choice(list(opened))]
            scheduler.finish(ended, chance.choice([FinishReason.ABORT, FinishReason.ERROR]))
        step(
            scheduler,
            lambda s: 0 if chance.random() < 0.05 else chance.randint(1, 3),
            lambda s: tuple(chance.choices((1, 2, 3), k=chance.randrange(20))) if chance.random() < 0.5 else (),
        )
        scheduler.stepped()
        if chance.random() < 0.001:
            scheduler.shrink(scheduler.schedule({each.id: (1,) for each in scheduler.decoding()}))
        for name in [name for name, (each, _) in opened.items() if each.finish]:
            longest = max(longest, moment - opened.pop(name)[1])
    assert longest < 5_000
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.load().free_blocks == 12
    assert scheduler.preempted_total > 100 and scheduler.prefix_found_total > 100_000
    assert scheduler.guessed_total > scheduler.accepted_total > 10_000 and scheduler.shrunk_total > 50


def test_where_memory_does_not_suffice_chunks_get_smaller_and_then_fewer_sequences_run() -> None:
    scheduler = Scheduler(Limits(num_blocks=64, window=128, max_batch_tokens=64, max_running=8))
    for name in "abcd":
        scheduler.add(sequence(name, 60, max_tokens=8))
    sizes = []
    while scheduler.shrink(batch := scheduler.schedule()):
        sizes.append(sum(len(chunk.tokens) for chunk in batch))
        scheduler.check()
    assert sizes == [64, 32]
    assert shape(batch) == [("a", SMALLEST_BUDGET)]
    assert scheduler.shrunk_total == 2


def test_after_many_steps_that_succeed_a_batch_grows_again() -> None:
    scheduler = Scheduler(Limits(num_blocks=64, window=512, max_batch_tokens=64, max_running=8))
    for name in "abcd":
        scheduler.add(sequence(name, 2, max_tokens=4))
    step(scheduler)
    batch = scheduler.schedule()
    assert len(batch.decode) == 4
    assert scheduler.shrink(batch)
    assert len(scheduler.schedule().decode) == 2
    assert scheduler.load().waiting == 2
    scheduler.check()
    for _ in range(STEPS_UNTIL_GROWTH):
        scheduler.stepped()
    step(scheduler)
    assert scheduler.load().waiting == 0
