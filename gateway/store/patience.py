"""How long something may take, where the event loop itself may be late: then this process was busy, and what has come
meanwhile is read before the time is said to be over. But read it is at once or never: however busy the process is and
stays, each time ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LATE = 0.005  # seconds by which a timer may be late
GRACE = 0.02  # seconds for what has come meanwhile
PARTS = 4  # of a time; each is over in one turn of the event loop at the soonest, and a reply is read in two or three
LEAST_TURNS, MOST_TURNS = 3, 8  # of the event loop, after a deadline that it was late for


class Overdue:
    """Says that something takes too long, every so many seconds until it is cancelled. They pass in parts, and a part
    that comes to its end late has been one part: so this process being busy for once makes nothing overdue that has
    come meanwhile, and being busy all the time makes the seconds longer, but not endless."""

    def __init__(self, seconds: float, say: Callable[[], None]) -> None:
        self._part = seconds / PARTS
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._left = PARTS
        self._timer = self._loop.call_later(self._part, self._passed)

    def _passed(self) -> None:
        self._left -= 1
        self._timer = self._loop.call_later(self._part, self._passed)
        if not self._left:
            self._left = PARTS
            self._say()

    def cancel(self) -> None:
        """It is over."""
        self._timer.cancel()


class Patience:
    """Cancels what takes longer than so many seconds, counted as `Overdue` counts, and raises TimeoutError instead."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._overdue = Overdue(self._seconds, self._cancel)

    def _cancel(self) -> None:
        self._overdue.cancel()
        if self._task is not None:
            self._over = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._overdue.cancel()
        if not self._over or self._task is None:
            return
        self._task.uncancel()
        if kind is asyncio.CancelledError:
            raise TimeoutError


class Deadline:
    """Calls `over` within so many seconds, unless it is cancelled before. Where the event loop is late for that, what
    has come is read first: a few turns of it, which take less than a millisecond unless it is still busy, and then
    `GRACE` at most."""

    __slots__ = ("_due", "_handle", "_loop", "_over", "_turns", "_until")

    def __init__(self, seconds: float, over: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._due = self._loop.time() + seconds - LATE  # so that one which is a little late is in time
        self._over = over
        self._turns = 0
        self._until = 0.0
        self._handle: asyncio.Handle = self._loop.call_at(self._due, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        if not self._turns:
            if now - self._due <= LATE:
                self._over()
                return
            self._until = now + GRACE
        if self._turns == MOST_TURNS or (self._turns >= LEAST_TURNS and now >= self._until):
            self._over()
            return
        self._turns += 1
        self._handle = self._loop.call_soon(self._check)

    def cancel(self) -> None:
        """It has come."""
        self._handle.cancel()
