"""Single flight: one call for all requests of a process that ask for the same at the same time.

Owns who waits for what, and that the call goes on as long as anybody waits. Refuses to know what is called, and who may
have the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Generic, Protocol, TypeVar

from gateway.cache.entry import Entry


class Piece(Protocol):
    """A piece of an answer."""

    @property
    def last(self) -> bool: ...


P = TypeVar("P", bound=Piece)
S = TypeVar("S")


class Flight(Generic[P, S]):
    """One answer under way. `source` says where it comes from, once its first piece is there; `entry` is all of it, in
    the end; neither ever comes where it fails.

    Invariant: the call is cancelled when nobody waits for it any more, and not before; once all pieces are there it is
    not cancelled at all, so that they can be stored.
    """

    def __init__(self, flights: Flights[P, S], key: bytes) -> None:
        self.key = key
        self.source: S | None = None
        self.entry: Entry | None = None
        self.pieces: list[P] = []
        self.ended = False
        self.failure: BaseException | None = None
        self._flights = flights
        self._waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def start(self, call: Coroutine[Any, Any, None]) -> None:
        """Make the call in a task of its own, so that it outlives the request that came first."""
        self._task = asyncio.create_task(call)
        self._flights.calls.add(self._task)
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._flights.calls.discard(task)
        if not task.cancelled() and (defect := task.exception()) is not None:
            self.fails(defect)
        self.ends(None)
        self.forget()

    # What the call tells.

    def begins(self, source: S) -> None:
        """The first piece comes next, from there."""
        self.source = source

    def add(self, piece: P) -> None:
        """One more piece."""
        self.pieces.append(piece)
        self._tell()

    def ends(self, entry: Entry | None) -> None:
        """All is said: `entry` is the whole answer, None where there is none. Told once, or a second time in vain."""
        if not self.ended:
            self.ended, self.entry = True, entry
            self._tell()

    def fails(self, failure: BaseException) -> None:
        """There is no answer, for this reason."""
        self.failure = failure
        self.ends(None)

    def forget(self) -> None:
        """Whoever comes from now on does not join."""
        self._flights.forget(self)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # What those who wait do.

    @property
    def left(self) -> bool:
        """Whether it ended because whoever was to make the call left before."""
        return self.ended and self.source is None and self.entry is None and self.failure is None

    def join(self) -> None:
        """One more waits. Each that joins leaves once."""
        self._waiting += 1

    def leave(self) -> None:
        """One less waits."""
        self._waiting -= 1
        if self._waiting == 0 and not self.ended and not (self.pieces and self.pieces[-1].last):
            self.ends(None)
            self.forget()
            if self._task is not None:
                self._task.cancel()

    async def begun(self) -> S | None:
        """Where the answer comes from; None where it failed, or is whole without having come in pieces."""
        while not self.pieces and not self.ended:
            await self._changed.wait()
        return self.source if self.pieces else None

    async def whole(self) -> Entry | None:
        """The whole answer; None where it failed."""
        while not self.ended:
            await self._changed.wait()
        return self.entry

    async def piece(self, at: int) -> P | None:
        """The piece at that position; None where there is none and never will be."""
        while at >= len(self.pieces):
            if self.ended or (self.pieces and self.pieces[-1].last):
                return None
            await self._changed.wait()
        return self.pieces[at]


class Flights(Generic[P, S]):
    """The flights of one process, by key. Invariant: at most one flight of a key can be joined."""

    def __init__(self) -> None:
        self._open: dict[bytes, Flight[P, S]] = {}
        self.calls: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def joined(self, key: bytes) -> tuple[Flight[P, S], bool]:
        """The flight of the key, joined; and whether it is new, so that whoever asks is to begin it."""
        flight = self._open.get(key)
        new = flight is None
        if flight is None:
            flight = self._open[key] = Flight(self, key)
        flight.join()
        return flight, new

    def alone(self, key: bytes) -> Flight[P, S]:
        """A flight that nobody else joins, joined."""
        flight = Flight(self, key)
        flight.join()
        return flight

    def forget(self, flight: Flight[P, S]) -> None:
        """Nobody joins it any more."""
        if self._open.get(flight.key) is flight:
            del self._open[flight.key]

    async def settled(self) -> None:
        """Wait for calls that go on though nobody waits: they store what they have."""
        if self.calls:
            await asyncio.gather(*self.calls, return_exceptions=True)
