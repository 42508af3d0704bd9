"""One attempt at a deployment, up to its first token: what the call carries, which replicas it tries, and what its
failure means.

Owns that what an attempt opens is told to the fleet and closed, however it ends. Refuses to choose the deployment, and
to try another one (chat.py does).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from gateway.admission import Asking
from gateway.backends.base import Answer, Call, Chunk
from gateway.balance import Affinity, leads_on
from gateway.decision import Decision
from gateway.errors import GatewayError, Retryable, UpstreamFailed, UpstreamLate, UpstreamTimeout
from gateway.fleet import Fleet, Flight
from gateway.masking import Masked
from gateway.queueing import Queueing
from gateway.routing import patience
from gateway.serving import Serving
from gateway.telemetry import Moved, Record
from gateway.types import ChatRequest, Deployment, Permit, Replica, RequestFacts


@dataclass(frozen=True, slots=True)
class Asked:
    """One request once its policy has decided it, at `decided` seconds of the clock. `draw` is its share of chance,
    `asking` what its limits say; None where it has none."""

    serving: Serving
    facts: RequestFacts
    permit: Permit
    masked: Masked | None
    record: Record
    started: float
    draw: float
    affinity: Affinity | None
    asking: Asking | None
    decided: float


def call_of(
    asked: Asked, decision: Decision, deployment: Deployment, chat: ChatRequest, now: float, *, bounded: bool
) -> Call:
    """What the attempt carries beyond the body. `bounded`: a strict budget wants the answer's length bounded. A
    deadline is only sent while another candidate could still meet it."""
    facts, record, passed_ms = asked.facts, asked.record, (now - asked.started) * 1000
    unbounded = (bounded or facts.max_cost_nusd is not None) and chat.max_tokens is None
    others = len(decision.candidates) > 1 + len(record.failed)
    by = decision.first_token_by_ms
    return Call(
        chat=chat,
        request_id=record.request_id,
        prompt_tokens=facts.prompt.about(deployment.tokenizer),
        imposed_max_tokens=deployment.output_tokens(None) if unbounded else None,
        priority=decision.priority,
        first_token_by_ms=max(1.0, by - passed_ms) if by is not None and others else None,
        masked=asked.masked,
        timeouts=deployment.timeouts.replaced(decision.timeouts),
        patience=patience(decision, record.failed, passed_ms) if chat.stream else None,
    )


async def opened(
    fleet: Fleet, clock: Callable[[], float], asked: Asked, deployment: Deployment, call: Call
) -> tuple[Flight, Answer, Chunk]:
    """Call the deployment, at one replica after the other where it has several, and wait for the first token; until
    then a failure costs nothing but time. Raises what `Backends.open` does."""
    limits = call.timeouts or deployment.timeouts
    by = asyncio.get_running_loop().time() + (limits.first_token if call.chat.stream else limits.total)
    facts = asked.facts
    tried: dict[Replica, GatewayError] = {}
    while True:
        flight = fleet.started(
            deployment.name,
            clock(),
            call.prompt_tokens,
            priority=call.priority,
            stream=call.chat.stream,
            asker=(facts.tenant, facts.key_id, facts.model),
            answers=facts.n,
            affinity=asked.affinity,
            tried=tried,
        )
        member = flight.member
        if member is not None:
            call = replace(call, replica=member.replica)
        try:
            return await _first(fleet, clock, asked, deployment, call, flight, by)
        except Retryable as error:
            if member is None:
                raise
            tried[member.replica] = error
            more = leads_on([*tried.values()]) and fleet.another(deployment.name, clock(), tried)
            if not more:
                raise
            asked.record.moved.append(Moved(deployment.name, member.ordinal, error.message))


async def _first(
    fleet: Fleet,
    clock: Callable[[], float],
    asked: Asked,
    deployment: Deployment,
    call: Call,
    flight: Flight,
    by: float,
) -> tuple[Flight, Answer, Chunk]:
    """The answer and its first chunk, which must come until the event loop's time `by`."""
    answer: Answer | None = None
    queue: Queueing | None = None
    try:
        async with asyncio.timeout_at(by) as limit:
            if call.patience is not None:
                queue = Queueing(fleet, clock, flight, call.patience, limit)
            try:
                answer = await asked.serving.backends.open(deployment, asked.permit, call)
                first = await anext(answer)
            finally:
                if queue is not None:
                    queue.over()
    except BaseException as error:
        left = queue is not None and queue.left and isinstance(error, TimeoutError)
        failure = UpstreamLate() if left else _failure(error)
        if failure is None:
            fleet.abandoned(flight)
        else:
            fleet.ended(flight, failure, clock())
        if answer is not None:
            await answer.close()
        if failure is None:
            raise
        raise failure from None
    if call.chat.stream:
        fleet.first_token(flight, clock())
    return flight, answer, first


def _failure(error: BaseException) -> GatewayError | None:
    """What ended an attempt before its first token, in our tree; None for what is not the deployment's doing (a
    cancelled request)."""
    if isinstance(error, GatewayError):
        return error
    if isinstance(error, TimeoutError):
        return UpstreamTimeout("no first token in time")
    if isinstance(error, StopAsyncIteration):
        return UpstreamFailed("the deployment's answer was empty")
    return None
