"""How long something may take, where the event loop itself may be late: a timer that is says that this process was
busy, and then an answer that may have come is read before the time is said to be over."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LATE = 0.005  # seconds by which a timer may be late
GRACE = 0.02  # seconds for what has come meanwhile


class Overdue:
    """Says that something takes too long, every so many seconds until it is cancelled; not where the timer itself is
    late, because then this process was busy, and what has come meanwhile is to be read first."""

    def __init__(self, seconds: float, say: Callable[[], None]) -> None:
        self._seconds = seconds
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._again(seconds)

    def _again(self, seconds: float) -> None:
        self._due = self._loop.time() + seconds
        self._timer = self._loop.call_at(self._due, self._check)

    def _check(self) -> None:
        late = self._loop.time() - self._due > LATE
        self._again(GRACE if late else self._seconds)
        if not late:
            self._say()

    def cancel(self) -> None:
        """It is over."""
        self._timer.cancel()


class Patience:
    """Cancels what takes longer than so many seconds, and raises TimeoutError instead. Where the timer itself is late,
    this process was busy: what has come meanwhile is read before the time is said to be over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    async def __aenter__(self) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        due = self._loop.time() + self._seconds
        self._timer = self._loop.call_at(due, self._check, due)

    def _check(self, due: float) -> None:
        now = self._loop.time()
        if now - due > LATE:
            self._timer = self._loop.call_at(now + GRACE, self._check, now + GRACE)
        elif self._task is not None:
            self._over = True
            self._task.cancel()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._timer.cancel()
        if not self._over or self._task is None:
            return
        self._task.uncancel()
        if kind is asyncio.CancelledError:
            raise TimeoutError
