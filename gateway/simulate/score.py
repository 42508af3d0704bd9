"""What came of a run: money, latency classes met, engines used, and whether anything private left.

Owns the counting. Refuses to trust a decision: a request counts as sent where the world sent it, and whether it may go
there is asked of the invariants alone. What never ended, or ended twice, would be a defect of the world and is one
here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from gateway.simulate.bound import met_in_s
from gateway.simulate.world import Record, Run, World

NO_CLASS = "no class"


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One latency class: how many asked, the share that met it, and milliseconds to the first token, None where nobody
    was answered."""

    requests: int
    met: float
    first_token_p50_ms: float | None
    first_token_p95_ms: float | None


@dataclass(frozen=True, slots=True)
class Score:
    """One router's run, counted. Shares are of all requests; a refused request meets no class. `violations` are
    attempts outside of what the invariants allow. `used` is the share of the engines' seconds, from the first arrival
    to the last, in which they computed; `worth` the same at the engines' best rate, which small batches do not reach.
    `failovers` are attempts that another one followed."""

    router: str
    requests: int
    cost_nusd: int
    billed_nusd: int
    met: float
    classes: Mapping[str, ClassScore]
    local: float
    spilled: float
    used: float
    worth: float
    refused: int
    refusals: Mapping[str, int]
    failovers: int
    violations: int
    preempted: int
    by_deployment: Mapping[str, int]
    ended_s: float


def met(world: World, record: Record) -> bool:
    """Whether a request was answered as its latency class wants it."""
    slo = world.requests[record.index].facts.slo
    if record.status != 200:
        return False
    first_by, total_by = met_in_s(world.policy.slo[slo] if slo is not None else None)
    assert record.first_s is not None and record.total_s is not None
    return record.first_s <= first_by and record.total_s <= total_by


def score(world: World, run: Run) -> Score:
    """The counts of one run."""
    records = run.records
    count = len(records)
    answered = [record for record in records if record.status == 200]
    at_engines = [record for record in answered if record.deployment in world.fleet.engines]
    span = world.requests[-1].arrival_s - world.requests[0].arrival_s
    return Score(
        router=run.router,
        requests=count,
        cost_nusd=sum(record.cost_nusd for record in records),
        billed_nusd=sum(record.billed_nusd for record in records),
        met=sum(met(world, record) for record in records) / count,
        classes=_classes(world, records),
        local=len(at_engines) / count,
        spilled=(len(answered) - len(at_engines)) / count,
        used=_used(run, span),
        worth=_worth(world, at_engines, max(span, run.ended_s)),
        refused=count - len(answered),
        refusals=Counter(record.code for record in records if record.status != 200),
        failovers=sum(max(0, len(record.ran_on) - 1) for record in records),
        violations=_violations(world, records),
        preempted=run.preempted,
        by_deployment=Counter(str(record.deployment) for record in answered),
        ended_s=run.ended_s,
    )


def _classes(world: World, records: Sequence[Record]) -> dict[str, ClassScore]:
    by_class: dict[str, list[Record]] = {}
    for record in records:
        by_class.setdefault(world.requests[record.index].facts.slo or NO_CLASS, []).append(record)
    ordered = [*(name for name in world.policy.slo if name in by_class), *([NO_CLASS] if NO_CLASS in by_class else [])]
    return {name: _class(world, by_class[name]) for name in ordered}


def _class(world: World, records: Sequence[Record]) -> ClassScore:
    firsts = sorted(record.first_s * 1000 for record in records if record.first_s is not None)
    return ClassScore(
        requests=len(records),
        met=sum(met(world, record) for record in records) / len(records),
        first_token_p50_ms=quantile(firsts, 0.50),
        first_token_p95_ms=quantile(firsts, 0.95),
    )


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The least of the numbers, in ascending order, that a share `q` does not exceed; None where there are none."""
    return ordered[max(0, ceil(q * len(ordered)) - 1)] if ordered else None


def _used(run: Run, span: float) -> float:
    shares = [sample.busy for samples in run.samples.values() for sample in samples if sample.at <= span]
    return sum(shares) / len(shares) if shares else 0.0


def _worth(world: World, at_engines: Iterable[Record], seconds: float) -> float:
    if not world.fleet.engines or seconds <= 0:
        return 0.0
    least = 0.0
    for record in at_engines:
        request = world.requests[record.index]
        engine = world.fleet.engines[str(record.deployment)]
        least += engine.least_s(request.prompt_tokens, request.output_tokens)
    return least / seconds / len(world.fleet.engines)


def _violations(world: World, records: Sequence[Record]) -> int:
    """Attempts that went where the invariants do not let the request go, neither as it is nor masked."""
    count = 0
    for record in records:
        if not record.ran_on:
            continue
        permit = world.policy.permit(world.requests[record.index].facts)
        count += sum(permit.passage(world.policy.deployments[name].zone) is None for name in record.ran_on)
    return count
