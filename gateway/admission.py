"""Whether a request may be sent: its limits, set aside all or none before each attempt and ended exactly once after it.

Owns the order of that, and what a refusal means for whom: a caller's own limits refuse it (429, 402, 400); a
deployment's make it ineligible, and so do the caller's on tokens and money where another deployment may take less of
them: the next decision sees that, and goes on. Refuses to decide where a request goes, and what is booked of an attempt
(`held.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import NamedTuple, Protocol

from gateway.decision import Rejection
from gateway.errors import BudgetSpent, GatewayError, LimitsUnavailable, NeverFits, RateLimited
from gateway.held import LEASE, NOT_HELD, SENT_WITHIN, Held, Holding
from gateway.ledger import Counting, Hold, LedgerUnavailable, Refused, Reservation, Spent
from gateway.limits import DeploymentLimits
from gateway.ratelimit import ratelimit_headers
from gateway.terms import BY_ONE, CALENDAR, MONEY, NO_AMOUNTS, Term, Terms, terms_of
from gateway.types import Caller, Deployment, RequestFacts, usd

PATIENCE = 0.1  # seconds that one request waits for a ledger, all its attempts together
RENEW_EVERY = 10.0
RENEW_TOGETHER = 32  # so few that requests need not wait until thousands are renewed, nor these for each other in vain
NOWHERE = Deployment("", "openai", "", "")  # where a request goes that makes no call
KNOWN_FULL = 0.25  # seconds for which a deployment is taken to be full once its limit was seen to be used up
LONGEST_KNOWN_FULL = 1.0


class Lengths(Protocol):
    """What is known of how long a caller's answers are."""

    def long_output(self, tenant: str, key_id: str, model: str) -> int | None: ...


@dataclass(slots=True)
class _Known:
    """The terms of a caller on a deployment, as long as both are what they were."""

    caller: Caller
    there: DeploymentLimits | None
    terms: Terms


class Limiter:
    """The limits of all callers and deployments, over one ledger. Invariant: each `Held` that it gives ends once, and
    lasts until then."""

    def __init__(
        self,
        ledger: Counting,
        lengths: Lengths,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        """`clock`: seconds of a monotonic clock; `wall`: seconds since 1970."""
        self.ledger = ledger
        self.clock = clock
        self._lengths = lengths
        self.wall = wall
        self._known: dict[tuple[str, str], _Known] = {}
        self._full: dict[str, tuple[Rejection, float]] = {}
        self._open: dict[str, Held] = {}

    def asking(
        self, caller: Caller, limits: Mapping[str, DeploymentLimits], facts: RequestFacts, decision_id: str
    ) -> Asking | None:
        """A request before its first attempt; None where nothing limits it. `limits` are the policy's."""
        if caller.limits is None and not limits:
            return None
        return Asking(self, caller, limits, facts, decision_id)

    def terms(self, caller: Caller, deployment: str, there: DeploymentLimits | None) -> Terms:
        """All limits of a caller's request to a deployment."""
        key = caller.key_id, deployment
        known = self._known.get(key)
        if known is None or known.caller is not caller or known.there is not there:
            terms = terms_of(caller.key_id, caller.tenant, caller.limits, deployment, there)
            known = self._known[key] = _Known(caller, there, terms)
        return known.terms

    def full(self) -> dict[str, Rejection]:
        """The deployments whose own limits were just seen to be used up."""
        if not self._full:
            return {}
        now = self.clock()
        self._full = {name: known for name, known in self._full.items() if known[1] > now}
        return {name: known[0] for name, known in self._full.items()}

    def seen_full(self, rejection: Rejection, seconds: float) -> None:
        """A deployment's limit is used up, for so long at least."""
        self._full[rejection.deployment] = rejection, self.clock() + min(seconds, LONGEST_KNOWN_FULL)

    def long_output(self, facts: RequestFacts) -> int | None:
        """Tokens that few of the caller's answers exceed; None where nobody knows."""
        return self._lengths.long_output(facts.tenant, facts.key_id, facts.model)

    def holding(self, held: Held) -> None:
        """Let it last until it is ended."""
        self._open[held.reservation.id] = held

    def end(self, held: Held, spent: Spent | None) -> None:
        """End what was set aside; without `spent`, as if it had never been. Nothing is waited for."""
        self._ended(held)
        self.ledger.end(held.reservation, spent, self.wall())

    async def end_first(self, held: Held, spent: Spent | None) -> None:
        """The same, before anything else is set aside."""
        self._ended(held)
        try:
            if spent is None:
                await self.ledger.release(held.reservation, self.wall())
            else:
                await self.ledger.settle(held.reservation, spent, self.wall())
        except asyncio.CancelledError:  # the client has left; an end that is told twice counts once
            self.ledger.end(held.reservation, spent, self.wall())
            raise

    def _ended(self, held: Held) -> None:
        self._open.pop(held.reservation.id, None)
        if self._full:
            self._full.pop(held.deployment.name, None)

    async def renew(self) -> None:
        """Renew what is open, for ever."""
        while True:
            await asyncio.sleep(RENEW_EVERY)
            await self.renew_now()

    async def renew_now(self) -> None:
        """Let what is open last for another `LEASE`."""
        several = iter([*self._open.values()])
        while batch := [held.reservation for held in islice(several, RENEW_TOGETHER)]:
            now = self.wall()
            renewed = (self.ledger.renew(reservation, LEASE, now) for reservation in batch)
            for told in await asyncio.gather(*renewed, return_exceptions=True):
                if isinstance(told, BaseException) and not isinstance(told, LedgerUnavailable):
                    raise told

    @property
    def open(self) -> Collection[Held]:
        """What is set aside now and has not ended."""
        return self._open.values()

    async def close(self) -> None:
        """Tell the ledger what it is still to be told."""
        await self.ledger.close()


class _Kept(NamedTuple):
    """What a request has set aside before it knows whether it makes a call: for an attempt at a deployment, or for none
    (`NOWHERE`). `held` is None where nothing is; `error` is what `hold` raised."""

    deployment: str
    held: Holding | None
    error: GatewayError | None = None


class Asking:
    """One request's attempts, as far as limits go. `full`: the deployments that its limits or theirs keep it from, for
    the next decision. `error`: what the caller is told where nothing is left because of its own limits.

    A request that may get an answer without a call asks for both at once: `begin` sets aside what its first attempt
    takes, and `hold` (there is a call) or `hold_alone` (there is none) goes on with that. While it waits for somebody
    else's answer it has a request open, and nothing more (`wait`). Invariant: what is set aside is held by whoever was
    given it, or by this, until `give_back`.
    """

    __slots__ = (
        "_beginning",
        "_caller",
        "_facts",
        "_id",
        "_kept",
        "_limiter",
        "_limits",
        "_number",
        "_patience",
        "_waited",
        "error",
        "full",
    )

    def __init__(
        self,
        limiter: Limiter,
        caller: Caller,
        limits: Mapping[str, DeploymentLimits],
        facts: RequestFacts,
        decision_id: str,
    ) -> None:
        self._limiter = limiter
        self._caller = caller
        self._limits = limits
        self._facts = facts
        self._id = decision_id
        self._number = 0
        self._patience = PATIENCE
        self._waited = 0.0
        self._beginning: asyncio.Task[None] | None = None
        self._kept: _Kept | None = None
        self.full = limiter.full()
        self.error: GatewayError | None = None

    def hold(self, deployment: Deployment) -> Awaitable[Holding | None]:
        """Set aside what an attempt takes of all limits; None where one of them keeps the request from this deployment,
        which `full` then tells. Raises what a caller is told whose limits are used up wherever it goes."""
        if self._beginning is None and self._kept is None:
            return self._for_a_call(deployment)
        return self._gone_on(deployment)

    async def _gone_on(self, deployment: Deployment) -> Holding | None:
        kept = await self._taken()
        if kept is not None and kept.deployment == deployment.name:
            if kept.error is not None:
                raise kept.error
            if not isinstance(kept.held, Held) or not kept.held.late:
                return kept.held
        await _withdrawn(kept)
        return await self._for_a_call(deployment)

    async def _for_a_call(self, deployment: Deployment) -> Holding | None:
        """Set aside for a call that is sent now: once more where this process stood still meanwhile, and if it did so
        again, no call is sent but by `open` limits."""
        held = await self._set_aside(deployment)
        if isinstance(held, Held) and held.late:
            await held.withdrawn()
            held = await self._set_aside(deployment)
            if isinstance(held, Held) and any(hold.limit.on_down != "open" for hold in held.late):
                await held.withdrawn()
                raise LimitsUnavailable("this gateway is too busy to keep its limits now: try again", retry_after=1.0)
        return held

    async def _set_aside(self, deployment: Deployment) -> Holding | None:
        name, limiter = deployment.name, self._limiter
        terms = limiter.terms(self._caller, name, self._limits.get(name))
        if not terms.all:
            return NOT_HELD
        if terms.needs_price and deployment.bill is None:
            self.full[name] = Rejection(name, "limit", "a strict budget is to be kept, and its price is not known")
            return None
        if terms.bounded and deployment.most_prompt_tokens(self._facts.prompt) is None:
            reason = "a strict budget is to be kept, and neither its window nor how long this prompt is are known"
            self.full[name] = Rejection(name, "limit", reason)
            return None
        return await self._held(deployment, terms)

    async def hold_alone(self) -> Held | None:
        """Set aside what a request takes that gets an answer without a call of its own: one of the caller's requests a
        minute, and one of those that it may have open at once; no tokens and no money. None where neither is limited.
        Raises as `hold` does."""
        if self._beginning is not None or self._kept is not None:
            kept = await self._taken()
            if kept is not None:
                if kept.error is not None:
                    raise kept.error
                if kept.held is not None:
                    return kept.held if isinstance(kept.held, Held) else None
        terms = self._limiter.terms(self._caller, NOWHERE.name, None).by_one
        return None if terms is None else await self._held(NOWHERE, terms)

    def begin(self, deployment: Deployment) -> None:
        """Set aside what an attempt takes, beside whatever is waited for next."""
        self._beginning = asyncio.create_task(self._begun(deployment))

    async def _begun(self, deployment: Deployment) -> None:
        kept, self._kept = self._kept, None
        await _withdrawn(kept)
        try:
            self._kept = _Kept(deployment.name, await self._set_aside(deployment))
        except GatewayError as error:
            self._kept = _Kept(deployment.name, None, error)

    async def wait(self, spared: float) -> None:
        """Somebody else makes the answer: until it is there no more is set aside than a request takes without a call.
        `spared`: seconds of those that the request may wait for the ledger, which asking for the answer may take.
        Raises as `hold` does."""
        self._patience -= spared
        kept = await self._taken()
        if kept is None or kept.deployment != NOWHERE.name:
            if kept is not None and kept.error is not None:
                raise kept.error
            await _withdrawn(kept)
            kept = _Kept(NOWHERE.name, await self.hold_alone())
        self._kept = kept

    def give_back(self) -> None:
        """The request is over: what it has set aside and nobody was given is as if it had never been. Nothing is waited
        for; what is being set aside is undone by the ledger."""
        if self._beginning is not None:
            self._beginning.cancel()
            self._beginning = None
        kept, self._kept = self._kept, None
        if kept is not None and isinstance(kept.held, Held):
            kept.held.free(answered=False)

    async def _taken(self) -> _Kept | None:
        """What is set aside by now, for whoever asks: whoever leaves while it is being set aside takes nothing."""
        if self._beginning is not None:
            await self._beginning
            self._beginning = None
        kept, self._kept = self._kept, None
        return kept

    @property
    def waited_ms(self) -> float:
        """Milliseconds that the request has waited so far for the ledger."""
        return self._waited * 1000

    async def _held(self, deployment: Deployment, terms: Terms) -> Held | None:
        limiter, facts, now = self._limiter, self._facts, self._limiter.wall()
        amounts = terms.amounts(facts, deployment, limiter.long_output(facts)) if terms.wants else NO_AMOUNTS
        holds = terms.holds(amounts, now)
        self._number += 1
        began = limiter.clock()
        made = await limiter.ledger.reserve(f"{self._id}.{self._number}", holds, LEASE, now, self._patience)
        took = limiter.clock() - began
        self._waited += took
        if took <= SENT_WITHIN:  # else it was not the ledger that it waited for
            self._patience -= took
        if isinstance(made, Refused):
            self._refused(deployment.name, terms, holds, made, now)
            return None
        held = Held(limiter, deployment, terms, made, facts, began)
        limiter.holding(held)
        if terms.there:
            self._look_for_full(deployment.name, terms, made)
        return held

    def _look_for_full(self, name: str, terms: Terms, made: Reservation) -> None:
        """What is used up now, the next decision is to know."""
        for position in terms.there:
            term = terms.all[position]
            for hold, taken in zip(made.holds, made.used, strict=True):
                if hold.limit.account == term.account and taken >= hold.limit.most:
                    self._limiter.seen_full(_full(name, term, 1.0), KNOWN_FULL)

    def _refused(self, name: str, terms: Terms, holds: Sequence[Hold], told: Refused, now: float) -> None:
        """Lets the next decision go on without the deployment. Raises where that would not help."""
        position = next(i for i, hold in enumerate(holds) if hold.limit.account == told.hold.limit.account)
        term, hold = terms.all[position], holds[position]
        wait = 1.0 if told.wait_ms is None else told.wait_ms / 1000
        if term.scope == "deployment":
            self.full[name] = rejection = _full(name, term, wait)
            taken = told.used[position]
            if taken is None or taken >= hold.limit.most:  # nobody else fits either
                self._limiter.seen_full(rejection, min(wait, KNOWN_FULL))
            return
        self.error = _error(term, hold, told, position, now)
        waits = {} if told.wait_ms is None else {term.account: told.wait_ms}
        limits, used = [holds[i].limit for i in terms.own], [told.used[i] for i in terms.own]
        self.error.headers = ratelimit_headers(limits, used, int(now * 1000), waits)
        if term.scope == "caller" and term.counted in BY_ONE:
            raise self.error
        self.full[name] = Rejection(name, "limit", self.error.message, wait)


async def _withdrawn(kept: _Kept | None) -> None:
    if kept is not None and isinstance(kept.held, Held):
        await kept.held.withdrawn()


def _full(name: str, term: Term, wait: float) -> Rejection:
    return Rejection(name, "limit", f"{term.sentence()}, and not enough of it is left", wait)


def _error(term: Term, hold: Hold, told: Refused, position: int, now: float) -> GatewayError:
    """What the caller is told whose limit it is."""
    sentence = term.sentence()
    needs = f"{usd(hold.amount)} USD" if term.counted in MONEY else f"{hold.amount} tokens"
    if told.unchecked:
        return LimitsUnavailable(f"{sentence}, and that cannot be checked now: try again", retry_after=1.0)
    if told.wait_ms is None:
        return NeverFits(f"{sentence}, and this request alone may take {needs}: ask for less, such as by max_tokens")
    taken = told.used[position] or 0
    wait = ceil(told.wait_ms / 1000)
    if term.counted in MONEY:
        return BudgetSpent(
            f"{sentence}; {usd(taken)} USD of it are spent or set aside, and this request needs {needs}: "
            f"it begins anew at {term.ends(now)}",
            retry_after=wait,
        )
    until = f"it begins anew at {term.ends(now)}" if term.counted in CALENDAR else f"try again in {wait} s"
    taking = "" if term.counted in BY_ONE else f"; {taken} of them are taken, and this request needs {needs}"
    return RateLimited(f"{sentence}{taking}: {until}", retry_after=wait)
