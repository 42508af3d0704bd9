"""The connection to Redis, or to whatever speaks its protocol, that replicas share: one for each process.

Owns how long anybody waits for it (a request `MOST_WAIT` in all), the breaker that makes a slow server as harmless as a
dead one (an exchange counts as failed again and again while it takes too long), and how many replicas there are.
Refuses to know what is stored, and to try anything again: nobody knows whether it was done.

How to use it:

    got, made = await store.run(("GET", key), script.call([key], [argument]), within=seconds)

sends all commands in one round trip, together with what others ask for in the same turn of the event loop. Each place
of the answer holds the reply as bytes, int, list or None, or a `StoreUnavailable` where the server refused that command
alone (`reply_of` raises it). `StoreUnavailable` is raised where nobody knows anything: at once, without waiting, while
`store.state.up` is false. Whoever asks more than once for a request passes what is left of `MOST_WAIT` as `within`.
Keys that one script uses share a hash tag; commands with different ones may go to different nodes of a cluster.

Addresses: `redis://`, `rediss://` (TLS) and `unix://` as redis-py takes them; Sentinels as
`redis+sentinel://user:password@host:26379,host:26379/SERVICE/0`; a cluster as
`redis+cluster://user:password@host:7000,host:7001`; the last two over TLS with `rediss+` in front.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha1
from typing import Any

from redis.exceptions import NoScriptError, RedisError

from gateway.store.clients import FAILURES, Argument, Command, client_of
from gateway.store.patience import Deadline, Overdue, Patience

TIMEOUT = 0.04  # seconds for one exchange, connecting included; redis-py's own defaults wait and try again for 12 s
MOST_WAIT = 0.1  # seconds that one request waits for all its exchanges together
FAILURES_TO_OPEN = 3  # in a row; one that goes on counts again and again
OVERDUE = 0.75  # of TIMEOUT: how often, so that three are over before a request's wait is
LONGEST = 1.0  # seconds for which a late answer is still read, for what it says was done
PROBE_EVERY = 0.25  # seconds, while it is down
HEARTBEAT_EVERY = 1.0  # seconds, while it is up
GONE_AFTER = 5.0  # seconds without a heartbeat after which a replica no longer counts
MOST_FLYING = 2  # exchanges at once, each on a connection of its own; what comes meanwhile goes together in the next
MOST_TOGETHER = 64  # commands of one exchange: so few that a server that is busy answers in time all the same
DEFAULT_PREFIX = "hybridgate"

# What a server says that will not do what it is asked now, whatever that is. (A wrong type or argument is our defect.)
_UNABLE = ("OOM", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS", "MISCONF", "BUSY")
_IN_TIME = "it did not answer in time"
_UNABLE_FOR_US = ("NOAUTH", "WRONGPASS", "NOPERM", "INVALID")


class StoreUnavailable(Exception):
    """The store did not answer in time, or refused. Nothing is known of whether it did what was asked."""


class StoreBusy(StoreUnavailable):
    """The asker's own time was over first, while the store answers others: too many ask at once here."""


class StoreRefused(StoreUnavailable):
    """The server does what others ask, and not this command: our defect, or what its key holds is of another kind."""


@dataclass(frozen=True, slots=True)
class StoreState:
    """Whether the store is asked at all, since when (`since`, seconds of a monotonic clock), and why not: a word or a
    few, without an address. `replicas` is how many gateways were alive when it last said; `failures` counts failed
    exchanges since start."""

    up: bool = True
    reason: str = ""
    since: float = 0.0
    replicas: int = 1
    failures: int = 0


@dataclass(frozen=True, slots=True)
class ScriptCall:
    """A Lua script with its keys and arguments."""

    script: Script
    keys: tuple[str, ...]
    arguments: tuple[Argument, ...]

    def by_hash(self) -> Command:
        """The command for a server that knows the script."""
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.arguments)

    def in_full(self) -> Command:
        """The command for one that does not: it has been restarted, or its scripts were flushed."""
        return ("EVAL", self.script.text, len(self.keys), *self.keys, *self.arguments)


class Script:
    """A Lua script, known to servers by its hash."""

    __slots__ = ("sha", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode()).hexdigest()  # noqa: S324 - what EVALSHA takes

    def call(self, keys: Sequence[str], arguments: Sequence[Argument]) -> ScriptCall:
        """The command to run it."""
        return ScriptCall(self, tuple(keys), tuple(arguments))


_HEARTBEAT = Script(
    """
    local time = redis.call('TIME')
    local now = time[1] * 1000 + math.floor(time[2] / 1000)
    local kept = tonumber(ARGV[2])
    redis.call('ZADD', KEYS[1], string.format('%d', now), ARGV[1]) -- first: a full server refuses nothing after a write
    redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', string.format('%d', now - kept))
    redis.call('PEXPIRE', KEYS[1], 2 * kept)
    return redis.call('ZCARD', KEYS[1])
    """
)


@dataclass(slots=True)
class _Asked:
    """Commands of one asker, and where the replies go: to `replies`, or to `abandoned` where they come too late."""

    commands: Sequence[Command | ScriptCall]
    replies: asyncio.Future[list[Any]]
    abandoned: Callable[[list[Any]], None] | None

    def too_late(self) -> None:
        """The asker waits no longer."""
        if not self.replies.done():
            self.replies.set_exception(StoreBusy("too much is waiting for it"))


class Store:
    """One store, shared by all in this process. Invariant: nobody waits longer than `within`, and nobody at all while
    it is down; one probe at a time finds out when it is up again."""

    def __init__(
        self,
        url: str,
        *,
        timeout: float = TIMEOUT,
        prefix: str = DEFAULT_PREFIX,
        changed: Callable[[StoreState], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`changed` is told when it goes down and when it comes up. Connects later. Raises ValueError where the address
        cannot be one."""
        self.prefix = prefix
        self.state = StoreState(since=clock())
        self._client = client_of(url, timeout)
        self._timeout = timeout
        self._changed = changed
        self._clock = clock
        self._replica = os.urandom(8).hex()
        self._waiting: deque[_Asked] = deque()
        self._flying: dict[asyncio.Task[None], list[_Asked]] = {}
        self._late: set[asyncio.Task[None]] = set()
        self._due = False
        self._in_a_row = 0
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Tell the others that this replica is there, and look whether the store is."""
        self._watch = asyncio.create_task(self._watched())

    async def close(self) -> None:
        """Leave it."""
        tasks = [task for task in (self._watch, *self._flying, *self._late) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._watch is not None and self.state.up:
            with suppress(*FAILURES):
                async with asyncio.timeout(self._timeout):
                    await self._client.send([("ZREM", self._replicas_key, self._replica)])
        with suppress(*FAILURES):
            await self._client.close()

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(
        self,
        *commands: Command | ScriptCall,
        within: float | None = None,
        abandoned: Callable[[list[Any]], None] | None = None,
    ) -> list[Any]:
        """The replies, in order, within so many seconds (`MOST_WAIT` without); see the module. `abandoned` is given
        them where they come after this has raised or was cancelled. Raises `StoreUnavailable`."""
        if not self.state.up:
            raise StoreUnavailable(self.state.reason)
        loop = asyncio.get_running_loop()
        asked = _Asked(commands, loop.create_future(), abandoned)
        self._waiting.append(asked)
        self._take_off(loop)
        seconds = max(MOST_WAIT, 2 * self._timeout) if within is None else within
        deadline = Deadline(seconds, asked.too_late)
        try:
            return await asked.replies
        finally:
            deadline.cancel()

    async def keys(self, pattern: str, within: float = 60.0) -> AsyncIterator[bytes]:
        """The names of all keys like the pattern, some perhaps twice, for an operator who can wait. Raises
        `StoreUnavailable`."""
        if not self.state.up:
            raise StoreUnavailable(self.state.reason)
        try:
            async with asyncio.timeout(within):
                async for name in self._client.keys(pattern):
                    yield name
        except FAILURES as error:  # TimeoutError is an OSError
            raise StoreUnavailable(type(error).__name__) from None

    # Exchanges.

    def _take_off(self, loop: asyncio.AbstractEventLoop) -> None:
        """At the end of this turn, so that what is asked for meanwhile goes along."""
        if self._waiting and not self._due and len(self._flying) < MOST_FLYING:
            self._due = True
            loop.call_soon(self._fly)

    def _fly(self) -> None:
        self._due = False
        batch: list[_Asked] = []
        count = 0
        while self._waiting and (not batch or count + len(self._waiting[0].commands) <= MOST_TOGETHER):
            asked = self._waiting.popleft()
            if not asked.replies.done():
                batch.append(asked)
                count += len(asked.commands)
        if not batch:
            return
        task = asyncio.create_task(self._exchange(batch))
        self._flying[task] = batch
        task.add_done_callback(self._landed)

    def _landed(self, task: asyncio.Task[None]) -> None:
        self._flying.pop(task, None)
        self._late.discard(task)
        self._take_off(asyncio.get_running_loop())

    async def _exchange(self, batch: list[_Asked]) -> None:
        commands = [command for asked in batch for command in asked.commands]
        overdue = Overdue(self._timeout * OVERDUE, lambda: self._failed(_IN_TIME))
        try:
            replies = await self._sent(commands, max(LONGEST, self._timeout))
        except StoreUnavailable as error:
            self._failed(str(error))
            _tell(batch, str(error))
            return
        finally:
            overdue.cancel()
        unable = next((r for r in replies if isinstance(r, _Unable)), None)
        if unable is None:
            self._in_a_row = 0
        else:
            self._failed(str(unable))
        at = 0
        for asked in batch:
            after = at + len(asked.commands)
            if not asked.replies.done():
                asked.replies.set_result(replies[at:after])
            elif asked.abandoned is not None:
                asked.abandoned(replies[at:after])
            at = after

    async def _sent(self, commands: Sequence[Command | ScriptCall], seconds: float) -> list[Any]:
        """The replies to one exchange, within so many seconds; scripts that the server lacks are sent in full. Raises
        `StoreUnavailable`."""
        try:
            async with Patience(seconds):
                plain = [c.by_hash() if isinstance(c, ScriptCall) else c for c in commands]
                replies = await self._client.send(plain)
                missing = [i for i, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
                if missing:
                    again = [c.in_full() for i in missing if isinstance(c := commands[i], ScriptCall)]
                    for i, reply in zip(missing, await self._client.send(again), strict=True):
                        replies[i] = reply
        except TimeoutError:
            raise StoreUnavailable(_IN_TIME) from None
        except FAILURES as error:
            raise StoreUnavailable(_told(error)) from None
        return [_refused(reply) if isinstance(reply, RedisError) else reply for reply in replies]

    # Up and down.

    def _failed(self, reason: str) -> None:
        self._in_a_row += 1
        state = self.state
        self.state = StoreState(state.up, state.reason, state.since, state.replicas, state.failures + 1)
        if state.up and self._in_a_row >= FAILURES_TO_OPEN:
            self._turn(up=False, reason=reason)

    def _turn(self, *, up: bool, reason: str = "") -> None:
        self._in_a_row = 0
        self.state = StoreState(up, reason, self._clock(), self.state.replicas, self.state.failures)
        if not up:  # nobody waits any more; what is under way may end, and then those who asked are gone
            for batch in (*self._flying.values(), self._waiting):
                _tell(batch, reason)
            self._waiting.clear()
            self._late.update(self._flying)
            self._flying.clear()
        self._changed(self.state)

    @property
    def _replicas_key(self) -> str:
        return f"{self.prefix}:{{ledger}}:replicas"

    async def _watched(self) -> None:
        """A heartbeat is a script and a write, so where it works the rest does as well."""
        beat = _HEARTBEAT.call([self._replicas_key], [self._replica, int(GONE_AFTER * 1000)])
        while True:
            try:
                replies = await self._sent([beat], self._timeout)
                replicas = int(reply_of(replies[0]))
            except StoreUnavailable as error:
                self._failed(str(error))
            else:
                self._in_a_row = 0
                state = self.state
                self.state = StoreState(state.up, state.reason, state.since, max(1, replicas), state.failures)
                if not state.up:
                    self._turn(up=True)
            await asyncio.sleep(HEARTBEAT_EVERY if self.state.up and not self._in_a_row else PROBE_EVERY)


class _Unable(StoreUnavailable):
    """The server does nothing of the kind now."""


def reply_of(reply: Any) -> Any:
    """One command's reply. Raises `StoreUnavailable` where the server refused it."""
    if isinstance(reply, StoreUnavailable):
        raise reply
    return reply


def _refused(error: RedisError) -> StoreUnavailable:
    told = _told(error)
    return _Unable(told) if told.startswith((*_UNABLE, *_UNABLE_FOR_US)) else StoreRefused(told)


def _told(error: Exception) -> str:
    """What went wrong in a few words, without the address and without anything that was sent: a server's own word for
    it, else the kind of error."""
    said = (word.strip("-:@'") for word in str(error).split())
    word = next((word for word in said if word in (*_UNABLE, *_UNABLE_FOR_US)), "")
    return word or _WORDS.get(type(error).__name__, type(error).__name__)


_WORDS = {
    "ConnectionRefusedError": "it cannot be reached",
    "ConnectionError": "it cannot be reached",
    "MasterNotFoundError": "the Sentinels name no master",
    "OutOfMemoryError": "OOM",
    "ReadOnlyError": "READONLY",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
    "MasterDownError": "MASTERDOWN",
    "AuthenticationError": "NOAUTH",
    "NoPermissionError": "NOPERM",
    "TimeoutError": "it did not answer in time",
}


def _tell(batch: Iterable[_Asked], reason: str) -> None:
    for asked in batch:
        if not asked.replies.done():
            asked.replies.set_exception(StoreUnavailable(reason))
