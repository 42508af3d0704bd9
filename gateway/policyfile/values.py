"""What each value of a file looks like by itself: durations, amounts, tokens, numbers, names.

Owns their syntax, the sentence about a wrong one, and their JSON Schema. Refuses what a name refers to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from gateway.types import NUSD_PER_USD

_YEARS = re.compile(r"([0-9]{1,2}(?:\.[0-9]+)?) ?y")
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(ms|s|m|h)")
_AMOUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]+)?) USD")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_TOKENS = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?) ?(k|M|Ki|Mi)")
_MULTIPLES = {"k": 1000, "M": 1000**2, "Ki": 1024, "Mi": 1024**2}
_MOST_TOKENS = 1_000_000_000
_LONGEST = 86_400.0  # seconds; a day
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,127}")
_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(
    r"[!-+\--~](?:[ -+\--~]*[!-+\--~])?"
)  # printable ASCII but the comma, which separates values
_SECRET_HEADERS = frozenset({"authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"})
_PRINTABLE = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
TITLE = re.compile(r"[!-~](?:[ -~]{0,126}[!-~])?")


def _seconds(value: Any) -> float:
    """Seconds of a duration such as `50ms`, `1.5s` or `10m`."""
    found = _DURATION.fullmatch(value) if isinstance(value, str) else None
    seconds = float(found[1]) * _SECONDS[found[2]] if found else 0.0
    if not 0 < seconds <= _LONGEST:
        raise ValueError("must be a duration with its unit, such as 50ms, 1s or 10m, at most 24h")
    return seconds


def _nusd(value: Any) -> int:
    """Nano-dollars of an amount such as `0.01 USD`."""
    found = _AMOUNT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError("must be an amount in US dollars with its unit, such as 0.01 USD")
    dollars, _, decimals = found[1].partition(".")
    billionths = decimals.rstrip("0").ljust(9, "0")
    if len(billionths) > 9:
        raise ValueError("has more than nine decimals; a billionth of a dollar is the smallest amount")
    return int(dollars) * NUSD_PER_USD + int(billionths)


def _tokens(value: Any) -> int:
    """Tokens of `8192`, `8k` (8,000) or `8Ki` (8,192)."""
    found = _TOKENS.fullmatch(value) if isinstance(value, str) else None
    tokens = Decimal(found[1]) * _MULTIPLES[found[2]] if found else value
    if (
        isinstance(tokens, bool)
        or not isinstance(tokens, int | Decimal)
        or not 0 < tokens <= _MOST_TOKENS
        or tokens % 1
    ):
        raise ValueError("must be a whole number of tokens, such as 8192, 8k (that is 8000) or 8Ki (8192)")
    return int(tokens)


def _dollars(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError("must be a number of US dollars without a unit, such as 0.20")
    return float(value)


def _number(value: Any, low: float, high: float, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"must be {what}")
    return float(value)


_LEAST = 1e-9  # a billionth of a dollar is the smallest amount, and no price of hardware is nothing


def _positive_dollars(value: Any) -> float:
    return _number(value, _LEAST, 1e12, "a number of US dollars above 0 without a unit, such as 2.50")


def _rate(value: Any) -> float:
    return _number(value, 1e-3, 1e9, "a number of tokens a second, such as 1500")


def _volume(value: Any) -> float:
    return _number(value, 1.0, 1e15, "a number of tokens a month, such as 50000000")


def _share(value: Any) -> float:
    return _number(value, 1e-4, 1.0, "a share above 0 and at most 1, such as 0.4")


def _share_a_year(value: Any) -> float:
    return _number(value, 0.0, 1.0, "a share of the purchase price a year from 0 to 1, such as 0.05")


def _pue(value: Any) -> float:
    return _number(value, 1.0, 5.0, "power of the site over power of its machines, 1 or more, such as 1.4")


def _years(value: Any) -> float:
    """Years of a span such as `3y`."""
    found = _YEARS.fullmatch(value) if isinstance(value, str) else None
    if found is None or float(found[1]) == 0:
        raise ValueError("must be a number of years with its unit, such as 3y")
    return float(found[1])


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value <= 1024:
        raise ValueError("must be a whole number from 1 to 1024")
    return value


def _version(value: Any) -> int:
    if type(value) is not int or value != 1:
        raise ValueError("must be 1, the only version of the language so far")
    return 1


def _shown(name: str) -> str:
    if name.lower() in _SECRET_HEADERS:
        raise ValueError("is a header that holds a secret; look at key_tag or tenant instead")
    return name


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


@dataclass(frozen=True, slots=True)
class OrAlone:
    """Of a list: a lone value stands for a list of one."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_as_list, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        listed = handler(schema)
        return {"anyOf": [listed["items"], listed]}


def like(pattern: re.Pattern[str]) -> WithJsonSchema:
    """In the schema: text of which all matches."""
    return WithJsonSchema({"type": "string", "pattern": f"^(?:{pattern.pattern})$"})


def between(low: float, high: float) -> WithJsonSchema:
    """In the schema: numbers from `low` to `high`."""
    return WithJsonSchema({"type": "number", "minimum": low, "maximum": high})


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"must be {what}")
        return value

    return AfterValidator(check)


Seconds = Annotated[float, BeforeValidator(_seconds), like(_DURATION)]
Nusd = Annotated[int, BeforeValidator(_nusd), like(_AMOUNT)]
Tokens = Annotated[
    int,
    BeforeValidator(_tokens),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": _MOST_TOKENS},
                {"type": "string", "pattern": f"^(?:{_TOKENS.pattern})$"},
            ]
        }
    ),
]
Dollars = Annotated[float, BeforeValidator(_dollars), WithJsonSchema({"type": "number", "minimum": 0})]
PositiveDollars = Annotated[float, BeforeValidator(_positive_dollars), between(_LEAST, 1e12)]
Rate = Annotated[float, BeforeValidator(_rate), between(1e-3, 1e9)]
Volume = Annotated[float, BeforeValidator(_volume), between(1.0, 1e15)]
Share = Annotated[float, BeforeValidator(_share), between(1e-4, 1.0)]
ShareAYear = Annotated[float, BeforeValidator(_share_a_year), between(0.0, 1.0)]
Pue = Annotated[float, BeforeValidator(_pue), between(1.0, 5.0)]
Years = Annotated[float, BeforeValidator(_years), like(_YEARS)]
Count = Annotated[int, BeforeValidator(_count), Field(ge=1, le=1024)]
Version = Annotated[int, BeforeValidator(_version), WithJsonSchema({"const": 1})]
Text = Annotated[str, Field(min_length=1), _matching(_PRINTABLE, "text in one line, without control characters")]
Sentence = Annotated[str, Field(min_length=1)]
Word = Annotated[str, _matching(_WORD, "a word of letters, digits and any of . _ / : @ - (at most 128)"), like(_WORD)]
Label = Annotated[
    str, _matching(_LABEL, "a word of lower-case letters, digits and any of . _ - (at most 64)"), like(_LABEL)
]
Title = Annotated[
    str, _matching(TITLE, "printable ASCII text without spaces around it (at most 128 characters)"), like(TITLE)
]
Words = Annotated[list[Text], Field(min_length=1), OrAlone()]

HeaderName = Annotated[
    str, _matching(_HEADER, "a header's, such as x-data-class"), AfterValidator(_shown), like(_HEADER)
]
HeaderValue = Annotated[
    str, _matching(_HEADER_VALUE, "printable ASCII text without commas or spaces around it"), like(_HEADER_VALUE)
]
HeaderValues = Annotated[list[HeaderValue], Field(min_length=1), OrAlone()]


def is_number(value: Any) -> bool:
    """Whether it is a number as YAML has them, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool)
