"""Limits as both files write them: of keys and tenants in the key file, of deployments in the deployments file.

Owns the step from `limits:` to `Limits`, with the defaults of what counts while Redis is down. Refuses to know whose
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Discriminator, Tag, WithJsonSchema

from gateway.limits import Allowance, Counted, DeploymentLimits, Limits, OnDown
from gateway.policyfile.entries import MAPPING, Checked, Report, check
from gateway.policyfile.shapes import Shape
from gateway.policyfile.tree import Node
from gateway.policyfile.values import Tokens, Word
from gateway.policyfile.whenshapes import Zone
from gateway.types import NUSD_PER_USD

COUNTED: tuple[Counted, ...] = get_args(Counted)
_MOST_REQUESTS = 1_000_000_000
_MOST_NUSD = 9_000_000 * NUSD_PER_USD  # what the ledger can count
_NOT_ON_TIME: frozenset[str] = frozenset({"requests_per_minute", "tokens_per_minute", "concurrent_requests"})


def _requests(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MOST_REQUESTS:
        raise ValueError("must be a whole number of requests from 1, such as 100")
    return value


def _dollars(value: Any) -> int:
    """Nano-dollars of a number of dollars."""
    right = isinstance(value, int | float) and not isinstance(value, bool)
    nusd = round(value * NUSD_PER_USD) if right and 0 < value * NUSD_PER_USD <= _MOST_NUSD else 0
    if nusd < 1:
        raise ValueError("must be a number of US dollars above 0 without a unit, such as 20.00, at most 9000000")
    return nusd


Requests = Annotated[
    int, BeforeValidator(_requests), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": _MOST_REQUESTS})
]
Money = Annotated[
    int, BeforeValidator(_dollars), WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 9_000_000})
]


class OnRedisDownShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {name: f"Of {name}." for name in COUNTED}

    requests_per_minute: OnDown | None = None
    tokens_per_minute: OnDown | None = None
    concurrent_requests: OnDown | None = None
    tokens_per_day: OnDown | None = None
    usd_per_day: OnDown | None = None
    usd_per_month: OnDown | None = None


OnRedisDown = Annotated[
    Annotated[OnDown, Tag("[word]")] | Annotated[OnRedisDownShape, Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, dict | OnRedisDownShape) else "[word]"),
]


class LimitsShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "requests_per_minute": "Requests within any 60 seconds.",
        "tokens_per_minute": "Tokens of prompts and answers within any 60 seconds, such as 10k.",
        "concurrent_requests": "Requests at once, streams until their end.",
        "tokens_per_day": "Tokens of prompts and answers within a calendar day.",
        "usd_per_day": "US dollars within a calendar day, as billed.",
        "usd_per_month": "US dollars within a calendar month, as billed.",
        "budget": (
            "What is set aside of tokens and money before the answer is known. strict: the most that it can take, so "
            "that no limit is ever exceeded. expected: what it will probably take. Without it, expected."
        ),
        "time_zone": "Where days and months begin, such as Europe/Berlin; UTC without it.",
        "on_redis_down": (
            "What counts while Redis does not answer, for all limits here or by their names. local_share: each replica "
            "its share. closed: nothing. open: anything. Without it, closed for a strict budget and local_share else."
        ),
    }

    requests_per_minute: Requests | None = None
    tokens_per_minute: Tokens | None = None
    concurrent_requests: Requests | None = None
    tokens_per_day: Tokens | None = None
    usd_per_day: Money | None = None
    usd_per_month: Money | None = None
    budget: Literal["strict", "expected"] | None = None
    time_zone: Zone | None = None
    on_redis_down: OnRedisDown | None = None


class KeyLimitsShape(LimitsShape):
    meanings: ClassVar[Mapping[str, str]] = {
        **LimitsShape.meanings,
        "deployments": "The key's limits on single deployments, by their names.",
    }

    deployments: dict[Word, Any] | None = None


class DeploymentLimitsShape(LimitsShape):
    meanings: ClassVar[Mapping[str, str]] = {
        **LimitsShape.meanings,
        "each_key": "The limits of every single key on this deployment.",
    }

    each_key: Any = None


def key_limits(
    node: Node | None, subject: str, report: Report
) -> tuple[Checked[KeyLimitsShape] | None, Limits | None, Mapping[str, Limits]]:
    """What a key's `limits` say of all it asks for, and of single deployments. `node` is None where it has none."""
    if node is None:
        return None, None, {}
    entry = check(KeyLimitsShape, node, f"{subject}: limits", report)
    parts = node.children("deployments")
    single = {
        name: limits
        for name, part in parts.items()
        if (limits := plain_limits(part, f"{entry.subject}: deployments: {name}", report)) is not None
    }
    return entry, _stated(entry, report, whole=not parts), single


def deployment_limits(node: Node | None, subject: str, report: Report) -> DeploymentLimits | None:
    """What a deployment's `limits` say; None where it has none."""
    if node is None:
        return None
    entry = check(DeploymentLimitsShape, node, f"{subject}: limits", report)
    part = node.child("each_key")
    each = None if part is None else plain_limits(part, f"{entry.subject}: each_key", report)
    return DeploymentLimits(_stated(entry, report, whole=part is None), each)


def plain_limits(node: Node, subject: str, report: Report) -> Limits | None:
    """What a mapping of nothing but limits says."""
    return _stated(check(LimitsShape, node, subject, report), report, whole=True)


def _stated(entry: Checked[Any], report: Report, *, whole: bool) -> Limits | None:
    """The limits that an entry states. `whole`: it has to state some."""
    shape = entry.shape
    assert isinstance(shape, LimitsShape)
    named = [counted for counted in COUNTED if counted in entry.node.keys]
    if whole and entry.intact and not named:
        report(entry.problem(f"no limit is stated (known are {', '.join(COUNTED)})"))
        return None
    if isinstance(shape.on_redis_down, OnRedisDownShape):
        for name in sorted(shape.on_redis_down.model_fields_set.difference(named)):
            report(entry.problem(f'"on_redis_down" names "{name}", which has no limit here', "on_redis_down", name))
    days = {"tokens_per_day", "usd_per_day", "usd_per_month"}
    if entry.intact and "time_zone" in entry.node.keys and days.isdisjoint(named):
        report(entry.problem('"time_zone" has no use without a limit for days or months', "time_zone", key=True))
    if entry.intact and "budget" in entry.node.keys and not {*days, "tokens_per_minute"}.intersection(named):
        report(entry.problem('"budget" has no use without a limit on tokens or money', "budget", key=True))
    return limits_of(shape)


def limits_of(shape: LimitsShape) -> Limits | None:
    """The limits that a shape states; None where there are none."""
    strict = shape.budget == "strict"
    told = shape.on_redis_down
    by_name: Mapping[str, OnDown] = told.model_dump(exclude_none=True) if isinstance(told, OnRedisDownShape) else {}
    stated = shape.model_dump(exclude_none=True)
    allowances = []
    for counted in COUNTED:
        if counted in stated:
            usual: OnDown = "closed" if strict and counted not in _NOT_ON_TIME else "local_share"
            default = told if isinstance(told, str) else usual
            allowances.append(Allowance(counted, stated[counted], by_name.get(counted, default)))
    return Limits(tuple(allowances), strict, shape.time_zone or UTC) if allowances else None
