"""Usage records in a file of JSON lines, which is renamed when it is large and never changed.

Owns appending (a line is written whole or not at all, by however many processes), rotation, and reading back. Refuses
to delete: what an invoice rests on is its operator's to remove.
"""

from __future__ import annotations

import fcntl
import glob
import gzip
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from gateway.usage.entry import Entry, entry_from_json


class UsageFile:
    """One file, appended to. Invariant: what `write` has returned from survives the process."""

    def __init__(self, path: str | Path, rotate_bytes: int, now: Callable[[], float]) -> None:
        """`now` in seconds since 1970. Raises OSError where the file cannot be written."""
        self._path = Path(path)
        self._rotate_bytes = rotate_bytes
        self._now = now
        self._fd = self._opened()
        self._torn = False

    def write(self, lines: bytes) -> None:
        """Append whole lines with one call. Raises OSError where they are not all there; a part of a line that is then
        has a line of its own. A file that cannot be set aside grows on."""
        if not self._is_current():
            self._open_anew()
        if self._torn:
            lines = b"\n" + lines
        while lines:  # a full disk or a signal may take a part
            written = os.write(self._fd, lines)
            lines, self._torn = lines[written:], written < len(lines)
        if os.fstat(self._fd).st_size >= self._rotate_bytes:
            with suppress(OSError):  # and the next write tries again
                self._rotate()

    def close(self) -> None:
        """Leave the file."""
        os.close(self._fd)

    def _opened(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    def _open_anew(self) -> None:
        fd = self._opened()  # where it raises, ours stays ours: a number that is given back is soon somebody else's
        os.close(self._fd)
        self._fd, self._torn = fd, False

    def _is_current(self) -> bool:
        """False where somebody else has renamed it."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._fd))
        except FileNotFoundError:
            return False

    def _rotate(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            if self._is_current():
                stamp = datetime.fromtimestamp(self._now(), UTC).strftime("%Y%m%dT%H%M%SZ")
                for number in range(1_000):
                    aside = self._path.with_name(f"{self._path.stem}-{stamp}-{number:03}{self._path.suffix}")
                    if not aside.exists():
                        os.rename(self._path, aside)
                        break
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        self._open_anew()


def files_of(path: str | Path) -> list[Path]:
    """The file and those that it was renamed to, compressed ones as well, oldest first."""
    path = Path(path)
    aside = sorted(path.parent.glob(f"{glob.escape(path.stem)}-*Z-[0-9][0-9][0-9]{glob.escape(path.suffix)}*"))
    return [*aside, *([path] if path.exists() else [])]


def read(paths: Iterable[str | Path], on_bad: Callable[[str], None]) -> Iterator[Entry]:
    """The entries of these files, plain or gzipped; `on_bad` is told of each line that is none. Raises OSError."""
    for path in paths:
        with gzip.open(path, "rb") if str(path).endswith(".gz") else Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield entry_from_json(line)
                    except ValueError as error:
                        on_bad(f"{path}:{number}: {error}")
