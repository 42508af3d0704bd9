"""What one attempt has set aside of the limits, and what is booked of it in the end.

Owns the rule of that:

- an answer whose tokens are known: those, and what they cost;
- an attempt that nobody got through to (it was refused at the door, the connection failed): nothing at all;
- one that the deployment refused itself (full, our credentials, the request is wrong, an error of its own): an attempt
  on the deployment, no tokens and no money, because none are billed for an error;
- one of which nobody knows what it took (it timed out, broke off, could not be read, the client left): as much as was
  set aside, and no less than was seen.

Refuses to set anything aside, to renew it, or to speak to a ledger: `admission.Limiter` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from gateway.errors import (
    ConnectFailed,
    EgressDenied,
    GatewayError,
    UpstreamErrored,
    UpstreamOverloaded,
    UpstreamRejected,
    UpstreamUnauthorized,
)
from gateway.ledger import SLACK, Hold, Reservation, Spent
from gateway.ratelimit import Header, ratelimit_headers
from gateway.terms import Terms, at_least, spent_on
from gateway.types import Deployment, RequestFacts, Usage

LEASE = 30.0  # seconds after which what a dead replica held open is free again
SENT_WITHIN = SLACK / 2  # seconds of what is set aside for a call; the rest is for its way


class Limiting(Protocol):
    """Whom an attempt tells that what it had set aside is over."""

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds of a monotonic clock."""

    def end(self, held: Held, spent: Spent | None) -> None:
        """Without `spent`, as if it had never been set aside. Nothing is waited for."""

    async def end_first(self, held: Held, spent: Spent | None) -> None:
        """The same, before anything else is set aside."""


class Holding(Protocol):
    """What one attempt has set aside. Ends once: the later ends of an attempt change nothing."""

    @property
    def bounded(self) -> bool:
        """Whether a strict budget holds only if the answer's length is bounded."""

    @property
    def headers(self) -> Sequence[Header]:
        """What the caller is told of its limits."""

    def settle(self, usage: Usage, *, known: bool) -> Spent | None:
        """The answer is over. `known`: the deployment said what it took; else `usage` is what was seen of it. What is
        booked; None where nothing limits."""

    def booked(self, error: GatewayError) -> Spent:
        """What is booked of an attempt that gave no answer; see the module."""

    async def failed(self, error: GatewayError) -> None:
        """The attempt gave no answer and another is made. Who leaves meanwhile leaves it booked all the same."""

    def given_up(self, error: BaseException) -> Spent:
        """The attempt gave no answer, and no other is made: because of the error, or because the client left. What is
        booked."""


class _NotHeld:
    """Of a request that nothing limits."""

    bounded = False
    headers: Sequence[Header] = ()

    def settle(self, usage: Usage, *, known: bool) -> None:
        return None

    def booked(self, error: GatewayError) -> Spent:
        return _NOTHING

    async def failed(self, error: GatewayError) -> None:
        return None

    def given_up(self, error: BaseException) -> Spent:
        return _NOTHING


_NOTHING = Spent(0, 0)
_ANSWERED = Spent(0, 0, attempt=False)
NOT_HELD = _NotHeld()


class Held:
    """Implements `Holding`."""

    __slots__ = ("_asked", "_ended", "_facts", "_limiter", "_terms", "deployment", "reservation")

    def __init__(
        self,
        limiter: Limiting,
        deployment: Deployment,
        terms: Terms,
        reservation: Reservation,
        facts: RequestFacts,
        asked: float,
    ) -> None:
        """`asked`: seconds of the clock, before which it was not set aside."""
        self._limiter = limiter
        self._asked = asked
        self._terms = terms
        self._facts = facts
        self._ended = False
        self.deployment = deployment
        self.reservation = reservation

    @property
    def bounded(self) -> bool:
        """See `Holding`."""
        return self._terms.bounded

    @property
    def headers(self) -> Sequence[Header]:
        """See `Holding`."""
        return self._headers(self._terms.own)

    @property
    def late(self) -> Sequence[Hold]:
        """What is counted too early for a call that is sent now: of limits a minute, where this process stood still."""
        if self._limiter.clock() - self._asked <= SENT_WITHIN:
            return ()
        return [hold for hold in self.reservation.holds if hold.limit.kind == "rolling"]

    @property
    def headers_alone(self) -> Sequence[Header]:
        """What the caller is told whose request makes no call: of the limits that it counts for."""
        return self._headers(self._terms.own_by_one)

    def _headers(self, own: Sequence[int]) -> Sequence[Header]:
        made = self.reservation
        if len(made.holds) != len(self._terms.all):  # not all are counted while the store does not answer
            names = {self._terms.all[i].account for i in own}
            own = [i for i, hold in enumerate(made.holds) if hold.limit.account in names]
        limits, used = [made.holds[i].limit for i in own], [made.used[i] for i in own]
        return ratelimit_headers(limits, used, made.until_ms - int(LEASE * 1000), {})

    def settle(self, usage: Usage, *, known: bool) -> Spent:
        """See `Holding`."""
        spent = spent_on(self.deployment, usage)
        if not known:
            spent = at_least(self.reservation.holds, spent)
        if not self._ended:
            self._ended = True
            self._limiter.end(self, spent)
        return spent

    def free(self, *, answered: bool) -> None:
        """The request got an answer without a call, which counts as one of its caller's and takes nothing else; or none
        at all, and then as if this had never been."""
        if not self._ended:
            self._ended = True
            self._limiter.end(self, _ANSWERED if answered else None)

    async def withdrawn(self) -> None:
        """As if this had never been, before anything else is set aside."""
        if not self._ended:
            self._ended = True
            await self._limiter.end_first(self, None)

    def booked(self, error: GatewayError) -> Spent:
        """See `Holding`."""
        return self._taken(error, request=False) or _NOTHING

    async def failed(self, error: GatewayError) -> None:
        """See `Holding`."""
        if not self._ended:
            self._ended = True
            await self._limiter.end_first(self, self._taken(error, request=False))

    def given_up(self, error: BaseException) -> Spent:
        """See `Holding`."""
        spent = self._taken(error, request=True)
        if not self._ended:
            self._ended = True
            self._limiter.end(self, spent)
        return spent or _NOTHING

    def _taken(self, error: BaseException, *, request: bool) -> Spent | None:
        """None: as if the attempt had never been."""
        if isinstance(error, _NOT_SENT):
            return None
        if isinstance(error, _NOT_BILLED):
            return Spent(0, 0, request=request)
        seen = spent_on(self.deployment, Usage(self._facts.prompt.about(self.deployment.tokenizer), 0))
        return at_least(self.reservation.holds, seen, request=request)


_NOT_SENT = (ConnectFailed, EgressDenied)
_NOT_BILLED = (UpstreamOverloaded, UpstreamUnauthorized, UpstreamRejected, UpstreamErrored)
