"""The shapes of `when`, each value by itself: ranges, loads, days and times of day, patterns of names.

Owns the keys of conditions and the syntax of what only they have. Refuses references, as `shapes` does. Time zones are
read from the IANA's database as Python finds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal
from zoneinfo import ZoneInfo, available_timezones

from pydantic import BeforeValidator, ConfigDict, Field, InstanceOf, WithJsonSchema

from gateway.policyfile.nearness import NotAmong
from gateway.policyfile.shapes import Shape
from gateway.policyfile.values import HeaderName, HeaderValues, OrAlone, Text, Tokens, Words, is_number, like
from gateway.ranges import WEEKDAYS

_DAYS = re.compile(rf"({'|'.join(WEEKDAYS)})(?:-({'|'.join(WEEKDAYS)}))?")
_CLOCK = re.compile(r"(?:[01][0-9]|2[0-3]):[0-5][0-9]|24:00")
_GLOB = re.compile(r"[!-~]{1,128}")
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


def _share(value: Any) -> float:
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError("must be a share of the capacity above 0 and at most 1, such as 0.8")
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
Globs = Annotated[list[Annotated[str, BeforeValidator(_glob), like(_GLOB)]], Field(min_length=1), OrAlone()]


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
