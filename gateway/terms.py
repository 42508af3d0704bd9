"""Which limits hold for one caller on one deployment, as the ledger counts them, and what a request takes of each.
Pure.

Owns accounts' names (ids of keys, names of tenants and deployments: nothing of a request, nothing of a secret), the
sentences about a limit, and the amounts: what is set aside before the answer is known, and what is booked where it
never is. Refuses to count.

Tokens set aside: the prompt's, as estimated or counted, and for each answer what few of this caller's answers of late
exceeded (19 of 20 did not), at most its `max_tokens`. With a strict budget: the most that the prompt can have, and the
most that the answers may.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Literal, NamedTuple

from gateway.estimate import most_cost
from gateway.ledger.base import MOST, Hold, Kind, Limit, Spent, Unit, days, months
from gateway.limits import Allowance, CallerLimits, Counted, DeploymentLimits, Limits
from gateway.types import Deployment, RequestFacts, Usage, usd

Scope = Literal["caller", "key_there", "deployment"]
CALENDAR: Mapping[Counted, Literal["day", "month"]] = {
    "tokens_per_day": "day",
    "usd_per_day": "day",
    "usd_per_month": "month",
}
BY_ONE: frozenset[Counted] = frozenset({"requests_per_minute", "concurrent_requests"})
MONEY: frozenset[Counted] = frozenset({"usd_per_day", "usd_per_month"})
_KINDS: Mapping[Counted, tuple[Kind, Unit, str]] = {
    "requests_per_minute": ("rolling", "requests", "requests/min"),
    "tokens_per_minute": ("rolling", "tokens", "tokens/min"),
    "concurrent_requests": ("slots", "slots", "concurrent"),
    "tokens_per_day": ("period", "tokens", "tokens/day"),
    "usd_per_day": ("period", "nusd", "usd/day"),
    "usd_per_month": ("period", "nusd", "usd/month"),
}
_PARTS: Mapping[Unit, tuple[str, str]] = {  # what counts, and what does of a strict budget
    "tokens": ("tokens", "most_tokens"),
    "nusd": ("nusd", "most_nusd"),
    "requests": ("one", "one"),
    "attempts": ("one", "one"),
    "slots": ("one", "one"),
}


class Term:
    """One limit. `subject` is whose it is, in words; `part` is the position of the amount that counts. Until `until`,
    seconds since 1970, `limit` stays the same."""

    __slots__ = ("_limit", "_zone", "account", "counted", "part", "scope", "strict", "subject", "until")

    def __init__(self, scope: Scope, subject: str, account: str, allowance: Allowance, of: Limits) -> None:
        kind, unit, what = _KINDS[allowance.counted]
        if unit == "requests" and scope != "caller":
            unit = "attempts"
        self.account = f"{account} {what}"
        self.scope = scope
        self.subject = subject
        self.counted = allowance.counted
        self.strict = of.strict and unit in ("tokens", "nusd")
        self._zone = of.time_zone
        self._limit = Limit(self.account, kind, unit, allowance.most, on_down=allowance.on_down)
        self.until = float("-inf") if kind == "period" else float("inf")
        self.part = Amounts._fields.index(_PARTS[unit][self.strict])

    def limit(self, now: float) -> Limit:
        """As the ledger counts it at `now`, seconds since 1970."""
        if now >= self.until:
            starts = (days if CALENDAR[self.counted] == "day" else months)(self._zone, now)
            self._limit = replace(self._limit, starts=starts)
            self.until = starts[2]
        return self._limit

    def sentence(self) -> str:
        """What the limit says."""
        most = self._limit.most
        if self.counted in MONEY:
            return f"{self.subject} may spend {usd(most)} USD a {CALENDAR[self.counted]}"
        if self.counted == "concurrent_requests":
            return f"{self.subject} may have {most} {'requests' if most > 1 else 'request'} open at once"
        what = "request" if self._limit.unit in ("requests", "attempts") else "token"
        return f"{self.subject} may use {most} {what}{'s' * (most > 1)} a {CALENDAR.get(self.counted, 'minute')}"

    def ends(self, now: float) -> str:
        """When its day or month ends, in the operator's time zone."""
        limit = self.limit(now)
        end = next((start for start in limit.starts if start > now), limit.starts[-1])
        return f"{datetime.fromtimestamp(end, self._zone):%Y-%m-%d %H:%M} {self._zone}"


def terms_of(
    key_id: str, tenant: str, caller: CallerLimits | None, deployment: str, there: DeploymentLimits | None
) -> Terms:
    """All limits of a caller's request to a deployment."""
    return Terms(list(_terms(key_id, tenant, caller or CallerLimits(), deployment, there or DeploymentLimits())))


def _terms(key_id: str, tenant: str, caller: CallerLimits, deployment: str, there: DeploymentLimits) -> Iterator[Term]:
    key, on = f"key:{key_id}", f"deployment:{deployment}"
    stated: Sequence[tuple[Scope, str, str, Limits | None]] = (
        ("caller", f"key {key_id}", key, caller.key),
        ("caller", f"tenant {tenant}", f"tenant:{tenant}", caller.tenant),
        ("key_there", f"key {key_id} on {deployment}", f"{key} {on}", caller.deployments.get(deployment)),
        ("key_there", f"each key on {deployment}", f"each {key} {on}", there.each_key),
        ("deployment", f"deployment {deployment}", on, there.all),
    )
    for scope, subject, account, limits in stated:
        if limits is not None:
            for allowance in limits.allowances:
                yield Term(scope, subject, account, allowance, limits)


class Amounts(NamedTuple):
    """Of one request on one deployment: tokens and nano-dollars that it will probably take, and the most that it can;
    and `one`, of what is counted by the request. Money is 0 where nobody knows the price, and what no term asks for is
    0 as well. (A tuple, because a term takes its part by position.)"""

    tokens: int = 0
    most_tokens: int = 0
    nusd: int = 0
    most_nusd: int = 0
    one: int = 1


NO_AMOUNTS = Amounts()


class Terms:
    """All limits of one caller on one deployment, worked out once. `own` and `there` are positions: of the caller's
    limits, of the deployment's; `own_by_one` of those of the caller's that count requests. `bounded`: some budget is
    strict. `by_one`: those of them alone that count requests; None where there are none."""

    __slots__ = (
        "_counted",
        "_holds",
        "_until",
        "all",
        "bounded",
        "by_one",
        "needs_price",
        "own",
        "own_by_one",
        "there",
        "wants",
    )

    def __init__(self, terms: Sequence[Term]) -> None:
        self.all = tuple(terms)
        self.own = [i for i, term in enumerate(terms) if term.scope == "caller"]
        self.own_by_one = [i for i in self.own if terms[i].counted in BY_ONE]
        self.there = [i for i, term in enumerate(terms) if term.scope == "deployment"]
        self.bounded = any(term.strict for term in terms)
        self.needs_price = any(term.strict and term.counted in MONEY for term in terms)
        self.wants = frozenset(Amounts._fields[term.part] for term in terms if term.counted not in BY_ONE)
        by_one = [term for term in terms if term.counted in BY_ONE]
        self.by_one: Terms | None = (self if len(by_one) == len(terms) else Terms(by_one)) if by_one else None
        self._holds: list[Hold] = []  # those of what is counted by the request are right as they are
        self._counted: list[tuple[int, Limit, int]] = []  # the others: position, limit, part
        self._until = float("-inf")

    def holds(self, amounts: Amounts, now: float) -> list[Hold]:
        """What a request takes of each, in the same order, at `now` (seconds since 1970)."""
        if now >= self._until:
            self._holds = [Hold(term.limit(now), 1) for term in self.all]
            counted = enumerate(zip(self.all, self._holds, strict=True))
            self._counted = [(i, hold.limit, term.part) for i, (term, hold) in counted if term.counted not in BY_ONE]
            self._until = min(term.until for term in self.all)
        holds = self._holds.copy()
        for position, limit, part in self._counted:
            holds[position] = Hold(limit, amounts[part])
        return holds

    def amounts(self, facts: RequestFacts, deployment: Deployment, long_output: int | None) -> Amounts:
        """`long_output`: tokens that few of the caller's answers exceed; None where nobody knows."""
        wants = self.wants
        tokens = most_tokens = nusd = most_nusd = 0
        most_output = deployment.output_tokens(facts.max_tokens)
        bill = deployment.bill
        if "tokens" in wants or "nusd" in wants:
            output = facts.n * (most_output if long_output is None else min(long_output, most_output))
            prompt = facts.prompt.about(deployment.tokenizer)
            tokens = prompt + output
            if bill is not None and "nusd" in wants:
                nusd = bill.of(prompt, output)
        if self.bounded:
            most_tokens = (deployment.most_prompt_tokens(facts.prompt) or 0) + facts.n * most_output
            most_nusd = most_cost(deployment, facts) or 0
        if tokens > MOST or most_tokens > MOST or nusd > MOST or most_nusd > MOST:
            # Where no window is known any number may be asked for; what is counted ends at MOST, above every limit.
            return Amounts(min(tokens, MOST), min(most_tokens, MOST), min(nusd, MOST), min(most_nusd, MOST))
        return Amounts(tokens, most_tokens, nusd, most_nusd)


def spent_on(deployment: Deployment, usage: Usage) -> Spent:
    """What an answer took whose tokens are known."""
    bill = deployment.bill
    return Spent(usage.prompt_tokens + usage.completion_tokens, 0 if bill is None else bill.cost(usage))


def at_least(holds: Sequence[Hold], spent: Spent, *, request: bool = True) -> Spent:
    """What is booked of an attempt of which nobody knows what it took: as much as was set aside, the most of any limit,
    and no less than was seen (`spent`). So all limits and the records hold the same."""
    tokens = max((hold.amount for hold in holds if hold.limit.unit == "tokens"), default=0)
    nusd = max((hold.amount for hold in holds if hold.limit.unit == "nusd"), default=0)
    return Spent(max(tokens, spent.tokens), max(nusd, spent.nusd), request=request)
