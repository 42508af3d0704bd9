"""Two policies over one trace: which requests go elsewhere, and what that costs.

Owns the comparison request by request. Both policies meet the same world, so a difference is the policies' doing; a
changed decision also changes what later requests find, and that is part of the difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateway.simulate.score import Score, quantile, score
from gateway.simulate.world import Record, Run, World
from gateway.types import usd

REFUSED = "(refused)"


@dataclass(frozen=True, slots=True)
class Move:
    """Requests that one policy sends here and the other there, and what that changes in cost."""

    before: str
    after: str
    requests: int
    cost_nusd: int


@dataclass(frozen=True, slots=True)
class Difference:
    """What changes from the first policy to the second. `predicted_ms` are medians of the forecasts for the first
    token, as each policy's first decision made them; None where no decision had one."""

    before: Score
    after: Score
    moves: tuple[Move, ...]
    rules: tuple[tuple[str, str, int], ...]
    predicted_ms: tuple[float | None, float | None]

    @property
    def moved(self) -> int:
        """How many requests end elsewhere."""
        return sum(move.requests for move in self.moves)


def difference(world: World, before: Run, after: Run) -> Difference:
    """What changes between two runs of one world."""
    counts: Counter[tuple[str, str]] = Counter()
    costs: Counter[tuple[str, str]] = Counter()
    rules: Counter[tuple[str, str]] = Counter()
    for old, new in zip(before.records, after.records, strict=True):
        ends = old.deployment or REFUSED, new.deployment or REFUSED
        if ends[0] != ends[1]:
            counts[ends] += 1
            costs[ends] += new.cost_nusd - old.cost_nusd
        if old.rule != new.rule:
            rules[old.rule, new.rule] += 1
    moves = tuple(Move(*ends, count, costs[ends]) for ends, count in counts.most_common())
    return Difference(
        before=score(world, before),
        after=score(world, after),
        moves=moves,
        rules=tuple((*ends, count) for ends, count in rules.most_common()),
        predicted_ms=(_predicted(before.records), _predicted(after.records)),
    )


def _predicted(records: Sequence[Record]) -> float | None:
    return quantile(sorted(r.predicted_ms for r in records if r.predicted_ms is not None), 0.5)


def document(found: Difference) -> dict[str, Any]:
    """The difference as a JSON object."""
    sides = [
        {
            "policy": own.router,
            "cost_usd": float(usd(own.cost_nusd)),
            "billed_usd": float(usd(own.billed_nusd)),
            "attainment": own.met,
            "local_share": own.local,
            "refused": own.refused,
            "privacy_violations": own.violations,
            "predicted_first_token_p50_ms": predicted,
            "first_token_p95_ms": {name: told.first_token_p95_ms for name, told in own.classes.items()},
        }
        for own, predicted in zip((found.before, found.after), found.predicted_ms, strict=True)
    ]
    return {
        "before": sides[0],
        "after": sides[1],
        "requests": found.before.requests,
        "moved": found.moved,
        "moves": [
            {"from": m.before, "to": m.after, "requests": m.requests, "cost_usd": m.cost_nusd / 1e9}
            for m in found.moves
        ],
        "rules": [{"from": before, "to": after, "requests": count} for before, after, count in found.rules],
    }
