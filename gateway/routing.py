"""The decision: which deployments may answer a request, in which order, and why the others may not. Pure.

Owns which rule decides, the ranking by `require`, `weights` and `order_by`, and the failover chain. The gates are in
gates.py, predictions in estimate.py, what an empty chain means for the caller in refusal.py. Refuses clocks, chance and
sockets: they come in with the snapshot.

The server, `policy explain`, `replay`, `simulate` and the tests call the same `decide`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf

from gateway.decision import Candidate, Decision, Miss, Rejection
from gateway.errors import UnknownModel
from gateway.estimate import (
    congestion_nusd,
    engine_seconds,
    first_token_ms,
    forecast_ms,
    likely_output,
    per_token_ms,
)
from gateway.gates import gate, static_gate
from gateway.policy import AUTO, TIMES, Asked, OrderBy, OrderTerm, Policy, Require, Rule, Slo
from gateway.refusal import refusal
from gateway.snapshot import Backlog, DeploymentStatus, Snapshot
from gateway.types import NUSD_PER_USD, Attempt, Deployment, Outcome, Patience, Permit, RequestFacts

HURRY = 1.5
"""So many times its 95th percentile is left for the next one when an engine's queue is left for it: 99 of 100 are in
time, where latencies vary as those of clouds do."""

LATER = 1.5
"""A class can still be met where its limit is so many times the forecast: who goes later is overtaken by others."""

UNMEASURED_MS = 500.0
"""Half of the time is left for a next one that was never measured, and no less than this: a class that is stricter is
not left for what may be no faster."""

LOOKS = 0.75
"""Where a first token was about to come and did not, the queue is looked at again with this share of the time left."""

LAST_LOOK = 1 / 3
"""The last look is where this share of what was left at the first one is left: half of the next one's 95th percentile,
which is its median where latencies vary as those of clouds do."""


def decide(policy: Policy, facts: RequestFacts, snapshot: Snapshot) -> Decision:
    """The ranked candidates for these facts now, each gate's rejections beside them. Raises `UnknownModel` where
    `facts.model` names nothing."""
    permit = policy.permit(facts)
    for rule in matching_rules(policy, facts, snapshot):
        if rule.protected == "skip" and not any(permit.passage(policy.deployments[n].zone) for n in rule.candidates):
            continue
        return _weigh(policy, rule, facts, permit, snapshot)
    return Decision("default", "every rule was skipped", (), (), facts.labels, policy.hash)


def matching_rules(policy: Policy, facts: RequestFacts, snapshot: Snapshot) -> Iterator[Rule]:
    """The rules to try, in order: those that match for `auto`; from a named rule on; or a rule of its own for a pinned
    deployment."""
    target = policy.models.get(facts.model, facts.model)
    if target in policy.deployments:
        because = "the request names this deployment"
        yield Rule(name=target, match=None, candidates=(target,), because=because, cache=policy.cache)
        return
    rules, start = policy.rules, 0
    if target != AUTO:
        names = [rule.name for rule in rules]
        if target == policy.default.name:
            start = len(rules)
        elif target in names:
            start = names.index(target) + 1
            yield rules[start - 1]
        else:
            raise UnknownModel(
                "the model is not known here: GET /v1/models lists those that are, `auto` among them", param="model"
            )
    for position in policy.shortlist.positions(facts, start):
        rule = rules[position]
        if rule.match is None or rule.match.matches(facts, policy.deployments, snapshot):
            yield rule
    yield policy.default


_NEW = tuple.__new__


@dataclass(slots=True)
class _Question:
    """What is asked of every candidate of a rule. `output` is how many tokens it will probably write, None where that
    differs from one to another."""

    facts: RequestFacts
    output: int | None
    now: float
    priority: int
    require: Require | None
    asked: tuple[Asked, ...]
    unknown_is_unmet: bool

    def predicted(self, deployment: Deployment, status: DeploymentStatus) -> Candidate:
        facts, now = self.facts, self.now
        prompt = facts.prompt.about(deployment.tokenizer)
        output = self.output if self.output is not None else likely_output(deployment, facts)
        price = deployment.price
        cost = None if price is None else price.of(prompt, output)
        first = first_token_ms(deployment, status, prompt, self.priority, now)
        each = per_token_ms(deployment, status, now)
        total = None if first is None or each is None else first + each * max(0, output // facts.n - 1)
        engine_s, congestion = None, 0
        backlog = status.backlog
        if backlog is not None and now <= backlog.good_until:
            engine_s = engine_seconds(backlog, prompt, output)
            congestion = congestion_nusd(status, backlog, self.priority, prompt, engine_s, now)
        misses = () if self.require is None else self._misses(self.require, cost, (first, total, each))
        # Past the function that takes the fields one by one, which costs as much again.
        return _NEW(
            Candidate, (deployment.name, cost, first, not misses, misses, congestion, total, each, engine_s, False)
        )

    def in_time(self, candidate: Candidate, by_ms: float) -> Candidate:
        """The candidate, judged as if its first token came when it is wanted."""
        assert self.require is not None
        first, total = candidate.first_token_ms, candidate.total_ms
        later = None if first is None or total is None else total - first + by_ms
        misses = self._misses(self.require, candidate.cost_nusd, (by_ms, later, candidate.per_token_ms))
        return candidate._replace(meets=not misses, misses=misses)

    def forecast_ms(self, deployment: Deployment, backlog: Backlog) -> float:
        """The forecast of its first token, without a margin."""
        return forecast_ms(backlog, self.facts.prompt.about(deployment.tokenizer), self.priority, self.now)

    def _misses(self, require: Require, cost: int | None, times: Sequence[float | None]) -> tuple[Miss, ...]:
        """What of the rule's requirement is predicted not to be met."""
        misses: tuple[Miss, ...] = ()
        cap = require.cost_at_most_nusd
        if cap is not None and (self.unknown_is_unmet if cost is None else cost > cap):
            misses = (Miss("cost", cost, "the rule", cap),)
        for which, who, limit in self.asked:
            time = times[which]
            if self.unknown_is_unmet if time is None else time > limit:
                misses += (_NEW(Miss, (TIMES[which], time, who, limit)),)
        return misses


def _weigh(policy: Policy, rule: Rule, facts: RequestFacts, permit: Permit, snapshot: Snapshot) -> Decision:
    candidates: list[Candidate] = []
    rejections: list[Rejection] = []
    require = rule.require
    name = facts.slo or rule.slo
    slo = policy.slo[name] if name is not None else None
    priority = policy.priority(name, permit)
    asked = () if require is None else slo.asks + require.asks if slo is not None and require.slo_met else require.asks
    output = None if facts.max_tokens is None else likely_output(policy.deployments[rule.candidates[0]], facts)
    question = _Question(facts, output, snapshot.now, priority, require, asked, rule.unknown == "ineligible")
    deployments, statuses = policy.deployments, snapshot.deployments
    for name in rule.candidates:
        deployment, status = deployments[name], statuses[name]
        rejection = gate(deployment, facts, permit, status)
        if rejection is None and snapshot.full:
            rejection = snapshot.full.get(name)
        if rejection is None:
            candidate = question.predicted(deployment, status)
            candidates.append(candidate if permit.allows(deployment.zone) else candidate._replace(masked=True))
        else:
            rejections.append(rejection)
    by_ms = _first_token_by_ms(require, slo)
    if require is not None and by_ms is not None and facts.stream and len(candidates) > 1:
        _let_queue(candidates, policy, question, snapshot, by_ms)
    late = by_ms is not None and _serve_later(candidates, policy, question, permit, snapshot, by_ms)
    if rule.match is not None and rule.match.does_not_fit:
        # Why a rule for long prompts matched belongs to why nothing else may answer.
        for name in sorted(rule.match.does_not_fit.difference(rule.candidates)):
            rejection = static_gate(policy.deployments[name], facts, permit)
            rejections += [rejection] if rejection is not None else []
    if require is not None and rule.otherwise == "reject":
        rejections += [Rejection(c.deployment, "require", c.note) for c in candidates if not c.meets]
        candidates = [candidate for candidate in candidates if candidate.meets]
    return Decision(
        rule.name,
        rule.because,
        _ranked(candidates, rule, facts, snapshot.draw),
        tuple(rejections),
        facts.labels,
        policy.hash,
        slo.name if slo is not None else None,
        rule.timeouts,
        question.priority,
        by_ms,
        rule.cache,
        late,
    )


def _let_queue(
    candidates: list[Candidate], policy: Policy, question: _Question, snapshot: Snapshot, by_ms: float
) -> None:
    """An engine whose first token may come too late meets the requirement all the same where it will probably come in
    time, and there is another candidate to leave its queue for (`patience`) where it does not."""
    late = [index for index, c in enumerate(candidates) if c.engine_s is not None and not c.meets]
    if not late:
        return
    ways_out = [c.first_token_ms for c in candidates if c.meets and c.engine_s is None and c.first_token_ms is not None]
    after_ms = by_ms - HURRY * min(ways_out, default=inf)
    if after_ms <= 0:
        return
    for index in late:
        candidate = candidates[index]
        backlog = snapshot.deployments[candidate.deployment].backlog
        if backlog is None:
            continue
        if question.forecast_ms(policy.deployments[candidate.deployment], backlog) <= after_ms:
            candidates[index] = question.in_time(candidate, by_ms)


def _serve_later(
    candidates: list[Candidate],
    policy: Policy,
    question: _Question,
    permit: Permit,
    snapshot: Snapshot,
    by_ms: float,
) -> bool:
    """Where nobody is in time, and the engine that is nearest to it would be late even by the forecast itself, the
    request is served there as one of the first class that can still be met: at its own place it would be late all the
    same, and those behind it because of it. Whether it is."""
    for candidate in candidates:
        if candidate.meets:
            return False
    soonest = inf
    for candidate in candidates:
        backlog = snapshot.deployments[candidate.deployment].backlog
        if candidate.engine_s is not None and backlog is not None:
            soonest = min(soonest, question.forecast_ms(policy.deployments[candidate.deployment], backlog))
    if not by_ms < soonest < inf:
        return False
    priority = policy.priority(policy.class_for(LATER * soonest), permit)
    if priority <= question.priority:
        return False
    question.priority = priority
    for index, candidate in enumerate(candidates):
        if candidate.engine_s is not None:
            name = candidate.deployment
            again = question.predicted(policy.deployments[name], snapshot.deployments[name])
            candidates[index] = again._replace(masked=candidate.masked)
    return True


def _first_token_by_ms(require: Require | None, slo: Slo | None) -> float | None:
    limit = slo.first_token_p95_ms if slo is not None else None
    own = require.first_token_at_most_ms if require is not None else None
    return limit if own is None else own if limit is None else min(limit, own)


def _ranked(candidates: list[Candidate], rule: Rule, facts: RequestFacts, draw: float) -> tuple[Candidate, ...]:
    """Those that meet the rule's requirement first, in its order; the rest as `otherwise` says. Ties keep the listed
    order. Where the rule has weights, the one that is drawn goes before all, if it meets the requirement."""
    if len(candidates) < 2:
        return tuple(candidates)
    meeting = [candidate for candidate in candidates if candidate.meets]
    failing = [candidate for candidate in candidates if not candidate.meets]
    if rule.order_by != "listed" and len(meeting) > 1:
        meeting.sort(key=_weighed(rule.order_weights) if rule.order_by == "weighted" else _ORDERS[rule.order_by])
    if rule.weights:
        drawn = _drawn(rule, facts, draw)
        meeting.sort(key=lambda candidate: candidate.deployment != drawn)
    if len(failing) > 1:
        failing.sort(key=_price if rule.otherwise == "cheapest" else _first_token)
    return (*meeting, *failing)


# What candidates are ordered by, the least first: nano-dollars or milliseconds. What is not known comes last.


def _price(candidate: Candidate) -> float:
    cost = candidate.cost_nusd
    return inf if cost is None else cost + candidate.congestion_nusd


def _first_token(candidate: Candidate) -> float:
    milliseconds = candidate.first_token_ms
    return inf if milliseconds is None else milliseconds


def _total(candidate: Candidate) -> float:
    milliseconds = candidate.total_ms
    return inf if milliseconds is None else milliseconds


_ORDERS: Mapping[OrderBy, Callable[[Candidate], float]] = {
    "marginal_cost": _price,
    "first_token": _first_token,
    "total_latency": _total,
}


def _weighed(weights: Mapping[OrderTerm, float]) -> Callable[[Candidate], float]:
    """The sum of terms in dollars and seconds, each times its weight."""
    return lambda candidate: sum([_term(candidate, term) * weight for term, weight in weights.items() if weight])


def _term(candidate: Candidate, term: OrderTerm) -> float:
    return _ORDERS[term](candidate) / (NUSD_PER_USD if term == "marginal_cost" else 1000)


def _drawn(rule: Rule, facts: RequestFacts, draw: float) -> str | None:
    """The candidate that the rule's weights give to this request: by the decision's own chance, or by the key's or the
    tenant's name, so that all of its requests draw the same under this rule."""
    if rule.sticky != "request":
        sticks = facts.tenant if rule.sticky == "tenant" else f"{facts.tenant}\0{facts.key_id}"
        digest = blake2b(f"{rule.name}\0{sticks}".encode(), digest_size=7).digest()
        draw = int.from_bytes(digest, "big") / 2.0**56
    point = draw * sum(rule.weights.values())
    drawn = None
    for name, weight in rule.weights.items():
        if weight > 0 and point >= 0:
            drawn = name
        point -= weight
    return drawn


def patience(decision: Decision, outcomes: Sequence[Outcome], passed_ms: float) -> Patience | None:
    """How long the next attempt may wait for its first token, `passed_ms` after the request came; None where no limit
    is stated, where it is no engine that orders its work, or where no other candidate would be in time."""
    by_ms = decision.first_token_by_ms
    if by_ms is None or len(decision.candidates) < 2:
        return None
    tried = {outcome.attempt.deployment for outcome in outcomes}
    left = [candidate for candidate in decision.candidates if candidate.deployment not in tried]
    if len(left) < 2 or left[0].engine_s is None:
        return None
    next_ms = left[1].first_token_ms
    needed_ms = max(UNMEASURED_MS, by_ms / 2) if next_ms is None else HURRY * next_ms
    after_ms = by_ms - passed_ms - needed_ms
    return Patience(after_ms / 1000, needed_ms / 1000, LAST_LOOK * needed_ms / 1000) if after_ms > 0 else None


def look_again(patience: Patience) -> Patience | None:
    """How long to wait on where the first token is about to come; None where it is too late to go elsewhere."""
    left_s = LOOKS * patience.left_s
    if left_s < patience.least_s:
        return None
    return Patience(patience.left_s - left_s, left_s, patience.least_s)


def next_attempt(decision: Decision, outcomes: Sequence[Outcome]) -> Attempt:
    """The next deployment of the chain that has not been tried. Raises what the caller is told when none is left."""
    tried = {outcome.attempt.deployment for outcome in outcomes}
    for candidate in decision.candidates:
        if candidate.deployment not in tried:
            return Attempt(candidate.deployment, len(outcomes) + 1)
    raise refusal(decision, outcomes)
