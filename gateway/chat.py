"""The request path of a chat completion, readable top to bottom: `complete`, then an attempt (attempts.py); what that
opens is an `OpenAnswer` (answers.py).

Owns the order of things, the response headers, and that every attempt ends exactly once. Refuses HTTP (see edge.py),
policy (routing.py) and provider formats (backends/). Plain and streamed answers take the same path: one yields a chunk,
the other many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import orjson

from gateway.admission import Asking, Limiter
from gateway.answers import CLIENT_GONE, Books, OpenAnswer
from gateway.attempts import Asked, call_of, opened
from gateway.backends.base import Answer, Chunk
from gateway.balance import Affinity, conversation_of
from gateway.caching import Answers, Use
from gateway.decision import Decision
from gateway.errors import GatewayError, Retryable, Unauthenticated, UpstreamTimeout, body_of, status_of
from gateway.estimate import likely_bill
from gateway.facts import CHALLENGE, request_id_of
from gateway.fleet import NONE_FULL, Fleet, Flight
from gateway.held import NOT_HELD, Held, Holding
from gateway.intake import SCAN_IN_THREAD_ABOVE, facts_of, parsed
from gateway.keys import Keyring
from gateway.labels import Scanner
from gateway.reply import EVENT_STREAM, Reply, header_bytes
from gateway.routing import decide, next_attempt
from gateway.serving import Serving
from gateway.sharing import Seeker, Sharing
from gateway.snapshot import Snapshot
from gateway.telemetry import Record
from gateway.types import Attempt, Caller, ChatRequest, Deployment, Outcome, RequestFacts, usd

ANONYMOUS = Caller()
STALE = 0.05  # seconds after which a decision is made anew before it is acted on


@dataclass(slots=True)
class ChatPath:
    """Takes chat requests to deployments. `serving` is replaced whole when the policy or what is known of an engine
    changes, `keyring` when the keys do; without one, callers need no keys. `answers` are the stored ones."""

    serving: Serving
    fleet: Fleet
    books: Books
    limiter: Limiter
    clock: Callable[[], float]
    wall: Callable[[], float]
    new_id: Callable[[], str]
    keyring: Keyring | None = None
    answers: Answers | None = None

    async def complete(self, headers: Mapping[str, str], body: bytes) -> Reply:
        """The answer to one request: a completion, a stream, or an error that says why not."""
        decision_id = self.new_id()
        record = Record(self.request_id(headers, decision_id), decision_id)
        started = self.clock()
        serving = self.serving
        serving.backends.enter()
        answering = False
        try:
            reply = await self._complete(serving, headers, body, record, started)
            answering = True  # and when it is closed, it leaves
            return reply
        except GatewayError as error:
            self.books.book(record, started, status_of(error), error.code)
            return self._refused(record, error)
        except asyncio.CancelledError:
            if not record.shared:
                self.books.book(record, started, CLIENT_GONE, "client_gone")
            raise
        finally:
            if not answering and not record.shared:
                serving.backends.leave()

    def request_id(self, headers: Mapping[str, str], decision_id: str) -> str:
        """The caller's id, or the decision's where there is none, where it is no plain token, or where it looks like
        what a label protects: it goes into the log and to the deployment."""
        given = request_id_of(headers, lambda: decision_id)
        return decision_id if given != decision_id and self.serving.scanner.scan((given,)) else given

    async def _complete(
        self, serving: Serving, headers: Mapping[str, str], body: bytes, record: Record, started: float
    ) -> Reply:
        policy, draw = serving.policy, draw_for(record.decision_id)
        caller = self.authenticate(headers)
        record.tenant, record.key = caller.tenant, caller.key_id
        chat = await parsed(body)
        record.stream = chat.stream
        facts, masked = await facts_of(serving, self.fleet, chat, len(body), caller, headers)
        permit = policy.permit(facts)
        affinity = None
        if self.fleet.balances:
            affinity = Affinity(draw, conversation_of(chat.body), facts.prompt.estimate)
        now = self.clock()
        asking = self.limiter.asking(caller, policy.limits, facts, record.decision_id)
        full = record.full = NONE_FULL if asking is None else asking.full
        snapshot = self.fleet.snapshot(now, draw, self.wall(), affinity, full)
        decision = record.decision = decide(policy, facts, snapshot)
        record.decided_ms = (self.clock() - started) * 1000
        record.facts, record.snapshot = _loggable(serving.scanner, facts), snapshot
        asked = Asked(serving, facts, permit, masked, record, started, draw, affinity, asking, now)
        if decision.caching is not None and self.answers is not None:
            use = await self._use(self.answers, asked, chat, decision, headers, len(body))
            if use is not None:
                return await self._shared(self.answers, asked, chat, decision, use)
        return await self._attempted(asked, chat)

    async def _shared(self, answers: Answers, asked: Asked, chat: ChatRequest, decision: Decision, use: Use) -> Reply:
        """An answer that may be another request's. Raises what `_attempted` does."""
        asking = asked.asking
        if asking is None:
            return await Sharing(answers).answer(self._seeker(asked, chat, decision, use))
        try:
            return await Sharing(answers).answer(self._seeker(asked, chat, decision, use))
        finally:
            if not asked.record.shared:  # else the call does
                asking.give_back()

    async def _attempted(self, asked: Asked, chat: ChatRequest) -> Reply:
        """The answer of the first candidate that gives one. Raises `GatewayError` where none does."""
        record, decision, now = asked.record, asked.record.decision, self.clock()
        if decision is None or now - asked.decided > STALE:  # it waited for an answer that others were to make
            decision = self._decided_anew(asked, now)
        self.fleet.decided(decision, now)
        while True:
            attempt = _next(decision, record.failed, asked.asking)
            deployment = asked.serving.policy.deployments[attempt.deployment]
            held = NOT_HELD if asked.asking is None else await _held(asked.asking, deployment, record)
            if held is None:  # a limit keeps the request from it, as the next decision sees
                decision = self._decided_anew(asked, now)
                continue
            try:
                call = call_of(asked, decision, deployment, chat, now, bounded=held.bounded)
                flight, answer, first = await opened(self.fleet, self.clock, asked, deployment, call)
            except Retryable as error:
                taken = held.booked(error)
                timed_out = isinstance(error, UpstreamTimeout)
                record.failed.append(Outcome(attempt, error.message, timed_out, taken.tokens, taken.nusd))
                await held.failed(error)  # after the record has it: the client may leave while the ledger is told
                now = self.clock()
                decision = self._decided_anew(asked, now)
                continue
            except BaseException as error:
                taken = held.given_up(error)
                record.given_up = Outcome(attempt, type(error).__name__, False, taken.tokens, taken.nusd)
                raise
            return self._respond(asked, attempt, deployment, held, flight, answer, first)

    def _decided_anew(self, asked: Asked, now: float) -> Decision:
        snapshot = self.fleet.snapshot(now, asked.draw, self.wall(), asked.affinity, asked.record.full)
        decision = asked.record.decision = decide(asked.serving.policy, asked.facts, snapshot)
        return decision

    async def _use(
        self,
        answers: Answers,
        asked: Asked,
        chat: ChatRequest,
        decision: Decision,
        headers: Mapping[str, str],
        size: int,
    ) -> Use | None:
        """How the request uses stored answers; a large one is read beside the event loop."""
        use = partial(answers.use, chat, asked.facts, asked.permit, decision, headers)
        return await asyncio.to_thread(use) if size > SCAN_IN_THREAD_ABOVE else use()

    def _seeker(self, asked: Asked, chat: ChatRequest, decision: Decision, use: Use) -> Seeker:
        record, started = asked.record, asked.started
        return Seeker(
            chat=chat,
            facts=asked.facts,
            permit=asked.permit,
            policy=asked.serving.policy,
            decision=decision,
            record=record,
            use=use,
            call=partial(self._called, asked),
            book=partial(self.books.book, record, started),
            refused=partial(self._refused, record),
            headers=partial(self._headers, record),
            freed=asked.serving.backends.leave,
            begin=partial(_begun, asked, decision),
            wait=partial(_waiting, asked),
            admit=partial(_admitted, asked),
            elapsed_ms=lambda: (self.clock() - started) * 1000,
        )

    async def _called(self, asked: Asked, chat: ChatRequest) -> Reply:
        """A call whose answer others wait for too: it books its record and leaves the backends itself, however it
        ends. Raises what `_attempted` does."""
        record, answering = asked.record, False
        try:
            reply = await self._attempted(asked, chat)
            answering = True
            return reply
        except GatewayError as error:
            self.books.book(record, asked.started, status_of(error), error.code)
            raise
        except asyncio.CancelledError:
            self.books.book(record, asked.started, CLIENT_GONE, "client_gone")
            raise
        finally:
            if not answering:
                asked.serving.backends.leave()
            if asked.asking is not None:
                asked.asking.give_back()

    def authenticate(self, headers: Mapping[str, str]) -> Caller:
        """Who asks. Without keys everyone who can reach the socket is one anonymous caller, which is why the server
        then binds to loopback. Raises `Unauthenticated`."""
        return ANONYMOUS if self.keyring is None else self.keyring.caller_of(headers, self.wall())

    def admit(self, headers: Mapping[str, str]) -> None:
        """Turn away whoever has no good key before any of the body is read. Raises `Unauthenticated`, and books it."""
        try:
            self.authenticate(headers)
        except Unauthenticated as error:
            decision_id = self.new_id()
            self.books.book(Record(self.request_id(headers, decision_id), decision_id), self.clock(), 401, error.code)
            raise

    def _respond(
        self,
        asked: Asked,
        attempt: Attempt,
        deployment: Deployment,
        held: Holding,
        flight: Flight,
        answer: Answer,
        first: Chunk,
    ) -> Reply:
        record, masked, started = asked.record, asked.masked, asked.started
        if masked is not None and asked.permit.passage(deployment.zone) == "masked":
            record.masked = len(masked.mask)
        record.deployment, record.zone, record.model = deployment.name, deployment.zone, deployment.model
        record.attempts = attempt.number + len(record.moved)
        if flight.member is not None:
            record.replica = flight.member.ordinal
        if record.stream:
            record.first_token_ms = (self.clock() - started) * 1000
        backends, bill = asked.serving.backends, deployment.bill
        opened = OpenAnswer(self.books, backends, record, started, deployment, flight, answer, first, held)
        cost = (
            bill.cost(first.usage)
            if bill is not None and first.usage is not None
            else likely_bill(deployment, asked.facts)
        )
        headers = self._headers(record)
        headers += [
            (b"x-hybridgate-deployment", deployment.name.encode()),
            (b"x-hybridgate-zone", deployment.zone.encode()),
            (b"x-hybridgate-attempts", b"%d" % record.attempts),
            (b"x-hybridgate-cache", b"off" if record.cache is None else b"miss"),
            *held.headers,
        ]
        if record.masked is not None:
            headers.append((b"x-hybridgate-masked", b"%d" % record.masked))
        if cost is not None:
            headers.append((b"x-hybridgate-cost-usd", usd(cost).encode()))
        record.dropped = answer.dropped
        if answer.dropped:
            headers.append((b"x-hybridgate-dropped", header_bytes(",".join(answer.dropped))))
        content_type = EVENT_STREAM if record.stream else b"application/json"
        return Reply(200, headers, opened, opened.close, content_type)

    def _refused(self, record: Record, error: GatewayError) -> Reply:
        headers = self._headers(record)
        if isinstance(error, Unauthenticated):
            headers.append(CHALLENGE)
        headers += error.headers
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after))))
        return Reply.whole(status_of(error), headers, Chunk(orjson.dumps(body_of(error)), last=True))

    def _headers(self, record: Record) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"x-request-id", record.request_id.encode()),
            (b"x-hybridgate-decision", record.decision_id.encode()),
        ]
        if record.decision is not None:
            rule = self.serving.rule_headers.get(record.decision.rule) or header_bytes(record.decision.rule)
            headers.append((b"x-hybridgate-rule", rule))
            headers.append((b"x-hybridgate-policy", record.decision.policy_hash.encode()))
        return headers

    async def route(self, headers: Mapping[str, str], body: bytes) -> tuple[Serving, RequestFacts, Snapshot, Decision]:
        """The decision for a request and what it was made from, without calling anything."""
        serving = self.serving
        chat = await parsed(body)
        facts, _ = await facts_of(serving, self.fleet, chat, len(body), self.authenticate(headers), headers)
        snapshot = self.fleet.snapshot(self.clock(), draw_for(self.new_id()), self.wall())
        return serving, facts, snapshot, decide(serving.policy, facts, snapshot)


async def _held(asking: Asking, deployment: Deployment, record: Record) -> Holding | None:
    """What an attempt sets aside, and in the record how long its request has waited for that."""
    try:
        return await asking.hold(deployment)
    finally:
        record.limits_ms = asking.waited_ms


def _begun(asked: Asked, decision: Decision) -> None:
    """Set aside what the first attempt takes, if it comes to one."""
    if asked.asking is not None and decision.candidates:
        asked.asking.begin(asked.serving.policy.deployments[decision.candidates[0].deployment])


async def _waiting(asked: Asked, spared: float) -> None:
    """Set aside what a request takes while it waits for another's answer, and leave so many seconds of those that it
    may wait for Redis to asking for that. Raises what a caller is told whose limits are used up."""
    if asked.asking is not None:
        await asked.asking.wait(spared)


async def _admitted(asked: Asked) -> Held | None:
    """What a request has set aside that makes no call. Raises as `_waiting` does."""
    asking = asked.asking
    if asking is None:
        return None
    try:
        return await asking.hold_alone()
    finally:
        asked.record.limits_ms = asking.waited_ms


def _next(decision: Decision, failed: Sequence[Outcome], asking: Asking | None) -> Attempt:
    """The next attempt. Raises what the caller is told where none is left: its own limits, if nothing but those and the
    deployments' is in the way."""
    try:
        return next_attempt(decision, failed)
    except GatewayError:
        if asking is not None and asking.error is not None and not failed:
            raise asking.error from None
        raise


def _loggable(scanner: Scanner, facts: RequestFacts) -> RequestFacts:
    """The facts without tags that look like what a label protects: the caller writes them, and the log keeps them."""
    return replace(facts, tags=frozenset()) if facts.tags and scanner.scan(sorted(facts.tags)) else facts


def draw_for(decision_id: str) -> float:
    """The decision's share of chance, 0 <= draw < 1, from its id, so that a replay draws the same."""
    return int(decision_id[:13], 16) / 16.0**13
