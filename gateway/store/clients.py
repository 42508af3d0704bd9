"""Addresses of Redis and the clients of redis-py behind them.

Owns the forms of an address, and that a client never waits and tries again by itself. Refuses to repeat an address: it
may hold a password.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import RedisClusterException, RedisError, ResponseError

Argument = str | bytes | int
Command = tuple[Argument, ...]

_SCANNED_AT_ONCE = 500
FAILURES = (RedisError, RedisClusterException, OSError)  # what a client raises


class Client(Protocol):
    """What is asked of a client of redis-py."""

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        """The replies, or a RedisError in a command's place. Raises one of `FAILURES`."""

    def keys(self, pattern: str) -> AsyncIterator[bytes]:
        """The names of all keys like the pattern, of every node. Raises one of `FAILURES`."""

    async def close(self) -> None: ...


class _Single:
    """One server, or the master that Sentinels name."""

    def __init__(self, redis: Redis, sentinels: Sequence[Redis] = ()) -> None:
        self._redis = redis
        self._sentinels = sentinels

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._redis.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return await pipeline.execute(raise_on_error=False)

    def keys(self, pattern: str) -> AsyncIterator[bytes]:
        return self._redis.scan_iter(match=pattern, count=_SCANNED_AT_ONCE)

    async def close(self) -> None:
        for client in (self._redis, *self._sentinels):
            await client.aclose()


class _Cluster:
    """A cluster: each command goes to the node that has its key, one pipeline for each node, all at once."""

    def __init__(self, redis: RedisCluster) -> None:
        self._redis = redis

    async def send(self, commands: Sequence[Command]) -> list[Any]:
        pipeline = self._redis.pipeline()
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = await pipeline.execute(raise_on_error=False, allow_redirections=True)
        for reply in replies:
            if isinstance(reply, BaseException) and not isinstance(reply, ResponseError):
                raise reply
        return replies

    def keys(self, pattern: str) -> AsyncIterator[bytes]:
        return self._redis.scan_iter(match=pattern, count=_SCANNED_AT_ONCE)

    async def close(self) -> None:
        await self._redis.aclose()


def checked_url(url: str) -> str:
    """The address. Raises ValueError where it cannot be one; the message repeats nothing of it."""
    client_of(url, 1.0)
    return url


_FORMS = "redis://host:6379/0, rediss://, unix://, redis+sentinel://host,host/SERVICE or redis+cluster://host,host"


def client_of(url: str, timeout: float) -> Client:
    """A client that connects later, tries nothing again and knows no time limit but for Sentinels, which are given
    `timeout` seconds each. Raises ValueError where the address cannot be one."""
    options: dict[str, Any] = {
        "socket_timeout": None,  # whoever asks counts the whole exchange
        "socket_connect_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
    }
    try:
        scheme, _, rest = url.partition("://")
        if scheme in ("redis", "rediss", "unix"):
            return _Single(Redis.from_url(url, **options))
        if scheme in ("redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"):
            return _of_many(scheme, rest, options, timeout)
    except (ValueError, TypeError, *FAILURES):
        pass
    raise ValueError(f"must be an address such as {_FORMS}")


def _of_many(scheme: str, rest: str, options: dict[str, Any], timeout: float) -> Client:
    """Sentinels or a cluster. Raises ValueError."""
    parts = urlsplit(f"redis://{rest}")
    before, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = before.partition(":")
    if at:
        options |= {"username": unquote(user) or None, "password": unquote(password) if colon else None}
    if scheme.startswith("rediss"):
        options["ssl"] = True
    sentinel = scheme.endswith("sentinel")
    addresses = [_address(host, 26379 if sentinel else 6379) for host in hosts.split(",")]
    service, _, db = parts.path.strip("/").partition("/")
    if parts.query or parts.fragment or (not sentinel and service):
        raise ValueError("an address of several hosts ends with them")
    if not sentinel:
        nodes = [ClusterNode(host, port) for host, port in addresses]
        return _Cluster(RedisCluster(startup_nodes=nodes, **options))
    if not service:
        raise ValueError("a service is needed")
    secure = {"ssl": True} if "ssl" in options else {}
    of_sentinels = {"socket_timeout": timeout, "socket_connect_timeout": timeout, "retry": options["retry"], **secure}
    sentinels = Sentinel(addresses, sentinel_kwargs=of_sentinels)  # type: ignore[no-untyped-call]
    master = sentinels.master_for(unquote(service), redis_class=Redis, db=int(db or 0), **options)
    return _Single(master, sentinels.sentinels)


def _address(text: str, port: int) -> tuple[str, int]:
    parts = urlsplit(f"redis://{text}")
    if not parts.hostname or parts.path or parts.username is not None:
        raise ValueError("a host is needed")
    return parts.hostname, parts.port or port
