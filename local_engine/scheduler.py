"""Owns which sequence runs in the next step and which waits; refuses tensors, text, time and I/O.

One step: `schedule()` names the tokens to compute, the runner computes them, `complete()` books them. Decoding
sequences go first, one token each; what is left of the token budget goes to prompts, in chunks, and at most half of it
to guesses of what decoding sequences will say next, computed along to be accepted or not. Guesses take blocks that
nobody needs in this step, and preempt nobody. When blocks run out, the running sequence that is last in order gives its
blocks back and is computed again later. A sequence that starts takes over what an earlier one computed of the same
prefix.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from itertools import count
from operator import attrgetter

from local_engine.batch import Batch, Chunk
from local_engine.blocks import BlockManager, chain
from local_engine.config import Limits
from local_engine.errors import AccountingError, ContextLengthExceeded, FirstTokenTooLate, Overloaded
from local_engine.pace import Pace
from local_engine.sequence import FinishReason, Sequence

SMALLEST_BUDGET = 16
"""Tokens a step, below which a lack of memory is no matter of the batch."""

STEPS_UNTIL_GROWTH = 256
"""Steps without a lack of memory, after which a shrunk batch may be twice as large again."""

PATIENT = 4
"""From this priority on a sequence leaves a part of the blocks to those who go first: two latency classes behind the
most urgent, as the gateway counts (two steps a class)."""

LEFT_FREE = 20
"""One in so many blocks is left free by those. A full cache is the cheapest, since more sequences share a step; but who
is in a hurry would have to wait until some of them have ended."""

NO_GUESSES: Mapping[str, SequenceOf[int]] = {}

_BY_ORDER = attrgetter("order")
_BY_GUESSED = attrgetter("guessed")


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the scheduler is: sequences, tokens and blocks."""

    waiting: int
    running: int
    queued_prefill_tokens: int
    free_blocks: int
    total_blocks: int


class Scheduler:
    """Waiting and running sequences.

    Invariants: both lists are sorted by `order`; a waiting sequence holds no blocks and has nothing computed; a
    running one holds blocks for all its tokens but perhaps the newest, for guesses that are being computed, and no
    more; `check` proves it.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pace = Pace()
        self.preempted_total = 0
        self.prefix_asked_total = 0  # prompt tokens of sequences that started
        self.prefix_found_total = 0  # of these, found computed
        self.shrunk_total = 0  # times that memory did not suffice
        self.guessed_total = 0  # tokens that were computed as guesses
        self.accepted_total = 0  # of these, that turned out to be the sequences' tokens
        self._guessing = True
        self._batch_tokens = limits.max_batch_tokens
        self._max_running = limits.max_running
        self._steps_since_shrunk = 0
        self._blocks = BlockManager(limits.num_blocks, limits.block_size)
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = count()

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self._waiting or self._running)

    def add(self, sequence: Sequence, *, first_token_by: float | None = None) -> None:
        """Queue a new sequence whose first token is wanted within so many seconds.

        Raises ContextLengthExceeded, Overloaded or FirstTokenTooLate; then nothing has changed.
        """
        if sequence.prompt_length + sequence.max_tokens > self.limits.capacity:
            raise ContextLengthExceeded(
                f"{sequence.prompt_length} prompt tokens and {sequence.max_tokens} to generate are more than the "
                f"{self.limits.capacity} tokens that fit"
            )
        if len(self._waiting) >= self.limits.max_waiting:
            raise Overloaded(f"{self.limits.max_waiting} requests are waiting already", retry_after=self._drain_time())
        sequence.digests = list(chain(sequence.tokens, self.limits.block_size, salt=sequence.salt))
        sequence.cached = len(self._found(sequence)) * self.limits.block_size
        waiting_tokens = sum(waiting.queued for waiting in self._waiting)
        if waiting_tokens + sequence.queued > self.limits.max_waiting_tokens:
            raise Overloaded(
                f"{waiting_tokens} prompt tokens are waiting already, of at most {self.limits.max_waiting_tokens}",
                retry_after=self._drain_time(),
            )
        sequence.arrival = next(self._arrivals)
        if first_token_by is not None:
            predicted = self.predicted_wait(sequence)
            if predicted is not None and predicted > first_token_by:
                raise FirstTokenTooLate(predicted, 1 + len(self._before(sequence)))
        insort(self._waiting, sequence, key=_BY_ORDER)

    def predicted_wait(self, sequence: Sequence) -> float | None:
        """Seconds until the first token of a sequence that comes now; None while nothing was measured.

        Prefill tokens up to and including it / measured prefill rate + one step; or, where places are lacking and that
        takes longer, until enough of those that run have ended: one ends each `held_steps` / running.
        """
        rate, step = self.pace.prefill_rate, self.pace.step_seconds
        if rate is None or step is None:
            return None
        before = self._before(sequence)
        ahead = sum(other.to_compute for other in before) / rate
        lacking = len(self._running) + sum(not other.blocks for other in before) + 1 - self._max_running
        if lacking > 0 and self._running:
            ahead = max(ahead, lacking * (self.pace.held_steps or 0.0) * step / len(self._running))
        return ahead + sequence.to_compute / rate + step

    def decoding(self) -> list[Sequence]:
        """Those that will decode in the next step, as far as blocks last, and may be guessed for; in order."""
        return [each for each in self._running if each.pending == 1 and each.guessable] if self._guessing else []

    def schedule(self, guesses: Mapping[str, SequenceOf[int]] = NO_GUESSES) -> Batch:
        """The next step's work; empty when there is none. `guesses`: by id, what may come next in a sequence."""
        going_on = [sequence for sequence in list(self._running) if self._may_decode(sequence)]
        budget = self._batch_tokens - len(going_on)
        guessed = self._guessed(going_on, guesses, budget // 2) if guesses else {}
        budget -= sum(guessed.values())
        decode = [self._chunk(sequence, 1) for sequence in going_on if sequence.id not in guessed]
        partial = deque(sequence for sequence in self._running if sequence.pending > 1)
        prefill: list[Chunk] = []
        while budget > 0 and (sequence := self._next_to_prefill(partial)):
            chunk = self._chunk(sequence, min(budget, sequence.pending))
            budget -= len(chunk.tokens)
            # A chunk of one token is a decode row to the runner, whoever computed the tokens before it.
            (prefill if len(chunk.tokens) > 1 else decode).append(chunk)
        verify: list[Chunk] = []
        for sequence in going_on:  # now that the blocks of those that start are known
            if sequence.id in guessed:
                chunk = self._verification(sequence, guesses[sequence.id][: guessed[sequence.id]])
                (verify if chunk.guessed else decode).append(chunk)
        verify.sort(key=_BY_GUESSED)
        return Batch(tuple(decode), tuple(prefill), tuple(verify))

    def complete(self, chunk: Chunk) -> bool:
        """Book a computed chunk; False if its sequence ended meanwhile."""
        if chunk.sequence.finish is not None:
            return False
        self._book(chunk.sequence, chunk.start + len(chunk.tokens) - chunk.guessed)
        return True

    def accept(self, chunk: Chunk, count: int) -> None:
        """The first `count` guesses of a completed chunk were right, and are among the sequence's tokens by now: book
        them, and give back the blocks that the others took. Of a sequence that has ended the count alone is kept."""
        self.guessed_total += chunk.guessed
        self.accepted_total += count
        sequence = chunk.sequence
        if sequence.finish is None:
            self._book(sequence, sequence.computed + count)
            self._withdraw(sequence)

    def recompute(self, sequence: Sequence) -> None:
        """What a running sequence's blocks hold is not to be trusted: compute it again, and guess nothing for it."""
        sequence.guessable = False
        self._blocks.forget(sequence.blocks)
        self._preempt(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason) -> bool:
        """End a sequence wherever it is and free its blocks; False if it had ended before."""
        if sequence.finish is not None:
            return False
        sequence.finish = reason
        home = self._running if sequence in self._running else self._waiting
        home.remove(sequence)
        if home is self._running:
            self.pace.ended(sequence.started)
        if reason is FinishReason.ERROR:  # whatever went wrong may have left its trace in the blocks
            self._blocks.forget(sequence.blocks)
        self._blocks.release(sequence.blocks)
        return True

    def shrink(self, batch: Batch) -> bool:
        """Memory did not suffice for this batch: make the next ones smaller; False where that is not possible.

        First nothing is guessed; then prompts are computed in smaller chunks; then half as many sequences run, and the
        last in order give their blocks back and are computed again later. Nothing of the batch counts as computed.
        """
        tokens, sequences = len(batch.decode) + batch.prefill_tokens, len(batch.decode) + len(batch.prefill)
        for chunk in batch.verify:
            if chunk.sequence.finish is None:
                self._withdraw(chunk.sequence)
        if batch.verify:
            self._guessing = False
        elif batch.prefill and tokens > SMALLEST_BUDGET:
            self._batch_tokens = max(SMALLEST_BUDGET, tokens // 2)
        elif sequences > 1:
            self._max_running = sequences // 2
            while len(self._running) > self._max_running:
                self._preempt(self._running[-1])
        else:
            return False
        self.shrunk_total += 1
        self._steps_since_shrunk = 0
        return True

    def stepped(self) -> None:
        """A batch was computed; after many of them a shrunk batch grows again."""
        self._steps_since_shrunk += 1
        if self._steps_since_shrunk >= STEPS_UNTIL_GROWTH:
            self._steps_since_shrunk = 0
            self._guessing = True
            self._batch_tokens = min(self.limits.max_batch_tokens, 2 * self._batch_tokens)
            self._max_running = min(self.limits.max_running, 2 * self._max_running)

    def load(self) -> Load:
        """Counts for those who balance engines."""
        return Load(
            waiting=len(self._waiting),
            running=len(self._running),
            queued_prefill_tokens=sum(sequence.to_compute for sequence in self._unfilled()),
            free_blocks=self._blocks.free,
            total_blocks=self._blocks.num_blocks,
        )

    def check(self) -> None:
        """Raise AccountingError unless blocks and sequences agree in every detail."""
        self._blocks.check(sequence.blocks for sequence in self._running)
        for sequence in self._waiting:
            if sequence.blocks or sequence.computed or sequence.finish:
                raise AccountingError("a waiting sequence holds blocks, computed tokens or an end")
        for sequence in self._running:
            if sequence.finish or sequence.computed > len(sequence.blocks) * self.limits.block_size:
                raise AccountingError("a running sequence has ended, or more computed tokens than its blocks hold")
            if self._blocks.missing(sequence.blocks, len(sequence.tokens) + sequence.guessed - 1) or (
                self._blocks.spare(sequence.blocks, len(sequence.tokens) + sequence.guessed)
            ):
                raise AccountingError("a running sequence holds more or fewer blocks than its tokens need")
            for block, digest in zip(sequence.blocks, sequence.digests, strict=False):
                if self._blocks.digest(block) not in (None, digest):
                    raise AccountingError("a running sequence holds a block that is known for other tokens")
        for home in (self._waiting, self._running):
            if home != sorted(home, key=_BY_ORDER):
                raise AccountingError("sequences are out of order")

    def reset(self) -> None:
        """Count blocks afresh; only while nothing runs or waits."""
        assert not self.has_work
        self._blocks = BlockManager(self.limits.num_blocks, self.limits.block_size)

    def _unfilled(self) -> Iterator[Sequence]:
        yield from (sequence for sequence in self._running if sequence.pending > 1)
        yield from self._waiting

    def _before(self, sequence: Sequence) -> list[Sequence]:
        """Those whose prompts are computed before that of a sequence which comes now."""
        return [other for other in self._unfilled() if other.order < sequence.order]

    def _drain_time(self) -> float:
        rate = self.pace.prefill_rate
        return sum(sequence.to_compute for sequence in self._waiting) / rate if rate else 1.0

    def _may_decode(self, sequence: Sequence) -> bool:
        """Whether this sequence decodes now; preempts those behind it until its token has a block, last of all itself.

        Those behind it have not been looked at in this step, because `_running` is walked in order.
        """
        if sequence.pending != 1 or not sequence.blocks:  # no blocks: preempted a moment ago
            return False
        while not self._blocks.extend(sequence.blocks, len(sequence.tokens)):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, victim: Sequence) -> None:
        self._running.remove(victim)
        self._blocks.release(victim.blocks)
        victim.computed = victim.cached = victim.guessed = 0
        victim.preemptions += 1
        self.preempted_total += 1
        insort(self._waiting, victim, key=_BY_ORDER)

    def _next_to_prefill(self, partial: deque[Sequence]) -> Sequence | None:
        """The first in order of the partly computed prompts and the waiting queue's head, if that may start."""
        head = next((sequence for sequence in self._waiting if not sequence.held_back), None)
        if head is not None and partial and partial[0].order < head.order:
            return partial.popleft()
        if head is not None and self._start(head):
            return head
        return partial.popleft() if partial else None

    def _start(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its blocks, those of its prefix that are known first; False where it has to wait.

        A running place and blocks must be free: its own, and one for each running sequence to grow into. Without that
        margin a start would soon be preempted again. Who is patient leaves some to the others besides, while any run.
        Nothing overtakes a head that has to wait.
        """
        if len(self._running) >= self._max_running:
            return False
        found = self._found(sequence)
        needed = self._blocks.missing(found, len(sequence.tokens)) + self._blocks.unreferenced(found)
        left = self._blocks.num_blocks // LEFT_FREE if sequence.priority >= PATIENT and self._running else 0
        if needed + len(self._running) + left > self._blocks.free:
            return False
        self._waiting.remove(sequence)
        self._blocks.share(sequence.blocks, found)
        self._blocks.extend(sequence.blocks, len(sequence.tokens))
        sequence.computed = sequence.cached = len(found) * self.limits.block_size
        self.prefix_asked_total += len(sequence.tokens)
        self.prefix_found_total += sequence.cached
        sequence.started = self.pace.steps
        insort(self._running, sequence, key=_BY_ORDER)
        return True

    def _found(self, sequence: Sequence) -> list[int]:
        """Blocks that hold the beginning of the sequence; its last token is always computed, for its logits."""
        return self._blocks.cached(sequence.digests[: (len(sequence.tokens) - 1) // self.limits.block_size])

    def _guessed(
        self, sequences: list[Sequence], guesses: Mapping[str, SequenceOf[int]], budget: int
    ) -> dict[str, int]:
        """By id, how many guesses are computed: none beyond the last token that a sequence may generate, since the
        step gives one more than are right."""
        taken: dict[str, int] = {}
        for sequence in sequences:
            size = min(len(guesses.get(sequence.id, ())), sequence.max_tokens - sequence.generated - 1, budget)
            if size > 0:
                taken[sequence.id] = size
                budget -= size
        return taken

    def _verification(self, sequence: Sequence, guesses: SequenceOf[int]) -> Chunk:
        """A decoding sequence's chunk with as many of the guesses as there are blocks for."""
        known = len(sequence.tokens)
        size = min(len(guesses), (len(sequence.blocks) + self._blocks.free) * self.limits.block_size - known)
        self._blocks.extend(sequence.blocks, known + size)
        sequence.guessed = size
        return Chunk(
            sequence=sequence,
            start=sequence.computed,
            tokens=(sequence.tokens[-1], *guesses[:size]),
            blocks=tuple(sequence.blocks),
            samples=True,
            guessed=size,
        )

    def _withdraw(self, sequence: Sequence) -> None:
        """Give back the blocks that only guesses needed."""
        sequence.guessed = 0
        self._blocks.trim(sequence.blocks, len(sequence.tokens))

    def _book(self, sequence: Sequence, computed: int) -> None:
        """So many of its tokens are computed: their blocks that are full become known."""
        before, sequence.computed = sequence.computed, computed
        sequence.digests += chain(sequence.tokens, self.limits.block_size, sequence.digests, sequence.salt)
        for index in range(before // self.limits.block_size, computed // self.limits.block_size):
            self._blocks.learn(sequence.blocks[index], sequence.digests[index])

    def _chunk(self, sequence: Sequence, size: int) -> Chunk:
        end = sequence.computed + size
        return Chunk(
            sequence=sequence,
            start=sequence.computed,
            tokens=tuple(sequence.tokens[sequence.computed : end]),
            blocks=tuple(sequence.blocks),
            samples=end == len(sequence.tokens),
            fresh=sequence.computed == sequence.cached,
        )
