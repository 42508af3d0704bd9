"""Clients that ask the gateways in turn, and go on asking where they are refused.

Owns who asks whom when. Refuses to judge: what the provider saw does that.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

import aiohttp
import orjson

from tests.bench.limits.stage import Stage, secret_of

MAX_TOKENS = 90
NO_ANSWER = 0  # the status of a request whose connection broke


@dataclass(frozen=True, slots=True)
class Said:
    """What became of one request: its status (0: none came), and the seconds until then."""

    key: str
    at: float
    status: int
    seconds: float


@dataclass
class Crowd:
    """Clients of some keys on a stage."""

    stage: Stage
    draw: random.Random
    said: list[Said] = field(default_factory=list)
    most_open: int = 0
    _open: int = 0
    _turns: Counter[str] = field(default_factory=Counter)
    _numbers: count[int] = field(default_factory=count)

    async def ask(self, key: str, fault: str = "", *, stream: bool = False, leaves_after: float | None = None) -> Said:
        """One request at the gateway whose turn it is for this key."""
        number = next(self._numbers)
        self._turns[key] += 1
        url = self.stage.urls[self._turns[key] % len(self.stage.urls)] + "/v1/chat/completions"
        messages = [{"role": "user", "content": f"{number:08d} {fault}".ljust(16)}]
        body = {"model": "auto", "max_tokens": MAX_TOKENS, "messages": messages}
        body |= {"stream": True} if stream else {"user": "even"}  # as long as the other, so that as much is reserved
        headers = {"authorization": f"Bearer {secret_of(key)}", "content-type": "application/json"}
        began, status = time.perf_counter(), NO_ANSWER
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                async with asyncio.timeout(leaves_after):
                    async with self.stage.http.post(url, data=orjson.dumps(body), headers=headers) as answer:
                        await answer.read()
                        status = answer.status
        finally:
            self._open -= 1
        said = Said(key, time.time(), status, time.perf_counter() - began)
        self.said.append(said)
        return said

    async def press(self, keys: Sequence[str], clients: int, seconds: float, pause: tuple[float, float]) -> None:
        """All at once, and then each again: at once where it was answered, after a pause (between so many seconds)
        where it was not, whatever the answer said of trying again."""
        end = time.monotonic() + seconds

        async def client(key: str) -> None:
            while time.monotonic() < end:
                said = await self.ask(key)
                if said.status != 200:
                    await asyncio.sleep(min(self.draw.uniform(*pause), max(0.0, end - time.monotonic())))

        await asyncio.gather(*(client(keys[number % len(keys)]) for number in range(clients)))

    def statuses(self, keep: Callable[[Said], bool] = lambda _: True) -> Counter[int]:
        """How many of each status."""
        return Counter(said.status for said in self.said if keep(said))
