"""A deployment at several addresses: each replica with connections of its own.

Owns which connections lead to which replica, and lets those to one that is gone end in peace. Refuses to choose: the
call says where it goes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from gateway.backends import upstream as say
from gateway.backends.base import Answer, Backend, Call
from gateway.backends.openai import OpenAIBackend
from gateway.errors import ConnectFailed
from gateway.types import Replica


class ReplicatedBackend:
    """Implements `Backend`. Invariant: a call is sent to its replica and nowhere else, and to none that was not in the
    last `follow`; what was begun before goes on."""

    def __init__(self, alone: Backend, opened: Callable[[Replica], OpenAIBackend]) -> None:
        """`alone` takes the calls that name no replica: those of a deployment that has one address as yet."""
        self._alone = alone
        self._opened = opened
        self._replicas: dict[Replica, OpenAIBackend] = {}
        self._retired: list[OpenAIBackend] = []

    def follow(self, replicas: Collection[Replica]) -> None:
        """These are the replicas now."""
        for gone in self._replicas.keys() - replicas:
            backend = self._replicas.pop(gone)
            backend.retire()
            self._retired.append(backend)
        self._retired = [backend for backend in self._retired if not backend.at_rest]
        for replica in replicas:
            if replica not in self._replicas:
                self._replicas[replica] = self._opened(replica)

    def open(self, call: Call) -> Coroutine[Any, Any, Answer]:
        if call.replica is None:
            return self._alone.open(call)
        backend = self._replicas.get(call.replica)
        return _gone() if backend is None else backend.open(call)

    async def close(self) -> None:
        backends = [self._alone, *self._replicas.values(), *self._retired]
        await asyncio.gather(*(backend.close() for backend in backends))


async def _gone() -> Answer:
    raise ConnectFailed(say.UNREACHABLE)
