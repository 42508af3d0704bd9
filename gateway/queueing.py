"""An attempt that waits in an engine's queue while another deployment could still answer in time.

Owns when the queue is left. Refuses to know what is asked there and what comes of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from gateway.fleet import Fleet, Flight
from gateway.routing import look_again
from gateway.types import Patience


class Queueing:
    """Invariant: once `left`, the limit on the attempt's time is over."""

    def __init__(
        self, fleet: Fleet, clock: Callable[[], float], flight: Flight, patience: Patience, limit: asyncio.Timeout
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._flight = flight
        self._patience = patience
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(patience.after_s, self._look)
        self.left = False

    def over(self) -> None:
        """The first token came, or the attempt failed."""
        self._timer.cancel()

    def _look(self) -> None:
        """Leave, unless the first token is about to come; then look again, as long as leaving is of use."""
        if not self._fleet.comes_soon(self._flight, self._patience.left_s, self._clock()):
            self.left = True
            self._limit.reschedule(self._loop.time())
            return
        more = look_again(self._patience)
        if more is not None:
            self._patience = more
            self._timer = self._loop.call_later(more.after_s, self._look)
