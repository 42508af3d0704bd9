"""What a deployment would cost and how fast it would answer. Pure.

Cost is prompt tokens x input price + output tokens x output price, in nano-dollars. For ranking the price is the
marginal one, the prompt is the estimate and the output the likely one; for a cap, which must hold, the price is the
bill's, the prompt is the bound, and the output is the most that the deployment may write. A request for several answers
pays its prompt once and each answer.

Latencies are 95th percentiles in milliseconds. An engine that says what waits is forecast from that; another is taken
to be as it was measured of late with prompts of that size; one that was not measured, as the catalog has it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from math import ceil, inf

from gateway.decision import Candidate
from gateway.snapshot import FORECAST_SIZES_MS, PROMPT_SIZES, Backlog, DeploymentStatus
from gateway.types import Deployment, RequestFacts

# Where nothing was compared yet: a forecast that is off by a half is what a reading of a quarter of a second ago gives.
FIRST_MARGIN = 1.5

LAST = 1 << 30  # a priority after all others
ROOM = 0.9  # the share of the time to a first token that a queue may take of those who can leave it for another place
KEPT = 0.35  # of those who cannot: the rest is for those like them who come later and overtake
MEMORY = 0.9  # the share of the cache that may be given away; the rest is for running sequences to grow and for bursts
RISING = 2.0  # twice as full is four times as dear
KEEPING = 4.0  # twice as near to what must be kept is sixteen times as dear: little below the room, prohibitive above
STEEPEST = 10.0  # no fuller or nearer than so many times counts: whoever can goes elsewhere long before


def likely_output(deployment: Deployment, facts: RequestFacts) -> int:
    """Tokens that all answers together will probably have: as this caller's had of late, at most what it asks for."""
    most = deployment.output_tokens(facts.max_tokens)
    one = most if facts.likely_output is None else min(facts.likely_output, most)
    return facts.n * one


def likely_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that one more request like this will probably cost there; None where the price is not known."""
    return None if deployment.price is None else deployment.price.of(*_likely(deployment, facts))


def likely_bill(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that a bill will probably show for the request; None where the price is not known."""
    return None if deployment.bill is None else deployment.bill.of(*_likely(deployment, facts))


def _likely(deployment: Deployment, facts: RequestFacts) -> tuple[int, int]:
    return facts.prompt.about(deployment.tokenizer), likely_output(deployment, facts)


def most_cost(deployment: Deployment, facts: RequestFacts) -> int | None:
    """Nano-dollars that the request's bill cannot exceed there, given that its output is bounded; None where the price
    is not known, or the prompt has no bound."""
    prompt = deployment.most_prompt_tokens(facts.prompt)
    if deployment.bill is None or prompt is None:
        return None
    return deployment.bill.of(prompt, facts.n * deployment.output_tokens(facts.max_tokens))


def first_token_ms(
    deployment: Deployment, status: DeploymentStatus, prompt_tokens: int, priority: int, now: float
) -> float | None:
    """The 95th percentile of the time to the first token of a prompt sent now; None where nobody knows."""
    backlog = status.backlog
    if backlog is not None and now <= backlog.good_until:
        forecast = forecast_ms(backlog, prompt_tokens, priority, now)
        margins = backlog.margins_by_priority.get(priority) or backlog.margins
        return forecast * (margins[size_of_forecast(forecast)] if margins else FIRST_MARGIN)
    if status.first_token_p95_ms_by_size:
        return status.first_token_p95_ms_by_size[size_of_prompt(prompt_tokens)]
    if status.first_token_p95_ms is not None:
        return status.first_token_p95_ms
    speed = deployment.speed
    if speed is None:
        return None
    return 1000 * prompt_tokens / speed.prefill_tokens_per_s + speed.ms_per_output_token


def per_token_ms(deployment: Deployment, status: DeploymentStatus, now: float) -> float | None:
    """The 95th percentile of the time of a token after the first; None where nobody knows."""
    if status.per_token_p95_ms is not None:
        return status.per_token_p95_ms
    backlog = status.backlog
    if backlog is not None and now <= backlog.good_until:
        return backlog.step_s * 1000
    return deployment.speed.ms_per_output_token if deployment.speed is not None else None


def forecast_ms(backlog: Backlog, prompt_tokens: int, priority: int, now: float) -> float:
    """Milliseconds until the first token of a prompt that an engine gets now.

    The engine is in a step that computes some of what waits, and half of it is over. Then come the steps that the
    prompts before this one and itself need; each is full, the last one as far as there is something to fill it with,
    also from prompts that go after this one. A step takes `step_s` and its prompt tokens at the measured rate. Waiting
    for blocks or a place may take longer: those that are needed beyond the free ones, at the rate at which running
    sequences give theirs back.
    """
    rate, step, size = backlog.prefill_tokens_per_s, backlog.step_s, backlog.step_tokens
    passed = now - backlog.at
    share = backlog.share_ahead(priority)
    waiting = max(0.0, backlog.tokens - passed * rate)
    under_way = min(size, waiting)
    left = waiting - under_way
    full = max(0, ceil((left * share + prompt_tokens) / size) - 1)
    last = min(size, left + prompt_tokens - full * size)
    seconds = full * (step + size / rate) + step + last / rate
    if waiting or backlog.running:
        seconds += (step + under_way / rate) / 2
    free_in = until_room_s(backlog, backlog.tokens * share + prompt_tokens, backlog.sequences * share + 1)
    if free_in > 0:
        seconds = max(seconds, free_in - passed + prompt_tokens / rate + step)
    return 1000 * seconds


def until_room_s(backlog: Backlog, tokens: float, sequences: float) -> float:
    """Seconds until an engine has blocks and places for prompts of so many tokens and sequences."""
    free_in = 0.0
    missing = tokens / backlog.block_size - backlog.free_blocks
    if missing > 0:
        free_in = _until_free(missing, backlog.used_blocks, backlog.hold_s)
    missing = sequences - backlog.free_places
    if missing > 0:
        free_in = max(free_in, _until_free(missing, backlog.running, backlog.hold_s))
    return free_in


def _until_free(missing: float, used: float, hold_s: float) -> float:
    """Seconds until so many are free of those in use, each of which is held for `hold_s` in the mean."""
    return missing * hold_s / used if used > 0 else 0.0


def size_of_prompt(tokens: float) -> int:
    """Which of the sizes of prompts it is; see `PROMPT_SIZES`."""
    return bisect_left(PROMPT_SIZES, tokens)


def size_of_forecast(milliseconds: float) -> int:
    """Which of the sizes of forecasts it is; see `FORECAST_SIZES_MS`."""
    return bisect_left(FORECAST_SIZES_MS, milliseconds)


def engine_seconds(backlog: Backlog, prompt_tokens: int, output_tokens: int) -> float:
    """Seconds of the whole engine that a request takes: its prompt at the prefill rate, and for each output token what
    one more sequence adds to a step, with the tokens that it looks back at: at half of the output, those of the prompt
    and of the first half."""
    token_s = (backlog.token_s or 0.0) + backlog.cached_token_s * (prompt_tokens + output_tokens / 2)
    return prompt_tokens / backlog.prefill_tokens_per_s + output_tokens * token_s


def congestion_nusd(
    status: DeploymentStatus, backlog: Backlog, priority: int, prompt_tokens: int, engine_s: float, now: float
) -> int:
    """What the room that a request takes at an engine costs the others, in nano-dollars.

    Its engine-seconds times two prices (see demand.py). The price of a second is what the work that finds no room
    because of it would have saved; it counts as far as the engine is full, (fullness) ^ RISING, the fullness being the
    more of

    - for each priority that it delays, its own and those after it: the wait for a first token, without this request, as
      a share of what such requests can wait, over ROOM; at most 1, for who does not make it leaves the queue, and no
      more than that saving is lost;
    - the share of the cache that would be in use with it and what waits (no more of that than is computed while a
      sequence holds its blocks, for then they are free again), over MEMORY: long prompts that must stay need blocks at
      once, and a full cache slows each step.

    What the dearest save counts for those who cannot leave, (wait, as a share of what they can wait, over KEPT) ^
    KEEPING: they would miss their class, which no saving makes good. In an idle engine all of that is next to nothing.
    It is nothing where a price is no number.
    """
    price, dearest = status.engine_second_nusd, status.dearest_nusd
    if not (0.0 <= price < inf and 0.0 <= dearest < inf and price + dearest > 0.0):
        return 0
    wait_s = forecast_ms(backlog, 0, LAST, now) / 1000
    ahead, passed = backlog.ahead, 0
    share, most, kept = 0.0 if ahead else 1.0, 0.0, 0.0
    for other, limit_s, bound in status.rooms:  # both are sorted by priority: one pass, for each decision does this
        while passed < len(ahead) and ahead[passed][0] <= other:
            share, passed = ahead[passed][1], passed + 1
        if other >= priority and share > most * limit_s:
            most = share / limit_s
        if bound and other >= priority and share > kept * limit_s:
            kept = share / limit_s
    full = min(1.0, wait_s * most / ROOM)
    if backlog.free_blocks < inf:
        taken = min(backlog.tokens + prompt_tokens, max(prompt_tokens, backlog.prefill_tokens_per_s * backlog.hold_s))
        used = backlog.used_blocks + taken / backlog.block_size
        full = max(full, used / (MEMORY * (backlog.used_blocks + backlog.free_blocks)))
    dear: float = price * min(full, STEEPEST) ** RISING
    if kept:
        dear += dearest * min(wait_s * kept / KEPT, STEEPEST) ** KEEPING
    return round(engine_s * dear)


def saved_per_engine_second(candidate: Candidate, candidates: Sequence[Candidate]) -> float | None:
    """Nano-dollars that an engine saves in each second that it works on a request: what the cheapest other candidate
    takes, less what this one costs. Infinite where no other would do as well: there is none, or only this one meets
    what the rule requires. None where a price is not known."""
    if not candidate.engine_s or candidate.cost_nusd is None:
        return None
    others = [other for other in candidates if other is not candidate and (other.meets or not candidate.meets)]
    if not others:
        return inf
    prices = [other.price_nusd for other in others if other.price_nusd is not None]
    return (min(prices) - candidate.cost_nusd) / candidate.engine_s if prices else None
