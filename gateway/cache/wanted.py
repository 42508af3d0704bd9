"""What a request's `Cache-Control` asks for (RFC 9111, 5.2.1). Pure.

Owns `no-store`, `no-cache` and `max-age`; the other directives are for caches along the way and mean nothing here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HEADER = "cache-control"


@dataclass(frozen=True, slots=True)
class Wanted:
    """`reads`: a stored answer will do, if it is at most `max_age` seconds old (None: as old as the policy lets it
    get). `stores`: the answer may be stored."""

    reads: bool = True
    stores: bool = True
    max_age: float | None = None

    @property
    def asks(self) -> bool:
        """Whether the caller asks for stored answers of its own accord."""
        return self.reads and bool(self.max_age)


ANY = Wanted()


def wanted_in(headers: Mapping[str, str]) -> Wanted:
    """Of a request with these headers (lower-case names). An age that is no number is 0, as the RFC has it."""
    text = headers.get(HEADER)
    if text is None:
        return ANY
    reads = stores = True
    max_age: float | None = None
    for directive in text.lower().split(","):
        name, _, value = directive.strip().partition("=")
        if name == "no-store":
            reads = stores = False
        elif name == "no-cache":
            reads = False
        elif name == "max-age":
            value = value.strip('" ')
            age = float(value) if value.isascii() and value.isdecimal() and len(value) < 11 else 0.0
            max_age = age if max_age is None else min(age, max_age)
    return Wanted(reads and max_age != 0, stores, max_age)
