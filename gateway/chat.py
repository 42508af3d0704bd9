"""The request path of a chat completion, readable top to bottom: `complete`, then `open`; what is
opened is an `OpenAnswer` (answers.py).

Owns the order of things, the response headers, and that every attempt ends exactly once. Refuses HTTP (see edge.py),
policy (routing.py) and provider formats (backends/). Plain and streamed answers take the same path: one yields a chunk,
the other many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import orjson

from gateway.admission import NOT_HELD, Asking, Held, Holding, Limiter
from gateway.answers import CLIENT_GONE, Books, OpenAnswer
from gateway.backends import Backends
from gateway.backends.base import Answer, Call, Chunk
from gateway.balance import Affinity, conversation_of, leads_on
from gateway.caching import Answers, Use
from gateway.errors import (
    GatewayError,
    Retryable,
    Unauthenticated,
    UpstreamFailed,
    UpstreamLate,
    UpstreamTimeout,
    body_of,
    status_of,
)
from gateway.estimate import likely_bill
from gateway.facts import CHALLENGE, Stated, facts_from, request_id_of
from gateway.fleet import NONE_FULL, Fleet, Flight
from gateway.keys import Keyring
from gateway.labels import Scanner
from gateway.masking import Masked, Masker
from gateway.policy import Policy
from gateway.queueing import Queueing
from gateway.reply import EVENT_STREAM, Reply, header_bytes
from gateway.routing import decide, next_attempt, patience
from gateway.sharing import Seeker, Sharing
from gateway.store import TIMEOUT
from gateway.telemetry import Moved, Record
from gateway.tokens import TokenCounter, near, undecided
from gateway.tokens import count as count_tokens
from gateway.types import (
    Attempt,
    Caller,
    ChatRequest,
    Decision,
    Deployment,
    Outcome,
    Permit,
    Replica,
    RequestFacts,
    Snapshot,
    usd,
)
from gateway.wire.chat import parse

ANONYMOUS = Caller()
# Bytes above which work on a body would hold up other requests: parsing is the cheapest, a scan costs more, and text
# that is not ASCII must be folded before it is scanned, which costs most by far.
PARSE_IN_THREAD_ABOVE = 256 * 1024
SCAN_IN_THREAD_ABOVE = 64 * 1024
SCAN_IN_THREAD_ABOVE_UNICODE = 4 * 1024
MASK_IN_THREAD_ABOVE = 4 * 1024
STALE = 0.05  # seconds after which a decision is made anew before it is acted on


@dataclass(frozen=True)
class Serving:
    """A policy with what was built for it. Captured once a request, so that a change never reaches a request in
    flight."""

    policy: Policy
    scanner: Scanner
    counters: Mapping[str, TokenCounter]
    backends: Backends
    masker: Masker | None = field(init=False)
    rule_headers: Mapping[str, bytes] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "masker", Masker(self.scanner) if self.policy.masks else None)
        names = [rule.name for rule in self.policy.rules] + [self.policy.default.name, *self.policy.deployments]
        object.__setattr__(self, "rule_headers", {name: header_bytes(name) for name in names})


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
        chat = await self.parsed(body)
        record.stream = chat.stream
        facts, masked = await self.facts_of(serving, chat, len(body), caller, headers)
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
                if asking is not None and use.cache is self.answers.shared:
                    asking.waited(TIMEOUT)
                return await Sharing(self.answers).answer(self._seeker(asked, chat, decision, use))
        return await self._attempted(asked, chat)

    async def _attempted(self, asked: Asked, chat: ChatRequest) -> Reply:
        """The answer of the first candidate that gives one. Raises `GatewayError` where none does."""
        serving, record, facts, masked = asked.serving, asked.record, asked.facts, asked.masked
        policy, permit, decision, now = serving.policy, asked.permit, record.decision, self.clock()
        if decision is None or now - asked.decided > STALE:  # it waited for an answer that others were to make
            decision = self._decided_anew(asked, now)
        self.fleet.decided(decision, now)
        while True:
            attempt = _next(decision, record.failed, asked.asking)
            deployment = policy.deployments[attempt.deployment]
            held = NOT_HELD if asked.asking is None else await _held(asked.asking, deployment, record)
            if held is None:  # a limit keeps the request from it, as the next decision sees
                decision = self._decided_anew(asked, now)
                continue
            try:
                passed_ms = (now - asked.started) * 1000
                call = self._call(decision, deployment, chat, facts, record, masked, passed_ms, bounded=held.bounded)
                flight, answer, first = await self.open(
                    serving.backends, deployment, permit, call, facts, record, asked.affinity
                )
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
            if masked is not None and permit.passage(deployment.zone) == "masked":
                record.masked = len(masked.mask)
            return self._respond(
                serving, record, asked.started, attempt, deployment, facts, flight, answer, first, held
            )

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
            admit=partial(_admitted, asked.asking),
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

    async def parsed(self, body: bytes) -> ChatRequest:
        """The request; a large one is read beside the event loop. Raises `BadRequest`."""
        return await asyncio.to_thread(parse, body) if len(body) > PARSE_IN_THREAD_ABOVE else parse(body)

    async def facts_of(
        self, serving: Serving, chat: ChatRequest, size: int, caller: Caller, headers: Mapping[str, str]
    ) -> tuple[RequestFacts, Masked | None]:
        """What rules may look at, and the request's masked form where the policy allows one; `size` is the body's, in
        bytes. Raises `BadRequest` for a header that means nothing here, `UnknownModel`."""
        stated = Stated.of(serving.policy, chat, headers)
        large = size > SCAN_IN_THREAD_ABOVE or (
            size > SCAN_IN_THREAD_ABOVE_UNICODE and not all(map(str.isascii, chat.texts))
        )
        prompt = await asyncio.to_thread(count_tokens, chat) if size > PARSE_IN_THREAD_ABOVE else count_tokens(chat)
        scan = serving.scanner.scan
        kinds = await asyncio.to_thread(scan, chat.texts) if large else scan(chat.texts)
        masker = serving.masker if kinds else None
        masked = None
        if masker is not None:
            beside = size > MASK_IN_THREAD_ABOVE
            masked = await asyncio.to_thread(masker.masked, chat) if beside else masker.masked(chat)
        policy = serving.policy
        open_counts = undecided(prompt, chat.max_tokens, policy.deployments.values())
        if policy.thresholds:
            open_counts |= near(prompt, ((policy.deployments[name].tokenizer, n) for name, n in policy.thresholds))
        open_counts &= serving.counters.keys()
        if open_counts:
            counters = [(name, serving.counters[name].count) for name in sorted(open_counts)]
            exact = {n: await asyncio.to_thread(count, chat) if large else count(chat) for n, count in counters}
            prompt = replace(prompt, exact=exact)
        maskable = masked is not None
        likely = self.fleet.likely_output(caller.tenant, caller.key_id, chat.model)
        facts = facts_from(
            serving.policy, chat, caller, headers, stated, kinds, prompt, maskable=maskable, likely_output=likely
        )
        return facts, masked

    def _call(
        self,
        decision: Decision,
        deployment: Deployment,
        chat: ChatRequest,
        facts: RequestFacts,
        record: Record,
        masked: Masked | None,
        passed_ms: float,
        *,
        bounded: bool,
    ) -> Call:
        """What the attempt carries beyond the body. `bounded`: a strict budget wants the answer's length bounded. A
        deadline is only sent while another candidate could still meet it."""
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
            masked=masked,
            timeouts=deployment.timeouts.replaced(decision.timeouts),
            patience=patience(decision, record.failed, passed_ms) if chat.stream else None,
        )

    async def open(
        self,
        backends: Backends,
        deployment: Deployment,
        permit: Permit,
        call: Call,
        facts: RequestFacts,
        record: Record,
        affinity: Affinity | None,
    ) -> tuple[Flight, Answer, Chunk]:
        """Call the deployment, at one replica after the other where it has several, and wait for the first token; until
        then a failure costs nothing but time. Raises what `Backends.open` does."""
        limits = call.timeouts or deployment.timeouts
        by = asyncio.get_running_loop().time() + (limits.first_token if call.chat.stream else limits.total)
        tried: dict[Replica, GatewayError] = {}
        while True:
            flight = self.fleet.started(
                deployment.name,
                self.clock(),
                call.prompt_tokens,
                priority=call.priority,
                stream=call.chat.stream,
                asker=(facts.tenant, facts.key_id, facts.model),
                answers=facts.n,
                affinity=affinity,
                tried=tried,
            )
            member = flight.member
            if member is not None:
                call = replace(call, replica=member.replica)
            try:
                return await self._opened(backends, deployment, permit, call, flight, by)
            except Retryable as error:
                if member is None:
                    raise
                tried[member.replica] = error
                more = leads_on([*tried.values()]) and self.fleet.another(deployment.name, self.clock(), tried)
                if not more:
                    raise
                record.moved.append(Moved(deployment.name, member.ordinal, error.message))

    async def _opened(
        self, backends: Backends, deployment: Deployment, permit: Permit, call: Call, flight: Flight, by: float
    ) -> tuple[Flight, Answer, Chunk]:
        """The answer and its first chunk, which must come until the event loop's time `by`."""
        fleet = self.fleet
        answer: Answer | None = None
        queue: Queueing | None = None
        try:
            async with asyncio.timeout_at(by) as limit:
                if call.patience is not None:
                    queue = Queueing(fleet, self.clock, flight, call.patience, limit)
                try:
                    answer = await backends.open(deployment, permit, call)
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
                fleet.ended(flight, failure, self.clock())
            if answer is not None:
                await answer.close()
            if failure is None:
                raise
            raise failure from None
        if call.chat.stream:
            fleet.first_token(flight, self.clock())
        return flight, answer, first

    def _respond(
        self,
        serving: Serving,
        record: Record,
        started: float,
        attempt: Attempt,
        deployment: Deployment,
        facts: RequestFacts,
        flight: Flight,
        answer: Answer,
        first: Chunk,
        held: Holding,
    ) -> Reply:
        record.deployment, record.zone, record.model = deployment.name, deployment.zone, deployment.model
        record.attempts = attempt.number + len(record.moved)
        if flight.member is not None:
            record.replica = flight.member.ordinal
        if record.stream:
            record.first_token_ms = (self.clock() - started) * 1000
        opened = OpenAnswer(self.books, serving.backends, record, started, deployment, flight, answer, first, held)
        bill = deployment.bill
        cost = (
            bill.cost(first.usage) if bill is not None and first.usage is not None else likely_bill(deployment, facts)
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
        chat = await self.parsed(body)
        facts, _ = await self.facts_of(serving, chat, len(body), self.authenticate(headers), headers)
        snapshot = self.fleet.snapshot(self.clock(), draw_for(self.new_id()), self.wall())
        return serving, facts, snapshot, decide(serving.policy, facts, snapshot)


async def _held(asking: Asking, deployment: Deployment, record: Record) -> Holding | None:
    """What an attempt sets aside, and in the record how long its request has waited for that."""
    try:
        return await asking.hold(deployment)
    finally:
        record.limits_ms = asking.waited_ms


async def _admitted(asking: Asking | None) -> Held | None:
    """What a request sets aside that makes no call. Raises what a caller is told whose limits are used up."""
    return None if asking is None else await asking.hold_alone()


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


def draw_for(decision_id: str) -> float:
    """The decision's share of chance, 0 <= draw < 1, from its id, so that a replay draws the same."""
    return int(decision_id[:13], 16) / 16.0**13
