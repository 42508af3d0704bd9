"""What each value of a file looks like by itself, and the shapes of the deployments file; `language` has the policy's.

Owns the syntax of values (durations, amounts, names) and the sentences about a wrong one. Refuses references: whether
a name is defined is asked in `deployments` and `rules`. A key is never required here, so that what is left of an
entry after its wrong values have been taken out can still be looked at; `missing` asks for it afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from gateway.policyfile.tree import Loc, Node, Place, Problem
from gateway.types import NUSD_PER_USD, BackendKind, Capability, LoadKind

Report = Callable[[Problem], None]

MAPPING = "[mapping]"  # the tag of a value that is either a word or a mapping
_NO_PARTS = ("[key]", "[word]", MAPPING)  # what pydantic puts into a place besides keys and indices

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
_TITLE = re.compile(r"[!-~](?:[ -~]{0,126}[!-~])?")


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
    nusd = Decimal(found[1]) * NUSD_PER_USD
    if nusd != nusd.to_integral_value():
        raise ValueError("has more than nine decimals; a billionth of a dollar is the smallest amount")
    return int(nusd)


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


def as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _matching(pattern: re.Pattern[str], what: str) -> AfterValidator:
    def check(value: str) -> str:
        if not pattern.fullmatch(value):
            raise ValueError(f"must be {what}")
        return value

    return AfterValidator(check)


Seconds = Annotated[float, BeforeValidator(_seconds)]
Nusd = Annotated[int, BeforeValidator(_nusd)]
Tokens = Annotated[int, BeforeValidator(_tokens)]
Dollars = Annotated[float, BeforeValidator(_dollars)]
PositiveDollars = Annotated[float, BeforeValidator(_positive_dollars)]
Rate = Annotated[float, BeforeValidator(_rate)]
Volume = Annotated[float, BeforeValidator(_volume)]
Share = Annotated[float, BeforeValidator(_share)]
ShareAYear = Annotated[float, BeforeValidator(_share_a_year)]
Pue = Annotated[float, BeforeValidator(_pue)]
Years = Annotated[float, BeforeValidator(_years)]
Count = Annotated[int, BeforeValidator(_count)]
Version = Annotated[int, BeforeValidator(_version)]
Text = Annotated[str, Field(min_length=1), _matching(_PRINTABLE, "text in one line, without control characters")]
Sentence = Annotated[str, Field(min_length=1)]
Word = Annotated[str, _matching(_WORD, "a word of letters, digits and any of . _ / : @ - (at most 128)")]
Label = Annotated[str, _matching(_LABEL, "a word of lower-case letters, digits and any of . _ - (at most 64)")]
Title = Annotated[str, _matching(_TITLE, "printable ASCII text without spaces around it (at most 128 characters)")]
Words = Annotated[list[Text], BeforeValidator(as_list), Field(min_length=1)]

HeaderName = Annotated[str, _matching(_HEADER, "a header's, such as x-data-class"), AfterValidator(_shown)]
HeaderValue = Annotated[str, _matching(_HEADER_VALUE, "printable ASCII text without commas or spaces around it")]
HeaderValues = Annotated[list[HeaderValue], BeforeValidator(as_list), Field(min_length=1)]


class Shape(BaseModel):
    """A mapping of the language. `not_built` are keys that are designed and not there yet."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    not_built: ClassVar[frozenset[str]] = frozenset()
    hints: ClassVar[Mapping[str, str]] = {}


class DeploymentsShape(Shape):
    hints: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("default", "invariants", "labels", "rules", "slo"), "it belongs in the policy file"
    )

    version: Version | None = None
    deployments: dict[Word, Any] | None = None
    models: dict[Title, Text] | None = None


class TokenPriceShape(Shape):
    input: Dollars | None = None
    output: Dollars | None = None
    cached_input: Dollars | None = None


class TokenRateShape(Shape):
    input: Rate | None = None
    output: Rate | None = None


class CostShape(Shape):
    """Either a price by the token, or hardware; and what comes on top of both. See policyfile/costing.py."""

    usd_per_million_tokens: TokenPriceShape | None = None

    hardware: Word | None = None
    count: Count | None = None
    usd_per_hour: PositiveDollars | None = None
    spot: bool | None = None
    capacity: Literal["fixed", "elastic"] | None = None
    purchase_usd: PositiveDollars | None = None
    amortised_over: Years | None = None
    maintenance: ShareAYear | None = None
    electricity_usd_per_kwh: PositiveDollars | None = None
    pue: Pue | None = None
    host_usd_per_hour: Dollars | None = None
    storage_usd_per_month: Dollars | None = None
    utilization: Share | None = None
    tokens_per_s: TokenRateShape | None = None

    load_balancer_usd_per_month: Dollars | None = None
    monitoring_usd_per_month: Dollars | None = None
    data_transfer_usd_per_gb: Dollars | None = None
    tokens_per_month: Volume | None = None


class TimeoutsShape(Shape):
    connect: Seconds | None = None
    first_token: Seconds | None = None
    idle: Seconds | None = None
    total: Seconds | None = None


class DeploymentShape(Shape):
    not_built = frozenset({"draft", "limits", "mask", "weight"})
    hints: ClassVar[Mapping[str, str]] = {"api_base": "the address is called `url` for every backend"}

    backend: BackendKind | None = None
    model: Text | None = None
    zone: Word | None = None
    url: Words | None = None
    api_key: str | None = None
    context_window: Tokens | None = None
    default_max_tokens: Tokens | None = None
    capabilities: list[Capability] | None = None
    quantization: Literal["none", "fp16", "bf16", "int8", "int4"] | None = None
    tokenizer: Literal["o200k_base", "cl100k_base", "bytes"] | None = None
    load: LoadKind | None = None
    cost: CostShape | None = None
    timeouts: TimeoutsShape | None = None
    ca_file: Text | None = None


S = TypeVar("S", bound=Shape)
S_co = TypeVar("S_co", bound=Shape, covariant=True)


@dataclass(frozen=True, slots=True)
class Checked(Generic[S_co]):
    """What is right of an entry. `intact` is false where something was wrong, and then `shape` states less than the
    file does."""

    subject: str
    node: Node
    at: Place
    shape: S_co
    intact: bool

    def problem(self, message: str, *loc: str | int, key: bool = False) -> Problem:
        """A problem of this entry, at the value under `loc` or its key; at the entry itself without one."""
        place = self.node.place_of(loc, key=key) if loc else self.at
        return place.problem(f"{self.subject}: {message}" if self.subject else message)

    def missing(self, *keys: str) -> list[Problem]:
        """A problem for each of the keys that the entry does not state; none where it is no mapping, which is
        reported."""
        mapping = isinstance(self.node.value, dict)
        return [self.problem(f'"{key}" is missing') for key in keys if mapping and key not in self.node.keys]


def check(shape: type[S], node: Node, subject: str, report: Report, at: Place | None = None) -> Checked[S]:
    """What is right of the entry at `node`; the rest is reported and taken out of it."""
    at = at or node.place
    intact = node.sound
    prefix = f"{subject}: " if subject else ""
    while True:
        try:
            return Checked(subject, node, at, shape.model_validate(node.plain), intact)
        except ValidationError as found:
            errors = sorted(found.errors(include_url=False), key=lambda error: _sortable(error["loc"]))
        intact = False
        for error in errors:
            loc = _loc(error)
            is_key = error["type"] == "extra_forbidden" or error["loc"][-1:] == ("[key]",)
            report(node.place_of(loc, key=is_key).problem(prefix + _sentence(shape, loc, error)))
        if not isinstance(node.value, dict):
            return Checked(subject, node, at, shape(), False)
        wrong = dict.fromkeys(_loc(error) for error in errors)
        for loc in reversed(wrong):  # from the end, so that positions before it stay what they are
            node.prune(loc)


def _loc(error: Mapping[str, Any]) -> tuple[str | int, ...]:
    """Where in the entry the error is: keys and indices."""
    return tuple(part for part in error["loc"] if part not in _NO_PARTS)


def _sortable(loc: Loc) -> list[str]:
    return [part if isinstance(part, str) else f"{part:09}" for part in loc]


def _sentence(shape: type[Shape], loc: Loc, error: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    field = ".".join(str(part) for part in loc if isinstance(part, str))
    if kind == "extra_forbidden":
        return _unknown_field(_shape_around(shape, loc), field, str(loc[-1]))
    what = _WANTED.get(kind)
    if kind == "literal_error":
        allowed = _literals(error["ctx"]["expected"])
        what = f"must be {', '.join(allowed[:-1])} or {allowed[-1]}" if len(allowed) > 1 else f"must be {allowed[0]}"
        what += suggestion(value, allowed) if isinstance(value, str) else ""
    elif kind == "value_error":
        what = str(error["ctx"]["error"])
    elif kind == "string_type" and not isinstance(value, list | dict):
        what = f"must be text; put {'true or false' if isinstance(value, bool) else 'the number'} in quotes"
    assert what is not None, kind
    if error["loc"][-1:] == ("[key]",):
        return f'the name "{loc[-1]}" {what}'
    if loc and isinstance(loc[-1], int):
        return f'an item of "{field}" {what}'
    return f'"{field}" {what}' if field else what


_WANTED: Mapping[str, str] = {
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
}


def _literals(expected: str) -> list[str]:
    return re.findall(r"'([^']*)'", expected)


def _unknown_field(shape: type[Shape], field: str, key: str) -> str:
    if key in shape.not_built:
        return f'"{field}" is not implemented yet'
    if key in shape.hints:
        return f'unknown field "{field}" ({shape.hints[key]})'
    known = sorted(info.alias or name for name, info in shape.model_fields.items())
    if likely := suggestion(key, known):
        return f'unknown field "{field}"{likely}'
    if meant := get_close_matches(key, sorted(shape.not_built), n=1):
        return f'unknown field "{field}" ("{meant[0]}", if that is meant, is not implemented yet)'
    return f'unknown field "{field}" (known are {", ".join(known)})'


def suggestion(word: str, known: Iterable[str]) -> str:
    """` (did you mean "..."?)` where one of the known words is near, and nothing otherwise."""
    near = get_close_matches(word, list(known), n=1)
    return f' (did you mean "{near[0]}"?)' if near else ""


def _shape_around(shape: type[Shape], loc: Loc) -> type[Shape]:
    """The shape of the mapping that holds the last key of `loc`."""
    for part in loc[:-1]:
        fields = {field.alias or name: field for name, field in shape.model_fields.items()}
        if part in fields:
            shape = next(_shapes_in(fields[str(part)].annotation), shape)
    return shape


def _shapes_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Shape):
        yield annotation
    for inner in get_args(annotation):
        yield from _shapes_in(inner)


def subject_of(noun: str, node: Node, position: int) -> str:
    """How messages call an entry of a list: by its name where it has one, else by its position, which counts from 1."""
    name = node.child("name")
    if name is not None and isinstance(name.value, str) and _TITLE.fullmatch(name.value):
        return f'{noun} "{name.value}"'
    return f"{noun} {position}"
