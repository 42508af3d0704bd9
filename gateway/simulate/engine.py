"""An engine in virtual time: local_engine/scheduler.py without tokens, tensors and threads.

Owns which sequence computes what in which step, as the real scheduler does it: decoding sequences first, one token
each; what is left of the token budget to prompts, in chunks, in order of priority and arrival (a step of priority is
worth a number of places); a start only where blocks are left for everyone to grow; preemption of the last in order
where they run out; refusal on arrival of what is too much or comes too late. Refuses clocks: `now` comes in, and the
end of a step goes out. Of prefixes that an engine finds computed before it knows nothing.

Decoding sequences are counted, not visited: a step costs the same for one as for hundreds. That works because each of
them makes one token in each step, so when it began says how long it is, when it ends, and when it needs a block.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter
from typing import Literal

from gateway.simulate.pace import Pace
from gateway.simulate.step import EngineModel
from gateway.snapshot import EngineLoad

Refusal = Literal["full", "late", "window"]

OVERTAKING = 256  # local_engine/sequence.py: a step of priority is worth so many places in the queue
PATIENT, LEFT_FREE = 4, 20  # local_engine/scheduler.py: from this priority on one in so many blocks is left free

_BY_ORDER = attrgetter("order")


@dataclass(slots=True, eq=False)
class Sequence:
    """One request in the engine. `computed` of its `length` tokens are in the cache while it is a prompt; from then on
    it decodes, `joined` says since which step, and its length grows by one a step. `blocks` it holds while no step is
    under way."""

    key: int
    prompt_tokens: int
    output_tokens: int
    priority: int
    arrival: int
    length: int
    order: int
    generated: int = 0
    computed: int = 0
    blocks: int = 0
    state: Literal["waiting", "prompt", "decoding", "ended"] = "waiting"
    joined: int = 0
    starts: int = 0
    started: int = 0

    @property
    def pending(self) -> int:
        return self.length - self.computed


@dataclass(slots=True)
class Stepped:
    """What came of a step: keys of the requests whose first token it made, and of those that ended with it."""

    first: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


@dataclass(slots=True)
class _Step:
    seconds: float
    chunks: list[tuple[Sequence, int]]
    prompt_tokens: int
    decoded: int


class Engine:
    """One engine. Invariants: free blocks and those that sequences hold are all there are; each sequence that was added
    ends once, or was aborted."""

    def __init__(self, model: EngineModel) -> None:
        self.model = model
        self.pace = Pace()
        self.busy_s = 0.0
        self.steps = 0
        self.preempted = 0
        self._free = model.num_blocks
        self._waiting: list[tuple[int, int, Sequence]] = []  # a heap; ended ones are skipped
        self._waiting_count = 0
        self._waiting_tokens = 0
        self._prompts: list[Sequence] = []  # in order
        self._latest: list[tuple[int, int, Sequence]] = []  # a heap of running ones, the last in order first
        self._running = 0
        self._decoding = 0
        self._cached = 0  # sum of the lengths of those that decode
        self._phases = [0] * model.block_size  # of those that decode, how many need a block when the step is so much
        self._ends: list[tuple[int, int, Sequence]] = []  # a heap: the step that makes its last token
        self._step_number = 0  # steps that decoded
        self._arrivals = 0
        self._under_way: _Step | None = None

    # Requests come and go.

    def add(
        self, key: int, prompt_tokens: int, output_tokens: int, priority: int, first_token_by: float | None
    ) -> Sequence | Refusal:
        """Queue a request, or say why not. `first_token_by` is in seconds from now."""
        model = self.model
        prompt_tokens = max(1, prompt_tokens)
        if prompt_tokens + output_tokens > model.capacity:
            return "window"
        if self._waiting_count >= model.max_waiting or self._waiting_tokens + prompt_tokens > model.max_waiting_tokens:
            return "full"
        if first_token_by is not None:
            wait = self.predicted_wait(prompt_tokens, priority)
            if wait is not None and wait > first_token_by:
                return "late"
        order = self._order(priority)
        sequence = Sequence(key, prompt_tokens, output_tokens, priority, self._arrivals, prompt_tokens, order)
        self._arrivals += 1
        self._wait(sequence)
        return sequence

    def predicted_wait(self, prompt_tokens: int, priority: int) -> float | None:
        """Seconds until the first token of a prompt that comes now, as the real engine reckons."""
        rate, step = self.pace.prefill_rate, self.pace.step_s
        if rate is None or step is None:
            return None
        order = self._order(priority)
        before = [other.length for known, _, other in self._waiting if known < order and other.state == "waiting"]
        tokens = sum(prompt.pending for prompt in self._prompts if prompt.order < order and prompt.pending > 1)
        ahead = (tokens + sum(before)) / rate
        lacking = self._running + len(before) + 1 - self.model.max_running
        if lacking > 0 and self._running:
            ahead = max(ahead, lacking * (self.pace.held_steps or 0.0) * step / self._running)
        return ahead + prompt_tokens / rate + step

    def _order(self, priority: int) -> int:
        """Of a request that comes now."""
        return priority * OVERTAKING + self._arrivals

    def abort(self, sequence: Sequence) -> None:
        """End a request wherever it is; its blocks are free at once."""
        if sequence.state == "waiting":
            self._leave_queue(sequence)
        elif sequence.state != "ended":
            self._leave(sequence, in_step=self._under_way is not None)
            self.pace.ended(sequence.started)
        sequence.state = "ended"

    def load(self) -> EngineLoad:
        """What the engine says of itself."""
        model = self.model
        return EngineLoad(
            waiting=self._waiting_count,
            running=self._running,
            queued_prefill_tokens=self._waiting_tokens + sum(p.pending for p in self._prompts if p.pending > 1),
            free_blocks=self._free,
            total_blocks=model.num_blocks,
            block_size=model.block_size,
            prefill_tokens_per_s=self.pace.prefill_rate,
            decode_tokens_per_s=self.pace.decode_rate,
            step_s=self.pace.step_s,
            max_running=model.max_running,
            max_batch_tokens=model.max_batch_tokens,
        )

    # Steps.

    @property
    def idle(self) -> bool:
        """Whether no step is under way."""
        return self._under_way is None

    def begin(self) -> float | None:
        """Begin a step: the seconds that it takes; None where there is nothing to do."""
        assert self._under_way is None
        if not self._running and not self._waiting_count:
            return None
        self._make_room()
        self._free -= self._needing()
        # A chunk of one token is a decoding row to the runner, whoever computed the tokens before it.
        chunks = [(prompt, 1) for prompt in self._prompts if prompt.pending == 1]
        decoded = self._decoding + len(chunks)
        cached = self._cached + sum(prompt.length for prompt, _ in chunks)
        budget = self.model.max_batch_tokens - decoded
        prompt_tokens = 0
        left = iter([prompt for prompt in self._prompts if prompt.pending > 1])
        prompt = next(left, None)
        while budget > 0:
            if (head := self._startable()) is not None and (prompt is None or head.order <= prompt.order):
                self._start(head)
                chosen = head
            elif prompt is not None:
                chosen, prompt = prompt, next(left, None)
            else:
                break
            size = min(budget, chosen.pending)
            budget -= size
            chunks.append((chosen, size))
            if size > 1:
                prompt_tokens += size
                cached += chosen.computed
            else:
                decoded += 1
                cached += chosen.computed + 1
        if not prompt_tokens and not decoded:
            return None
        seconds = self.model.step_s(prompt_tokens, decoded, cached)
        self._under_way = _Step(seconds, chunks, prompt_tokens, decoded)
        return seconds

    def end(self) -> Stepped:
        """The step is over."""
        step, self._under_way = self._under_way, None
        assert step is not None
        self.busy_s += step.seconds
        self.steps += 1
        self.pace.record(step.seconds, step.prompt_tokens, step.decoded)
        came = Stepped()
        self._step_number += 1
        self._cached += self._decoding
        while self._ends and self._ends[0][0] <= self._step_number:
            ending, _, sequence = heappop(self._ends)
            if sequence.state == "decoding" and sequence.joined + self._to_decode(sequence) == ending:
                self._leave(sequence, in_step=False)
                self.pace.ended(sequence.started)
                sequence.state = "ended"
                came.ended.append(sequence.key)
        for sequence, size in step.chunks:
            if sequence.state != "prompt":
                continue
            sequence.computed += size
            if sequence.pending == 0:
                self._sample(sequence, came)
        return came

    # The pieces of a step.

    def _to_decode(self, sequence: Sequence) -> int:
        """Decode steps that a sequence needed when it joined."""
        return sequence.output_tokens - sequence.generated

    def _sample(self, sequence: Sequence, came: Stepped) -> None:
        """A prompt is computed: its next token is made, and from now on it decodes."""
        if sequence.generated == 0:
            came.first.append(sequence.key)
        sequence.generated += 1
        self._prompts.remove(sequence)
        if sequence.generated >= sequence.output_tokens:
            self._free += sequence.blocks
            self._running -= 1
            self.pace.ended(sequence.started)
            sequence.state = "ended"
            came.ended.append(sequence.key)
            return
        sequence.length += 1
        sequence.state = "decoding"
        sequence.joined = self._step_number
        self._decoding += 1
        self._cached += sequence.length
        self._phases[self._phase(sequence)] += 1
        heappush(self._ends, (self._step_number + self._to_decode(sequence), sequence.arrival, sequence))

    def _phase(self, sequence: Sequence) -> int:
        """A sequence of length 1 more than whole blocks needs another: the step number, modulo the block size, at which
        that is so."""
        return (1 - sequence.length + sequence.joined) % self.model.block_size

    def _needing(self) -> int:
        """Blocks that those that decode need for this step."""
        return self._phases[self._step_number % self.model.block_size]

    def _make_room(self) -> None:
        """Preempt the last in order until the others can go on."""
        while self._needing() > self._free:
            victim = self._last_running()
            self._leave(victim, in_step=False)
            victim.state, victim.computed, victim.blocks = "waiting", 0, 0
            self.preempted += 1
            self._wait(victim)

    def _last_running(self) -> Sequence:
        while True:
            _, _, sequence = self._latest[0]
            if sequence.state in ("prompt", "decoding"):
                return sequence
            heappop(self._latest)

    def _leave(self, sequence: Sequence, *, in_step: bool) -> None:
        """A running sequence gives back its place and its blocks. It knows its length and what it has made again."""
        self._running -= 1
        if sequence.state == "prompt":
            self._prompts.remove(sequence)
            self._free += sequence.blocks
            return
        passed = self._step_number - sequence.joined
        self._phases[self._phase(sequence)] -= 1
        self._decoding -= 1
        sequence.length += passed
        sequence.generated += passed
        self._cached -= sequence.length
        # A step that is under way has already given each the block for its newest token.
        held = sequence.length if in_step else sequence.length - 1
        self._free += -(-held // self.model.block_size)

    def _startable(self) -> Sequence | None:
        """The head of the queue, if a place and blocks are free: its own, one for each running sequence to grow into,
        and some for those who are in a hurry, if it is not."""
        if self._running >= self.model.max_running:
            return None
        head = next(self._heads(), None)
        if head is None:
            return None
        blocks = -(-head.length // self.model.block_size)
        left = self.model.num_blocks // LEFT_FREE if head.priority >= PATIENT and self._running else 0
        return head if blocks + self._running + left <= self._free else None

    def _heads(self) -> Iterator[Sequence]:
        while self._waiting:
            sequence = self._waiting[0][2]
            if sequence.state == "waiting":
                yield sequence
            heappop(self._waiting)

    def _start(self, sequence: Sequence) -> None:
        heappop(self._waiting)
        self._leave_queue(sequence)
        sequence.state = "prompt"
        sequence.starts += 1
        sequence.started = self.pace.steps
        sequence.blocks = -(-sequence.length // self.model.block_size)
        self._free -= sequence.blocks
        self._running += 1
        insort(self._prompts, sequence, key=_BY_ORDER)
        heappush(self._latest, (-sequence.order, -sequence.arrival, sequence))

    def _wait(self, sequence: Sequence) -> None:
        heappush(self._waiting, (sequence.order, sequence.arrival, sequence))
        self._waiting_count += 1
        self._waiting_tokens += sequence.length

    def _leave_queue(self, sequence: Sequence) -> None:
        self._waiting_count -= 1
        self._waiting_tokens -= sequence.length
