"""Where usage records go, off the requests' path.

Owns the time between a request's end and its record being kept: a file gets it in the same turn of the event loop; the
stream soon after, and again until it has it. Refuses to hold up or fail a request: what cannot be kept is counted and
told once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from itertools import islice

from gateway.store import StoreUnavailable
from gateway.telemetry import Record
from gateway.usage.entry import Entry, entry_of
from gateway.usage.files import UsageFile
from gateway.usage.stream import UsageStream

GATHER = 0.05  # seconds, so that a busy gateway sends entries together
AGAIN = 0.5  # seconds between tries while the store does not answer
MOST_WAITING = 100_000  # entries that wait for the stream, about 50 MB; then the oldest are lost
MOST_TOGETHER = 500


class Journal:
    """Invariant: an entry that was added is in the file before the next turn of the event loop ends, and in the stream
    or waiting for it, unless `lost` counts it."""

    def __init__(
        self,
        *,
        wall: Callable[[], float],
        tell: Callable[[str], None],
        file: UsageFile | None = None,
        stream: UsageStream | None = None,
    ) -> None:
        """`wall`: seconds since 1970."""
        self.lost = 0
        self._wall = wall
        self._tell = tell
        self._file = file
        self._stream = stream
        self._lines: list[bytes] = []
        self._waiting: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None
        self._losing = False

    def observe(self, record: Record) -> None:
        """A request has ended."""
        entry = entry_of(record, self._wall())
        if entry is not None:
            self.add(entry)

    def add(self, entry: Entry) -> None:
        """Keep it."""
        line = entry.to_json()
        if self._file is not None:
            if not self._lines:
                asyncio.get_running_loop().call_soon(self._write)
            self._lines.append(line)
        if self._stream is not None:
            self._waiting.append(line)
            if len(self._waiting) > MOST_WAITING:
                self._waiting.popleft()
                self._lose(1, "the store has not answered for too long")
            self._wake.set()

    @property
    def waiting(self) -> int:
        """Entries that the stream does not have yet."""
        return len(self._waiting)

    def start(self) -> None:
        """Begin to send."""
        if self._stream is not None:
            self._sending = asyncio.create_task(self._send_forever(self._stream))

    async def close(self, within: float = 2.0) -> None:
        """Keep what there still is; what the stream does not take in so many seconds is lost."""
        self._write()
        if self._sending is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(within):
                    while self._waiting:  # noqa: ASYNC110 - the sender tells nobody
                        await asyncio.sleep(0.01)
            self._sending.cancel()
            with suppress(asyncio.CancelledError):
                await self._sending
        if self._waiting:
            self._lose(len(self._waiting), "the store did not answer before the end")
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if self._file is None or not lines:
            return
        try:
            self._file.write(b"\n".join(lines) + b"\n")
        except OSError as error:
            self._lose(len(lines), f"the file cannot be written ({error.strerror})")
        else:
            self._kept()

    async def _send_forever(self, stream: UsageStream) -> None:
        while True:
            await self._wake.wait()
            await asyncio.sleep(GATHER)
            self._wake.clear()
            while self._waiting:
                batch = list(islice(self._waiting, MOST_TOGETHER))
                try:
                    await stream.add(batch)
                except StoreUnavailable:
                    await asyncio.sleep(AGAIN)
                    continue
                # Those that were sent may have been pushed out at the left meanwhile; nothing is sent twice for it.
                for line in batch:
                    if self._waiting and self._waiting[0] is line:
                        self._waiting.popleft()

    def _lose(self, count: int, why: str) -> None:
        self.lost += count
        if not self._losing:
            self._losing = True
            self._tell(f"usage records are lost: {why}")

    def _kept(self) -> None:
        if self._losing:
            self._losing = False
            self._tell("usage records are kept again")
