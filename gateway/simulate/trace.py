"""Traces: who asked when, with how long a prompt and how long an answer.

Owns the columns of the formats it reads (our own, Azure's CSV, Mooncake's JSONL) and the sentences about what is wrong
with them, at file:line. Refuses to open files (files.py) and to guess: a column that no format knows is an error, for a
misspelt `labels` would make private requests public.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from difflib import get_close_matches
from itertools import chain
from typing import Any

import orjson

from gateway.policy import AUTO


class TraceError(Exception):
    """A trace that cannot be read: where, what is wrong, and what to do."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace; `arrival_s` counts from the first one. None and the empty set: the trace does not say."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    tenant: str = "default"
    slo: str | None = None
    labels: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    model: str = AUTO
    max_tokens: int | None = None
    stream: bool = True


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their arrival. `began` is the first one's time in seconds since 1970, 0 where the trace
    does not say."""

    name: str
    rows: tuple[Row, ...]
    began: float = 0.0

    @property
    def span_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.rows[-1].arrival_s if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class _Format:
    """The names of the three columns that every trace has, how its time is written, and what else it may hold."""

    name: str
    time: str
    prompt: str
    output: str
    seconds: Callable[[Any], float]
    ignored: frozenset[str] = frozenset()
    wall: bool = False

    @property
    def required(self) -> tuple[str, str, str]:
        return self.time, self.prompt, self.output


def _wall_clock(value: Any) -> float:
    """Azure's `2023-11-16 18:17:03.9799600`, whose last digits are 100 ns; taken to be UTC where no zone is named."""
    moment = datetime.fromisoformat(str(value).strip())
    return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).timestamp()


_FORMATS = (
    _Format("hybridgate", "arrival_s", "prompt_tokens", "output_tokens", float),
    _Format("Azure", "TIMESTAMP", "ContextTokens", "GeneratedTokens", _wall_clock, wall=True),
    _Format(
        "Mooncake",
        "timestamp",
        "input_length",
        "output_length",
        lambda ms: float(ms) / 1000,
        ignored=frozenset({"hash_ids", "type", "chat_id", "parent_chat_id", "turn"}),
    ),
)
_MOST_TOKENS = 100_000_000


def _words(value: Any) -> frozenset[str]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) and word for word in words):
        raise ValueError("must be words separated by spaces, or a list of words")
    return frozenset(words)


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("must be a word")
    return value.strip()


def _tokens(value: Any) -> int:
    try:
        tokens = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else -1.0
    except ValueError:
        tokens = -1.0
    if not (0 <= tokens <= _MOST_TOKENS and tokens == int(tokens)):
        raise ValueError("must be a whole number of tokens, 0 or more")
    return int(tokens)


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    said = known.get(str(value).lower())
    if said is None:
        raise ValueError("must be true or false")
    return said


_OPTIONAL: Mapping[str, Callable[[Any], Any]] = {
    "tenant": _word,
    "slo": _word,
    "labels": _words,
    "tags": _words,
    "model": _word,
    "max_tokens": lambda value: max(1, _tokens(value)),
    "stream": _flag,
}


@dataclass
class _Reading:
    """A file on its way to rows; `place` is where it has come to."""

    name: str
    line: int = 1
    formats: dict[frozenset[str], _Format] = field(default_factory=dict)

    def wrong(self, message: str) -> TraceError:
        return TraceError(f"{self.name}:{self.line}: {message}")

    def format_of(self, columns: Iterable[str]) -> _Format:
        """The format that has these columns. Raises TraceError that names the missing one and those there are."""
        found = list(columns)
        key = frozenset(found)
        if key not in self.formats:
            self.formats[key] = self._checked(found, key)
        return self.formats[key]

    def _checked(self, found: list[str], columns: frozenset[str]) -> _Format:
        likely = max(_FORMATS, key=lambda known: len(columns.intersection(known.required)))
        missing = [name for name in likely.required if name not in columns]
        named = ", ".join(found) or "none"
        if len(missing) == 3:
            ways = "; ".join(f"{', '.join(known.required)} ({known.name})" for known in _FORMATS)
            raise self.wrong(f"the columns of no known format are here; known are: {ways}; found: {named}")
        if missing:
            quoted = " and ".join(f'"{name}"' for name in missing)
            verb = "is" if len(missing) == 1 else "are"
            column = "column" if len(missing) == 1 else "columns"
            raise self.wrong(f"{column} {quoted} {verb} missing; found: {named}")
        known = {*likely.required, *_OPTIONAL, *likely.ignored}
        for name in found:
            if name not in known:
                near = get_close_matches(name, known, n=1)
                meant = f'did you mean "{near[0]}"?' if near else f"known are: {', '.join(sorted(known))}"
                raise self.wrong(f'unknown column "{name}" ({meant})')
        return likely

    def row(self, values: Mapping[str, Any]) -> tuple[_Format, Row]:
        """One line's request; its arrival is as the file has it."""
        known = self.format_of(values)
        optional = {
            name: self._read(name, reader, values[name])
            for name, reader in _OPTIONAL.items()
            if values.get(name) not in (None, "")
        }
        row = Row(
            arrival_s=self._read(known.time, known.seconds, values[known.time]),
            prompt_tokens=self._read(known.prompt, _tokens, values[known.prompt]),
            output_tokens=max(1, self._read(known.output, _tokens, values[known.output])),
            **optional,
        )
        if not -1e12 < row.arrival_s < 1e12:
            raise self.wrong(f'"{known.time}" must be a finite time')
        return known, row

    def _read(self, name: str, reader: Callable[[Any], Any], value: Any) -> Any:
        try:
            return reader(value)
        except (ValueError, TypeError, OverflowError) as error:
            what = str(error) if str(error).startswith("must") else "cannot be read"
            raise self.wrong(f'"{name}" {what}') from None


def parse(name: str, lines: Iterable[str]) -> Trace:
    """The trace in these lines: JSONL where the first one begins with a brace, else CSV with a header. Sorted by
    arrival, the first one at 0. Raises TraceError."""
    reading = _Reading(name)
    rest = iter(lines)
    first = next(rest, "").lstrip("\ufeff")
    entries = _json_lines if first.lstrip().startswith("{") else _csv_lines
    rows: list[Row] = []
    wall = False
    for values in entries(reading, chain([first], rest)):
        known, row = reading.row(values)
        wall = known.wall
        rows.append(row)
    if not rows:
        raise reading.wrong("no requests are here")
    began = min(row.arrival_s for row in rows)
    moved = [replace(row, arrival_s=row.arrival_s - began) for row in rows]
    moved.sort(key=lambda row: row.arrival_s)
    return Trace(name, tuple(moved), began if wall else 0.0)


def _json_lines(reading: _Reading, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        reading.line = number
        try:
            values = orjson.loads(line)
        except orjson.JSONDecodeError:
            raise reading.wrong("is not JSON; each line must be an object of its own") from None
        if not isinstance(values, dict):
            raise reading.wrong("must be an object such as {...}")
        yield values


def _csv_lines(reading: _Reading, lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    table = csv.reader(lines, strict=True)
    try:
        header = [column.strip() for column in next(table, [])]
        reading.format_of(header)
        if len(set(header)) < len(header):
            raise reading.wrong("a column is named twice")
        for cells in table:
            reading.line = table.line_num
            if not cells:
                continue
            if len(cells) != len(header):
                raise reading.wrong(f"{len(cells)} cells under {len(header)} columns")
            yield dict(zip(header, cells, strict=True))
    except csv.Error:
        reading.line = table.line_num
        raise reading.wrong("is not CSV") from None
