"""What waits at one engine: its last reading, corrected by what was sent there since, and how good the forecasts made
from that have been.

Owns the state behind a `Backlog`. Times come in as arguments. Refuses to ask the engine: readings are handed in.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import ceil, exp2, inf

from gateway.estimate import FIRST_MARGIN, forecast_ms, size_of_forecast, until_room_s
from gateway.measures import HALF_LIFE, DecayingHistogram, DecayingLine
from gateway.snapshot import FORECAST_SIZES_MS, Backlog, EngineLoad

GOOD_FOR = 1.0  # seconds: four readings; what an engine had to do a second ago says little
FULL_QUEUE_S = 1.0  # of prompts to compute: an engine with so much of it is as busy as it can be
DEFAULT_STEP_TOKENS = 2048  # where an engine does not say
LIKELY_HOLD_TOKENS = 256  # an answer's length while none has ended

_ENOUGH = 5.0  # comparisons before a margin is believed
_WIDEST = 100.0  # one that goes last may wait for hundreds that come after it
_NARROWEST = 0.5
_LOOKED_UP_EVERY = 0.25


class EngineBacklog:
    """Of one engine. Invariant: `_queue` has, by priority and in the order in which they were sent, the prompt tokens
    of our own requests whose first token has not come, as far as anybody can tell, and `_waiting` their sums. `number`
    is that of the request that was sent last."""

    def __init__(self) -> None:
        self._load: EngineLoad | None = None
        self._at = 0.0
        self._tokens = self._sequences = self._running = 0.0
        self._free = self._used = 0.0
        self._good_until = -inf
        self._sent: deque[tuple[float, int]] = deque()  # since the last reading was asked for: when, prompt tokens
        self._waiting: dict[int, float] = {}
        self._queue: dict[int, dict[int, int]] = {}
        self.number = 0
        self._unseen: list[
            tuple[float, int, int]
        ] = []  # whole answers: when their first token is due, priority, number
        self._errors: dict[int, list[DecayingHistogram]] = {}
        self._margins: dict[int, tuple[float, ...]] = {}
        self._margins_at = -inf
        self._hold_weight = self._hold_sum = 0.0
        self._held_at = 0.0
        self._steps = DecayingLine()
        self._step_line: tuple[float, float] | None = None

    def loaded(self, load: EngineLoad, asked_at: float, now: float) -> None:
        """A reading, which counts what was sent before it was asked for."""
        while self._sent and self._sent[0][0] <= asked_at:
            self._sent.popleft()
        if load.step_s is not None and load.running:
            self._steps.add((load.total_blocks - load.free_blocks) * load.block_size, load.step_s, now)
            self._step_line = self._steps.fit()
        self._load = load
        self._at, self._good_until = now, asked_at + GOOD_FOR
        self._tokens = float(load.queued_prefill_tokens + sum(tokens for _, tokens in self._sent))
        self._sequences = float(load.waiting + len(self._sent))
        self._running = float(load.running)
        self._free = float(load.free_blocks)
        self._used = float(load.total_blocks - load.free_blocks)

    def missed(self) -> None:
        """A reading was asked for and did not come."""
        self._load = None

    def sent(self, prompt_tokens: int, priority: int, stream: bool, now: float) -> float | None:
        """A request leaves for the engine: the forecast of its first token in milliseconds, without a margin; None
        where there is none."""
        backlog = self.backlog(now)
        forecast = None if backlog is None else forecast_ms(backlog, prompt_tokens, priority, now)
        self._advance(now)
        self._sent.append((now, prompt_tokens))
        self._tokens += prompt_tokens
        self._sequences += 1
        self.number += 1
        if stream or forecast is not None:
            self._queue.setdefault(priority, {})[self.number] = prompt_tokens
            self._waiting[priority] = self._waiting.get(priority, 0.0) + prompt_tokens
        if not stream and forecast is not None:
            heappush(self._unseen, (now + forecast / 1000, priority, self.number))
        return forecast

    def told(self, now: float) -> bool:
        """Whether it said of late how much it has to do."""
        return self._load is not None and now <= self._good_until

    def needs_s(self, number: int, priority: int, now: float) -> float | None:
        """Seconds that our own requests up to this one, whose first tokens have not come, need for them, by computing
        and by waiting for blocks and places; None where nobody knows."""
        backlog = self.backlog(now)
        if backlog is None:
            return None
        tokens, sequences = 0.0, 0
        for known, queue in self._queue.items():
            if known < priority:
                tokens += sum(queue.values())
                sequences += len(queue)
        for sent, size in self._queue.get(priority, {}).items():
            tokens += size
            sequences += 1
            if sent == number:
                break
        tokens = max(0.0, tokens - self._computed(backlog, now))
        steps = ceil(tokens / backlog.step_tokens)
        computing_s = tokens / backlog.prefill_tokens_per_s + steps * backlog.step_s
        return max(computing_s, until_room_s(backlog, tokens, sequences))

    def _computed(self, backlog: Backlog, now: float) -> float:
        """Of our own prompts whose first token has not come, the tokens that were computed all the same: those are of
        the first in order."""
        waiting = max(0.0, backlog.tokens - (now - backlog.at) * backlog.prefill_tokens_per_s)
        return max(0.0, sum(self._waiting.values()) - waiting)

    def started(self, number: int, priority: int) -> None:
        """The first token of a stream came, or the request was given up before it."""
        prompt_tokens = self._queue.get(priority, {}).pop(number, 0)
        left = self._waiting.get(priority, 0.0) - prompt_tokens
        if left > 0:
            self._waiting[priority] = left
        else:
            self._waiting.pop(priority, None)

    def compared(self, forecast: float, milliseconds: float, priority: int, now: float) -> None:
        """What was forecast for a request of this priority, and what came."""
        error = min(max(milliseconds / max(forecast, 0.1), _NARROWEST), _WIDEST)
        errors = self._errors.get(priority)
        if errors is None:
            errors = self._errors[priority] = [DecayingHistogram() for _ in range(len(FORECAST_SIZES_MS) + 1)]
        errors[size_of_forecast(forecast)].add(error, now)
        if now - self._margins_at > _LOOKED_UP_EVERY:
            self._margins_at = now
            self._margins = {
                known: tuple([_margin(each, now) for each in by_size]) for known, by_size in self._errors.items()
            }

    def held(self, seconds: float, now: float) -> None:
        """An answer kept its place and blocks for so long."""
        faded = exp2((self._held_at - now) / HALF_LIFE)
        self._hold_weight = self._hold_weight * faded + 1
        self._hold_sum = self._hold_sum * faded + seconds
        self._held_at = now

    def forget(self) -> None:
        """The engine is another one, or has been repaired: how it did before says nothing."""
        self._errors = {}
        self._margins = {}
        self._hold_weight = self._hold_sum = 0.0
        self._steps.clear()
        self._step_line = None
        self._waiting.clear()
        self._unseen.clear()
        self._queue.clear()

    def backlog(self, now: float) -> Backlog | None:
        """What a forecast is made from; None where the last reading is missing, too old, or names no rates."""
        load = self._load
        if load is None or now > self._good_until or not load.prefill_tokens_per_s or load.step_s is None:
            return None
        while self._unseen and self._unseen[0][0] <= now:
            _, priority, number = heappop(self._unseen)
            self.started(number, priority)
        return Backlog(
            at=self._at,
            good_until=self._good_until,
            tokens=self._tokens,
            prefill_tokens_per_s=load.prefill_tokens_per_s,
            step_s=load.step_s,
            sequences=self._sequences,
            running=int(self._running),
            hold_s=self._hold_sum / self._hold_weight if self._hold_weight else LIKELY_HOLD_TOKENS * load.step_s,
            free_blocks=self._free if load.total_blocks else inf,
            used_blocks=self._used,
            block_size=load.block_size,
            free_places=inf if load.max_running is None else load.max_running - self._running,
            ahead=_shares(self._waiting),
            margins_by_priority=self._margins,
            token_s=load.step_s / max(1, load.running) if self._step_line is None else 0.0,
            cached_token_s=self._cached_token_s(load),
            step_tokens=load.max_batch_tokens or DEFAULT_STEP_TOKENS,
        )

    def _cached_token_s(self, load: EngineLoad) -> float:
        """Seconds of a step for a token in the cache: what looking back at it takes, and its share of what each step
        takes anyway. A step is shared by no more than the cache holds, so who fills the cache makes more steps."""
        if self._step_line is None:
            return 0.0
        fixed_s, each_s = self._step_line
        capacity = load.total_blocks * load.block_size
        return each_s + fixed_s / capacity if capacity else each_s

    def queued(self, now: float) -> tuple[float, float, float | None] | None:
        """What one replica is compared with another by: prompt tokens to compute, sequences that waited or ran when it
        last said, prompt tokens a second; None without a good reading."""
        load = self._load
        if load is None or now > self._good_until:
            return None
        rate = load.prefill_tokens_per_s
        tokens = self._tokens if rate is None else max(0.0, self._tokens - (now - self._at) * rate)
        return tokens, float(load.waiting + load.running), rate

    def busy(self, now: float) -> float | None:
        """The share of the engine in use, 0 to 1: of its blocks, its places, or of a queue of `FULL_QUEUE_S`, whichever
        is most; None without a good reading."""
        load = self._load
        if load is None or now > self._good_until:
            return None
        shares = [self._used / load.total_blocks if load.total_blocks else 0.0]
        if load.max_running:
            shares.append((self._running + self._sequences) / load.max_running)
        if load.prefill_tokens_per_s:
            shares.append(self._tokens / load.prefill_tokens_per_s / FULL_QUEUE_S)
        return min(1.0, max(0.0, *shares))

    def _advance(self, now: float) -> None:
        """Let the engine have worked on what waits since the last event: prompts drain at the measured rate and take
        blocks and places."""
        load = self._load
        if load is None or not load.prefill_tokens_per_s or self._tokens <= 0:
            self._at = now
            return
        drained = min(self._tokens, (now - self._at) * load.prefill_tokens_per_s)
        begun = self._sequences * drained / self._tokens
        self._tokens -= drained
        self._sequences -= begun
        self._running += begun
        self._free -= drained / load.block_size
        self._used += drained / load.block_size
        self._at = now


def _margin(errors: DecayingHistogram, now: float) -> float:
    margin = errors.quantile(0.95) if errors.weight(now) >= _ENOUGH else None
    return FIRST_MARGIN if margin is None else margin


def _shares(waiting: dict[int, float]) -> tuple[tuple[int, float], ...]:
    """The share of what waits that goes before a request of each priority, its own included."""
    total = sum(waiting.values())
    if total <= 0:
        return ()
    shares, reached = [], 0.0
    for priority in sorted(waiting):
        reached += waiting[priority]
        shares.append((priority, reached / total))
    return tuple(shares)
