"""Logs of decisions from disk: plain or gzip, one or several, in any order.

Owns reading them line by line, and the count of what is no record. Refuses to hold a log in memory.
"""

from __future__ import annotations

import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from gateway.policy import Policy
from gateway.record import Recorded, recorded
from gateway.replay import Sums, replayed
from gateway.types import UNSCANNABLE
from gateway.written import configured

_GZIP = b"\x1f\x8b"


@dataclass(slots=True)
class Skipped:
    """Lines that were not replayed: `others` are of a log but no record of a decision (an engine's state, a request
    refused before it was decided), `unreadable` are not of a log, or broken. `first` says which was the first of
    these, and why."""

    others: int = 0
    unreadable: int = 0
    first: str = ""

    def broken(self, where: str, why: str) -> None:
        """Count one that cannot be read."""
        self.unreadable += 1
        self.first = self.first or f"{where}: {why}"


def records(paths: Iterable[str], skipped: Skipped) -> Iterator[Recorded]:
    """The records of all logs; `-` is standard input. Raises OSError for one that cannot be opened."""
    for path in paths:
        with _opened(path) as stream:
            number = 0
            try:
                for number, line in enumerate(stream, 1):
                    record = _record(line, f"{path}:{number}", skipped)
                    if record is not None:
                        yield record
            except (EOFError, zlib.error, gzip.BadGzipFile):
                skipped.broken(f"{path}:{number + 1}", "the compressed file ends or breaks here")


@contextmanager
def _opened(path: str) -> Iterator[Iterable[bytes]]:
    if path == "-":
        yield sys.stdin.buffer
        return
    with Path(path).open("rb") as stream:
        if stream.peek(2)[:2] != _GZIP:
            yield stream
            return
        with gzip.GzipFile(fileobj=stream) as inner:
            yield inner


def _record(line: bytes, where: str, skipped: Skipped) -> Recorded | None:
    if not line.strip():
        return None
    try:
        parsed = orjson.loads(line)
        record = recorded(parsed) if isinstance(parsed, dict) else None
    except orjson.JSONDecodeError:
        skipped.broken(where, "this is not JSON")
        return None
    except ValueError as error:
        skipped.broken(where, str(error))
        return None
    if record is None:
        skipped.others += 1
    return record


def replay(paths: Iterable[str], policy: Policy, most_examples: int) -> tuple[Sums, Skipped]:
    """All records of the logs, decided again by the policy. Raises OSError."""
    sums, skipped = Sums(most_examples), Skipped()
    policy = configured(policy)
    known = frozenset({UNSCANNABLE, *(label.name for label in policy.labels)})
    for record in records(paths, skipped):
        sums.add(record, replayed(record, policy), known)
    return sums, skipped
