"""Owns the way of one request's text from the engine to whoever awaits it; refuses threads (event loop only)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from local_engine.errors import RequestError
from local_engine.sequence import FinishReason, Likelihood


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that is new, and in the last one why it is the last. `completion_tokens` counts the end token as well.
    `likelihoods` are those of the tokens that came since the delta before, where they are asked for."""

    text: str
    completion_tokens: int = 0
    finish: FinishReason | None = None
    error: RequestError | None = None
    likelihoods: tuple[Likelihood, ...] = ()
    cached_tokens: int = 0


class Output:
    """One request's deltas, in batches of what has come since the last look; used on the event loop only.

    Invariant: the last delta, and only that, has a `finish`; after it the iteration ends.
    """

    def __init__(self, close: Callable[[], None]) -> None:
        self._close = close
        self._ready: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._final = False

    def push(self, delta: Delta) -> None:
        """Add a delta; what comes after the final one is dropped (an abort may cross a last token)."""
        if self._final:
            return
        self._final = delta.finish is not None
        self._ready.append(delta)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def close(self) -> None:
        """Abort the request if it has not ended."""
        if not self._final:
            self._close()

    def __aiter__(self) -> Output:
        return self

    async def __anext__(self) -> list[Delta]:
        if not self._ready:
            if self._final:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        return ready
