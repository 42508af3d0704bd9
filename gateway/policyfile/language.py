"""The shapes of the policy file: labels, patterns, invariants, SLO classes and rules, each value by itself.

Owns the keys, and the syntax of what only a policy has: days, times of day, time zones, ranges, weights. Refuses
references, as `shapes` does. Time zones are read from the IANA's database as Python finds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, InstanceOf, Tag, WithJsonSchema

from gateway.policy import Otherwise, Protected, Sticky, Unknown
from gateway.policyfile.entries import MAPPING
from gateway.policyfile.nearness import NotAmong
from gateway.policyfile.shapes import Shape, TimeoutsShape
from gateway.policyfile.values import (
    HeaderName,
    HeaderValues,
    Label,
    Nusd,
    OrAlone,
    Seconds,
    Sentence,
    Text,
    Title,
    Tokens,
    Version,
    Word,
    Words,
    between,
    like,
)
from gateway.ranges import WEEKDAYS
from gateway.types import CacheScope

_DAYS = re.compile(rf"({'|'.join(WEEKDAYS)})(?:-({'|'.join(WEEKDAYS)}))?")
_CLOCK = re.compile(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00")
_GLOB = re.compile(r"[!-~]{1,128}")
_MOST_WEIGHT = 1_000_000
_OF_THE_MACHINE = ("localtime", "posix", "right/")  # names for what a machine has set, and other counts of seconds


def _days(value: Any) -> tuple[int, ...]:
    """Days of the week of `mon` or `fri-sun`, 0 for Monday; a span may go on past Sunday."""
    found = _DAYS.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"must be a day or a span of days, such as mon-fri; days are {', '.join(WEEKDAYS)}")
    first = WEEKDAYS.index(found[1])
    last = WEEKDAYS.index(found[2]) if found[2] else first
    return tuple((first + day) % 7 for day in range((last - first) % 7 + 1))


def _minute(value: Any) -> int:
    """Minutes since midnight of `08:30`; `24:00` is the end of the day."""
    if not isinstance(value, str) or not _CLOCK.fullmatch(value):
        raise ValueError('must be a time of day from "00:00" to "24:00", in quotes')
    return 60 * int(value[:2]) + int(value[3:])


def _zone(value: Any) -> ZoneInfo:
    if isinstance(value, str) and not value.startswith(_OF_THE_MACHINE):
        try:
            return ZoneInfo(value)
        except (KeyError, ValueError, OSError):  # OSError: a folder of zones
            pass
    raise NotAmong("must be a time zone, such as Europe/Berlin or UTC", _zones)


@lru_cache(maxsize=1)  # they are looked up on the disk
def _zones() -> tuple[str, ...]:
    return tuple([zone for zone in available_timezones() if not zone.startswith(_OF_THE_MACHINE)])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(value: Any) -> float:
    if not _is_number(value) or not 0 < value <= 1:
        raise ValueError("must be a share of the capacity above 0 and at most 1, such as 0.8")
    return float(value)


def _weight(value: Any) -> float:
    if not _is_number(value) or not 0 <= value <= _MOST_WEIGHT:
        raise ValueError(f"must be a number from 0 to {_MOST_WEIGHT}")
    return float(value)


def _glob(value: Any) -> str:
    if not isinstance(value, str) or not _GLOB.fullmatch(value):
        raise ValueError("must be a name or a pattern such as gpt-4*, of printable ASCII characters without spaces")
    return value


Days = Annotated[list[Annotated[tuple[int, ...], BeforeValidator(_days), like(_DAYS)]], Field(min_length=1), OrAlone()]
Clock = Annotated[int, BeforeValidator(_minute), like(_CLOCK)]
Zone = Annotated[InstanceOf[ZoneInfo], BeforeValidator(_zone), WithJsonSchema({"type": "string"})]
Share = Annotated[
    float, BeforeValidator(_share), WithJsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 1})
]
Weight = Annotated[float, BeforeValidator(_weight), between(0, _MOST_WEIGHT)]
Globs = Annotated[list[Annotated[str, BeforeValidator(_glob), like(_GLOB)]], Field(min_length=1), OrAlone()]


class CacheShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = {
        "exact": "there is no other cache: write ttl, when or scope",
        "semantic": "only equal requests get stored answers",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "ttl": "How long an answer is kept, at most 24h.",
        "when": (
            "deterministic: requests with temperature 0 or a seed, and those that ask with Cache-Control: max-age. "
            "always: all. never: none."
        ),
        "scope": "tenant: no other tenant gets the answer. shared: every tenant does, where the request has no label.",
    }

    ttl: Seconds | None = None
    when: Literal["never", "deterministic", "always"] | None = None
    scope: CacheScope | None = None


class PolicyShape(Shape):
    not_built = frozenset({"budgets", "limits", "shadow"})
    hints: ClassVar[Mapping[str, str]] = {
        "models": "it belongs in the deployments file",
        "mask": "it belongs in an invariant",
        "weights": "they belong in a rule",
    }

    required = ("version", "deployments", "default")

    meanings: ClassVar[Mapping[str, str]] = {
        "version": "The version of the language: 1.",
        "deployments": "The deployments file, relative to this one.",
        "labels": "Facts about the data of a request, by name. Any one item of a label raises it.",
        "patterns": "Detectors of your own, by name: RE2 patterns that labels may detect.",
        "invariants": "What must never happen. All that match apply, and nothing relaxes them.",
        "slo": "Latency classes that callers name with x-hybridgate-slo.",
        "rules": "What is preferred. Read top down; the first that matches decides.",
        "default": "The rule for every request that no other matches.",
        "cache": "That answers are stored and given again; a rule may say otherwise for its requests.",
    }

    version: Version | None = None
    deployments: Text | None = None
    labels: dict[Label, Any] | None = None
    patterns: dict[Label, Sentence] | None = None
    invariants: list[Any] | None = None
    slo: dict[Word, Any] | None = None
    rules: list[Any] | None = None
    default: dict[str, Any] | None = None
    cache: CacheShape | None = None


class LabelItemShape(Shape):
    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("all", "any", "not"), "one fact is enough for a label, and nothing takes it away"
    )
    not_built = frozenset({"classifier"})

    meanings: ClassVar[Mapping[str, str]] = {
        "detects": "Detectors and patterns: one that fires on some string of the body is enough.",
        "header": "Headers with values: one that a request sends is enough.",
        "key_tag": "Tags of the key of a caller.",
    }

    detects: Words | None = None
    header: dict[HeaderName, HeaderValues] | None = None
    key_tag: Words | None = None


class LabelShape(Shape):
    required = ("any",)
    hints: ClassVar[Mapping[str, str]] = LabelItemShape.hints

    meanings: ClassVar[Mapping[str, str]] = {
        "any": "Items of which one is enough.",
    }

    any: Annotated[list[LabelItemShape], Field(min_length=1)] | None = None


class InvariantWhenShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("all", "any", "does_not_fit", "fits", "header", "model", "not", "tag", "time"),
        "an invariant looks at any_label, tenant and key_tag, which nobody can take off a request",
    )

    meanings: ClassVar[Mapping[str, str]] = {
        "any_label": "The request has one of these labels.",
        "tenant": "The key is of one of these tenants.",
        "key_tag": "The key has one of these tags.",
    }

    any_label: Words | None = None
    tenant: Words | None = None
    key_tag: Words | None = None


class InvariantShape(Shape):
    required = ("name", "when", "stay_in")
    not_built = frozenset({"resume"})

    meanings: ClassVar[Mapping[str, str]] = {
        "name": "What messages call it.",
        "when": "Whom it concerns: all keys must hold, in a list any one item.",
        "stay_in": "The zones that such a request never leaves.",
        "mask": "Labels: what detectors found for them may leave these zones as placeholders instead.",
    }

    name: Title | None = None
    when: InvariantWhenShape | None = None
    stay_in: Words | None = None
    mask: Words | None = None


class SloShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "first_token_p95": "Of 100 answers 95 begin within this time.",
        "total_p95": "Of 100 answers 95 are whole within this time.",
        "per_token_p95": "Of 100 answers 95 take at most this time for each token after the first.",
    }

    first_token_p95: Seconds | None = None
    total_p95: Seconds | None = None
    per_token_p95: Seconds | None = None


_SIDES = {
    "above": "write at_least, which has the number itself",
    "at_most": "write below, which leaves the number itself out",
}


class TokenRangeShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = _SIDES

    meanings: ClassVar[Mapping[str, str]] = {
        "at_least": "From here on.",
        "below": "Up to here, and without it.",
    }

    at_least: Tokens | None = None
    below: Tokens | None = None


class LoadShape(Shape):
    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["at_least"]}, {"required": ["below"]}]})
    hints: ClassVar[Mapping[str, str]] = _SIDES

    meanings: ClassVar[Mapping[str, str]] = {
        "at_least": "From here on.",
        "below": "Up to here, and without it.",
        "unknown": "Whether a deployment that does not say how busy it is counts as in the range.",
    }

    at_least: Share | None = None
    below: Share | None = None
    unknown: Literal["holds", "fails"] | None = None


class TimeShape(Shape):
    required = ("zone",)

    meanings: ClassVar[Mapping[str, str]] = {
        "zone": "A time zone, such as Europe/Berlin or UTC.",
        "days": "Days on which it begins, such as mon-fri; every day without it.",
        "from": "From this time of day on, such as 08:00 in quotes.",
        "to": "Up to this time of day; past midnight where that is not later.",
    }

    zone: Zone | None = None
    days: Days | None = None
    from_: Annotated[Clock | None, Field(alias="from")] = None
    to: Clock | None = None


class WhenShape(Shape):
    never_empty = True
    hints: ClassVar[Mapping[str, str]] = {"headers": "it is called `header`", "label": "it is called `any_label`"}

    meanings: ClassVar[Mapping[str, str]] = {
        "any_label": "The request has one of these labels.",
        "does_not_fit": "Prompt and answer do not fit the window of one of these deployments.",
        "fits": "Prompt and answer fit the window of one of these deployments.",
        "prompt_tokens": "The size of the prompt, as the first candidate of the rule counts.",
        "max_tokens": "The most tokens that the caller allows for the answer.",
        "model": "The name asked for matches one of these patterns: * any characters, ? one, [ab] one of these.",
        "tenant": "The key is of one of these tenants.",
        "key_tag": "The key has one of these tags.",
        "tag": "The request has one of these tags, in x-hybridgate-tags.",
        "header": "Each of these headers has one of its values.",
        "slo": "The caller named one of these latency classes.",
        "stream": "Whether the answer is streamed.",
        "tools": "Whether tools are offered.",
        "images": "Whether the request holds images.",
        "schema": "Whether structured output is asked for.",
        "local_load": "How much of the capacity of each of these deployments is in use.",
        "time": "The time of day and of the week, by the clocks of a place.",
        "any": "Further conditions of which one must hold.",
        "all": "Further conditions that must all hold.",
        "not": "Further conditions that must not all hold.",
    }

    any_label: Words | None = None
    does_not_fit: Words | None = None
    fits: Words | None = None
    prompt_tokens: TokenRangeShape | None = None
    max_tokens: TokenRangeShape | None = None
    model: Globs | None = None
    tenant: Words | None = None
    key_tag: Words | None = None
    tag: Words | None = None
    header: dict[HeaderName, HeaderValues] | None = None
    slo: Words | None = None
    stream: bool | None = None
    tools: bool | None = None
    images: bool | None = None
    schema_: Annotated[bool | None, Field(alias="schema")] = None
    local_load: dict[Text, LoadShape] | None = None
    time: TimeShape | None = None
    any_: Annotated[list[WhenShape] | None, Field(alias="any", min_length=1)] = None
    all_: Annotated[list[WhenShape] | None, Field(alias="all", min_length=1)] = None
    not_: Annotated[WhenShape | None, Field(alias="not")] = None


class RequireShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "slo": "The latency class of the request is met.",
        "cost_at_most": "What the request costs, such as 0.01 USD.",
        "first_token_at_most": "When the answer begins.",
        "total_at_most": "When the answer is whole.",
        "per_token_at_most": "The time for each token after the first.",
    }

    slo: Literal["met"] | None = None
    cost_at_most: Nusd | None = None
    first_token_at_most: Seconds | None = None
    total_at_most: Seconds | None = None
    per_token_at_most: Seconds | None = None


class OrderWeightsShape(Shape):
    never_empty = True

    meanings: ClassVar[Mapping[str, str]] = {
        "marginal_cost": "Weight of a dollar.",
        "first_token": "Weight of a second to the first token.",
        "total_latency": "Weight of a second of the whole answer.",
    }

    marginal_cost: Weight | None = None
    first_token: Weight | None = None
    total_latency: Weight | None = None


_Order = Literal["listed", "marginal_cost", "first_token", "total_latency"]
OrderBy = Annotated[
    Annotated[_Order, Tag("[word]")] | Annotated[OrderWeightsShape, Tag(MAPPING)],
    Discriminator(lambda value: MAPPING if isinstance(value, dict | OrderWeightsShape) else "[word]"),
]


class DefaultShape(Shape):
    required: ClassVar[tuple[str, ...]] = ("candidates",)
    not_built = frozenset({"budgets", "hedge", "limits", "priority", "resume", "shadow"})
    hints: ClassVar[Mapping[str, str]] = {
        "name": "the default is called `default`",
        "when": "the default is for every request that no rule matches",
        "mask": "it belongs in an invariant",
    }

    meanings: ClassVar[Mapping[str, str]] = {
        "candidates": "Deployments that may answer, each once.",
        "weights": "Chance puts one of these candidates first, each with its share of the sum.",
        "sticky": "What all has the same draw of the weights; a request without it.",
        "require": "Ranks first what is predicted to meet all of it; removes none.",
        "unknown": "Whether what has not been measured counts as meeting the requirement; ineligible without it.",
        "otherwise": "The order of those that do not meet the requirement; fastest without it.",
        "order_by": "The order of those that do; as listed without it.",
        "protected": "What happens where an invariant leaves no candidate: 403, or the next rule.",
        "slo": "The latency class of requests that name none.",
        "timeouts": "Instead of those of the deployments.",
        "cache": "That answers are stored and given again: what it leaves out is as the policy's `cache` says.",
        "because": "A sentence for the decision record.",
    }

    candidates: Words | None = None
    weights: dict[Text, Weight] | None = None
    sticky: Sticky | None = None
    require: RequireShape | None = None
    unknown: Unknown | None = None
    otherwise: Otherwise | None = None
    order_by: OrderBy | None = None
    protected: Protected | None = None
    slo: Text | None = None
    timeouts: TimeoutsShape | None = None
    cache: CacheShape | None = None
    because: Sentence | None = None


class RuleShape(DefaultShape):
    required = ("name", "candidates")
    hints: ClassVar[Mapping[str, str]] = {"mask": "it belongs in an invariant"}

    meanings: ClassVar[Mapping[str, str]] = {
        **DefaultShape.meanings,
        "name": "A client may ask for it as a model, and so enters there.",
        "when": "All keys must hold, in a list any one item; without it, all requests match.",
    }

    name: Title | None = None
    when: WhenShape | None = None
