"""One answer for several requests: replayed where it is stored, waited for where it is being made, made where it is
not.

Owns who makes a call and who waits for it, and what a request says that got an answer without a call of its own.
Refuses to decide, to book calls, and to know when an answer may be stored (caching.py does).

Each request has passed its own authentication, its own limits and its own decision before it comes here. A request that
waited in vain tries once more, and then makes a call for itself alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

from gateway.answers import CLIENT_GONE
from gateway.backends.base import Chunk
from gateway.backends.sse import error_event
from gateway.cache import Entry, Flight, as_stream, for_another, target_of
from gateway.caching import Answers, Origin, Use
from gateway.decision import Decision
from gateway.errors import GatewayError, UpstreamCut
from gateway.held import Held
from gateway.policy import Policy
from gateway.reply import EVENT_STREAM, Reply, header_bytes
from gateway.store import TIMEOUT
from gateway.telemetry import Record
from gateway.types import ChatRequest, Permit, RequestFacts

ROUNDS = 2  # how often a request looks for somebody else's answer

ChunkFlight = Flight[Chunk, Origin]


@dataclass(slots=True)
class Seeker:
    """One request that would do with somebody else's answer. `call` makes one for it, `refused` tells its client of an
    error that is booked, `headers` are those of every answer to it, `book` ends its record with a status and an
    outcome; `freed` says that it will call nothing.

    Of its limits: `begin` sets aside what its call would take, beside whatever is waited for next; `wait` what it takes
    while it waits for another's answer, and spares so many seconds of its patience with Redis; `admit` what it takes
    that gets one, None where that is nothing. What none of them nor `call` has taken is given back by whoever made
    this."""

    chat: ChatRequest
    facts: RequestFacts
    permit: Permit
    policy: Policy
    decision: Decision
    record: Record
    use: Use
    call: Callable[[ChatRequest], Awaitable[Reply]]
    book: Callable[[int, str], None]
    refused: Callable[[GatewayError], Reply]
    headers: Callable[[], list[tuple[bytes, bytes]]]
    freed: Callable[[], None]
    begin: Callable[[], None]
    wait: Callable[[float], Awaitable[None]]
    admit: Callable[[], Awaitable[Held | None]]
    elapsed_ms: Callable[[], float]


class Sharing:
    """Answers requests that may share an answer. Invariant: whatever becomes of the request that makes a call, those
    that wait for it get its answer or make one themselves."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    async def answer(self, seeker: Seeker) -> Reply:
        """The reply. Raises what `seeker.call` does."""
        answers, use = self._answers, seeker.use
        if use.wanted.reads and (entry := answers.at_once(use)) is not None and self._usable(seeker, entry):
            return self._replayed(seeker, entry, await seeker.admit())
        token = answers.new_token()
        rounds = ROUNDS if use.wanted.reads else 0
        while rounds:
            flight, first = answers.flights.joined(use.key)
            if not first:
                reply = await self._followed(seeker, flight)
                if reply is not None:
                    return reply
                rounds -= not flight.left
                continue
            entry = await self._found(seeker, flight, token)
            if entry is None:
                return await self._made(seeker, flight, token)
            if self._usable(seeker, entry):
                return self._replayed(seeker, entry, await seeker.admit())
            break
        return await self._made(seeker, answers.flights.alone(use.key), token)

    async def _found(self, seeker: Seeker, flight: ChunkFlight, token: str) -> Entry | None:
        """The stored answer, for all who wait by now. If this request leaves meanwhile, one of them asks in its
        place."""
        entry, goes_on = None, False
        try:
            entry = await self._sought(seeker, token)
            goes_on = entry is None
            return entry
        finally:
            if not goes_on:
                flight.ends(entry)
                flight.forget()
                flight.leave()

    async def _sought(self, seeker: Seeker, token: str) -> Entry | None:
        """The stored answer; None where this request makes it. What replicas share is asked for it in the same exchange
        for a reservation."""
        answers, use = self._answers, seeker.use
        if use.cache is answers.shared:
            seeker.begin()
        said = await answers.look(use, token)
        if said == "taken":
            await seeker.wait(TIMEOUT)
            return await answers.made_elsewhere(use, token)
        return said if isinstance(said, Entry) else None

    def _usable(self, seeker: Seeker, entry: Entry) -> bool:
        return self._answers.fresh(seeker.use, entry) and self._permits(seeker, entry)

    def _permits(self, seeker: Seeker, origin: Origin | Entry) -> bool:
        return self._answers.permits(seeker.policy, seeker.facts, seeker.permit, seeker.decision, origin)

    # Making the answer.

    async def _made(self, seeker: Seeker, flight: ChunkFlight, token: str) -> Reply:
        self._answers.counts.misses += 1
        record, chat = seeker.record, seeker.chat
        record.cache = "miss"
        record.shared = True  # from here on the call books it, whatever becomes of this request
        flight.start(self._call(seeker, flight, token))
        try:
            origin = await flight.begun()
        except BaseException:
            flight.leave()
            raise
        if origin is None:
            flight.leave()
            if isinstance(flight.failure, GatewayError):
                return seeker.refused(flight.failure)
            raise flight.failure or asyncio.CancelledError
        chunks = _Following(flight, usage=chat.include_usage or not chat.stream, free=False)
        return Reply(200, origin.headers, chunks, chunks.close, EVENT_STREAM if chat.stream else b"application/json")

    async def _call(self, seeker: Seeker, flight: ChunkFlight, token: str) -> None:
        """Make the call and pass on what comes; store the answer."""
        answers, use, record, chat = self._answers, seeker.use, seeker.record, seeker.chat
        if chat.stream:
            chat = replace(chat, include_usage=True)  # whoever waits may ask for it, and the entry has it
        try:
            async with answers.claimed(use, token):
                reply = await seeker.call(chat)
                try:
                    origin = self._origin(seeker, reply)
                    flight.begins(origin)
                    async for chunk in reply.chunks:
                        flight.add(chunk)
                        if chunk.last:
                            break
                finally:
                    await reply.close()
                if record.outcome != "ok" or record.usage is None:
                    return
                dropped = record.dropped
                entry, storable = answers.entry_of(use, seeker.chat, origin, flight.pieces, record.usage, dropped)
                flight.ends(entry)
                if entry is not None and storable and not record.failed and record.masked is None:
                    await answers.keep(use, entry, token)
        except GatewayError as error:
            flight.fails(error)
        finally:
            flight.forget()

    def _origin(self, seeker: Seeker, reply: Reply) -> Origin:
        record = seeker.record
        assert record.deployment is not None and record.zone is not None
        target = target_of(seeker.policy.deployments[record.deployment])
        return Origin(record.deployment, record.zone, target, reply.headers, seeker.chat.stream)

    # Somebody else's answer.

    async def _followed(self, seeker: Seeker, flight: ChunkFlight) -> Reply | None:
        """The answer that is being made for another request; None where it fails, or is none for this one."""
        stays = False
        try:
            await seeker.wait(0.0)
            origin = await flight.begun() if seeker.chat.stream else None
            if origin is not None and origin.stream:
                if not self._permits(seeker, origin):
                    return None
                reply = self._live(seeker, flight, origin, await seeker.admit())
                stays = True
                return reply
            entry = await flight.whole()
            if entry is None or not self._usable(seeker, entry):
                return None
            return self._replayed(seeker, entry, await seeker.admit())
        finally:
            if not stays:
                flight.leave()

    def _live(self, seeker: Seeker, flight: ChunkFlight, origin: Origin, held: Held | None) -> Reply:
        """Its stream, from the start and as it comes."""
        headers = self._headers(seeker, origin.deployment, origin.zone, 0.0, held)
        seeker.record.first_token_ms = seeker.elapsed_ms()
        chunks = _Following(flight, usage=seeker.chat.include_usage, free=True, seeker=seeker, held=held)
        seeker.freed()
        return Reply(200, headers, chunks, chunks.close, EVENT_STREAM)

    def _replayed(self, seeker: Seeker, entry: Entry, held: Held | None) -> Reply:
        """The stored answer, in the form that this request asked for."""
        chat, record = seeker.chat, seeker.record
        try:
            answer = as_stream(entry.answer, usage=chat.include_usage) if chat.stream else entry.answer
            age = entry.age(self._answers.wall())
            headers = self._headers(seeker, entry.deployment, entry.zone, age, held, entry.dropped)
        except BaseException:  # a defect, after which nothing must stay open
            if held is not None:
                held.free(answered=False)
            raise
        record.usage = entry.usage
        if chat.stream:
            record.first_token_ms = seeker.elapsed_ms()
        if held is not None:
            held.free(answered=True)
        seeker.book(200, "ok")
        seeker.freed()
        content_type = EVENT_STREAM if chat.stream else b"application/json"
        return Reply.whole(200, headers, Chunk(answer, usage=entry.usage, last=True), content_type=content_type)

    def _headers(
        self,
        seeker: Seeker,
        deployment: str,
        zone: str,
        age: float,
        held: Held | None,
        dropped: tuple[str, ...] = (),
    ) -> list[tuple[bytes, bytes]]:
        self._answers.counts.hits += 1
        record = seeker.record
        record.cache, record.deployment, record.zone, record.cost_nusd = "hit", deployment, zone, 0
        headers = [
            *seeker.headers(),
            (b"x-hybridgate-deployment", deployment.encode()),
            (b"x-hybridgate-zone", zone.encode()),
            (b"x-hybridgate-attempts", b"0"),
            (b"x-hybridgate-cache", b"hit"),
            (b"x-hybridgate-cost-usd", b"0"),
            (b"age", b"%d" % age),
        ]
        if held is not None:
            headers += held.headers_alone
        if dropped:
            headers.append((b"x-hybridgate-dropped", header_bytes(",".join(dropped))))
        return headers


class _Following:
    """The pieces of a flight for one client. Invariant: it leaves the flight once; a request without a call of its own
    is booked once."""

    def __init__(
        self,
        flight: ChunkFlight,
        *,
        usage: bool,
        free: bool,
        seeker: Seeker | None = None,
        held: Held | None = None,
    ) -> None:
        """`usage`: the client asked for it; `free`: the call was made for another; `seeker` is who must be booked, None
        where the call does; `held` what it has set aside."""
        self._held = held
        self._flight = flight
        self._usage = usage
        self._free = free
        self._seeker = seeker
        self._at = 0
        self._open = True

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while True:
            chunk = await self._flight.piece(self._at)
            if chunk is None:
                if self._flight.pieces and self._flight.pieces[-1].last:
                    raise StopAsyncIteration
                error = UpstreamCut("the deployment's answer broke off")
                self._book("cut")
                return Chunk(error_event(error), last=True)
            self._at += 1
            data = for_another(chunk.data, usage=self._usage, free=self._free)
            if chunk.usage is not None and self._seeker is not None:
                self._seeker.record.usage = chunk.usage
            if chunk.last:
                self._book("ok" if chunk.usage is not None else "cut")
            if data or chunk.last:
                return replace(chunk, data=data) if data is not chunk.data else chunk

    async def close(self) -> None:
        """Go. A client that left before the last chunk is booked as such."""
        if self._open:
            self._open = False
            self._book("client_gone")
            self._flight.leave()

    def _book(self, outcome: str) -> None:
        seeker, self._seeker = self._seeker, None
        if self._held is not None:
            self._held.free(answered=True)
        if seeker is not None:
            seeker.book(CLIENT_GONE if outcome == "client_gone" else 200, outcome)
