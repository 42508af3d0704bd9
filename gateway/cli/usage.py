"""`hybridgate usage`: what was used and what it cost, summed from usage records, as a table, CSV, JSON or a picture."""

from __future__ import annotations

import asyncio
import csv
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, tzinfo
from itertools import chain
from typing import Annotated, get_args
from zoneinfo import ZoneInfo

import orjson
import typer

from gateway.charts import Chart, NoPicture, Series, draw
from gateway.cli.terminal import fail, standard_output, table
from gateway.settings import PREFIX
from gateway.types import usd
from gateway.usage import Entry, Key, Total, total_by
from gateway.usage.files import files_of, read

_KEYS: tuple[Key, ...] = get_args(Key)
_COLUMNS = (
    "requests",
    "answered",
    "cached",
    "prompt_tokens",
    "completion_tokens",
    "tokens",
    "cost_usd",
    "failed_usd",
)
_TIMES = ("hour", "day", "month")


def usage(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Files of usage records, gzipped ones as well; without any, HYBRIDGATE_USAGE_FILE's."),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--redis", help="Read the stream of HYBRIDGATE_REDIS_URL as well, or instead of files.")
    ] = False,
    by: Annotated[str, typer.Option(help=f"One or more of {', '.join(_KEYS)}, with commas.")] = "tenant,model",
    tenant: Annotated[list[str] | None, typer.Option(help="Only this tenant; may be repeated.")] = None,
    since: Annotated[str | None, typer.Option(help="From this day or moment on: 2026-11-01, 2026-11-01T09:00.")] = None,
    until: Annotated[str | None, typer.Option(help="Up to, and without, this day or moment.")] = None,
    time_zone: Annotated[str, typer.Option(help="Where days begin, such as Europe/Berlin.")] = "UTC",
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, for a spreadsheet.")] = False,
    as_document: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    picture: Annotated[list[str] | None, typer.Option(help="Draw the cost, as .svg or .png; may be repeated.")] = None,
) -> None:
    """Sum usage records: who used which model, how much, and what it cost.

    \b
    Try it:
      hybridgate usage usage.jsonl --by tenant,month
      hybridgate usage usage.jsonl --by day,deployment --since 2026-11-01 --csv
    """
    keys, zone = _keys(by), _zone(time_zone)
    first, last = _moment(since, "--since", zone), _moment(until, "--until", zone)
    entries = _chosen(_entries(files or [], stream), tenant or [], first, last)
    try:
        totals = total_by(entries, keys, zone)
    except OSError as error:
        fail(f"cannot read {error.filename} ({error.strerror})")
    if as_document:
        _print_json(keys, totals)
    elif as_csv:
        _print_csv(keys, totals)
    else:
        _print_table(keys, totals)
    for path in picture or []:
        try:
            draw([_chart(keys, totals)], path)
        except NoPicture as error:
            fail(str(error))


def _keys(by: str) -> tuple[Key, ...]:
    named = [name.strip() for name in by.split(",")]
    unknown = [name for name in named if name not in _KEYS]
    if unknown or len(set(named)) != len(named):
        fail(f"--by takes one or more of {', '.join(_KEYS)}, each once, such as tenant,day")
    return tuple(key for name in named for key in _KEYS if key == name)


def _zone(name: str) -> tzinfo:
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (OSError, ValueError, KeyError):
        fail(f"--time-zone: there is no time zone {name!r}; one is Europe/Berlin")


def _moment(text: str | None, flag: str, zone: tzinfo) -> float | None:
    if text is None:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        fail(f"{flag} must be a day or a moment, such as 2026-11-01 or 2026-11-01T09:00")
    return (at if at.tzinfo else at.replace(tzinfo=zone)).timestamp()


def _entries(files: list[str], stream: bool) -> Iterator[Entry]:
    named = os.environ.get(f"{PREFIX}USAGE_FILE", "")
    paths = list(files)
    if not paths and not stream:
        paths = [str(path) for path in files_of(named)] if named else []
        if not paths:
            fail("no usage records: name their files, or the gateway's with HYBRIDGATE_USAGE_FILE, or give --redis")
    return chain(read(paths, _warn), _from_stream() if stream else ())


def _from_stream() -> list[Entry]:
    from gateway.store import Store, StoreUnavailable  # noqa: PLC0415 - redis, which files need not
    from gateway.usage.stream import UsageStream  # noqa: PLC0415

    url = os.environ.get(f"{PREFIX}REDIS_URL", "")
    if not url:
        fail("--redis needs HYBRIDGATE_REDIS_URL")

    async def all_of_them() -> list[Entry]:
        async with Store(url, timeout=5.0) as store:
            return await UsageStream(store, 0).entries()

    try:
        return asyncio.run(all_of_them())
    except ValueError as error:
        fail(f"HYBRIDGATE_REDIS_URL {error}")
    except StoreUnavailable as error:
        fail(f"Redis did not give the usage records ({error}): is HYBRIDGATE_REDIS_URL right, and it up?")


def _warn(problem: str) -> None:
    sys.stderr.write(f"left out: {problem}\n")


def _chosen(entries: Iterable[Entry], tenants: list[str], first: float | None, last: float | None) -> Iterator[Entry]:
    for entry in entries:
        if tenants and entry.tenant not in tenants:
            continue
        if (first is None or entry.at >= first) and (last is None or entry.at < last):
            yield entry


Totals = Mapping[tuple[str, ...], Total]


def _values(total: Total) -> tuple[int | str, ...]:
    counts = (total.requests, total.answered, total.cached, total.prompt_tokens, total.completion_tokens, total.tokens)
    return (*counts, usd(total.cost_nusd), usd(total.failed_nusd))


def _sum(totals: Totals) -> Total:
    whole = Total()
    for total in totals.values():
        whole.include(total)
    return whole


def _print_table(keys: tuple[Key, ...], totals: Totals) -> None:
    shown = table(*keys, *(name.replace("_", " ") for name in _COLUMNS))
    for column in shown.columns[len(keys) :]:
        column.justify = "right"
    for group, total in totals.items():
        shown.add_row(*(value or "-" for value in group), *(_readable(value) for value in _values(total)))
    if len(totals) > 1:
        shown.add_section()
        blank = [""] * (len(keys) - 1)
        shown.add_row("all", *blank, *(_readable(value) for value in _values(_sum(totals))))
    standard_output().print(shown)


def _readable(value: int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else value


def _print_csv(keys: tuple[Key, ...], totals: Totals) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*keys, *_COLUMNS])
    writer.writerows([*map(_inert, group), *_values(total)] for group, total in totals.items())


def _inert(text: str) -> str:
    """So that a spreadsheet takes no name for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def _print_json(keys: tuple[Key, ...], totals: Totals) -> None:
    rows = [
        {**dict(zip(keys, group, strict=True)), **dict(zip(_COLUMNS, _values(total), strict=True))}
        for group, total in totals.items()
    ]
    document = {"by": keys, "rows": rows, "all": dict(zip(_COLUMNS, _values(_sum(totals)), strict=True))}
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")


def _chart(keys: tuple[Key, ...], totals: Totals) -> Chart:
    """The cost: bars by the first key, or lines over time by the others where a time is among them."""
    time = next((key for key in keys if key in _TIMES), None)
    if time is None:
        names = [", ".join(value or "-" for value in group) for group in totals]
        costs = [total.cost_nusd / 1e9 for total in totals.values()]
        bars = Series("cost", list(range(len(costs))), costs, "bars")
        return Chart("Cost", ", ".join(keys), "USD", [bars], ticks=names)
    at = keys.index(time)
    moments = sorted({group[at] for group in totals})
    costs_of: dict[str, list[float]] = {}
    for group, total in totals.items():
        name = ", ".join(value or "-" for n, value in enumerate(group) if n != at) or "all"
        costs_of.setdefault(name, [0.0] * len(moments))[moments.index(group[at])] += total.cost_nusd / 1e9
    lines = [Series(name, list(range(len(moments))), costs) for name, costs in costs_of.items()]
    return Chart("Cost", time, "USD", lines, ticks=moments)
