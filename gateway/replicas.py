"""Where deployments answer: the names of their addresses, looked up every two seconds beside the request path.

Owns one task for each deployment whose addresses may be several, and what makes an address a replica of its own.
Refuses to connect to any, and to believe that a deployment is nowhere: a name that cannot be looked up, or leads to
nothing, changes nothing, and an address that is gone from a name is gone.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from gateway.backends.build import proxied
from gateway.networks import Networks, literal
from gateway.types import ON_PREMISES, Deployment, Replica

RESOLVED_EVERY = 2.0  # seconds; the lookup's own cache and the records' time to live come on top
MOST_REPLICAS = 256  # of a deployment; further addresses are left out

Resolve = Callable[[str], Awaitable[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Watched:
    """A deployment that may be at several places: its addresses, and those of them whose name is looked up."""

    name: str
    urls: tuple[str, ...]
    names: frozenset[str]
    networks: tuple[str, ...]

    @classmethod
    def of(cls, deployment: Deployment) -> Watched | None:
        """None where the deployment is at one place for good.

        Names are looked up of deployments on premises and of engines that say how busy they are. A provider's name
        often leads to other addresses at each look, which are doors to the same house and no replicas.
        """
        d = deployment
        if d.unavailable is not None or d.backend == "litellm" or not d.urls:
            return None
        names: frozenset[str] = frozenset()
        if d.zone == ON_PREMISES or d.is_ours or d.load is not None:
            hosts = {url: urlsplit(url).hostname or "" for url in d.urls}
            names = frozenset(url for url, host in hosts.items() if literal(host) is None and proxied(d, url) is None)
        return cls(d.name, d.urls, names, d.networks) if names or len(d.urls) > 1 else None


class Replicas:
    """What is known of where deployments are. Invariant: after `follow` exactly its deployments are looked up, those
    that were before without a break; after `stop` none is. `known` has those that have replicas."""

    def __init__(
        self,
        found: Callable[[str, tuple[Replica, ...]], None],
        resolve: Resolve | None = None,
        every: float = RESOLVED_EVERY,
    ) -> None:
        """`found` is told of a deployment's replicas when they are others than before. `resolve` gives the IP addresses
        of a name, the preferred ones first, and raises OSError; the system's without it. `every`: seconds between two
        looks."""
        self._found = found
        self._resolve = resolve or system_addresses
        self._every = every
        self._tasks: dict[Watched, asyncio.Task[None]] = {}
        self.known: dict[str, tuple[Replica, ...]] = {}

    def follow(self, watched: Iterable[Watched]) -> None:
        """Look these up from now on. Needs a running event loop."""
        wanted = set(watched)
        for gone in self._tasks.keys() - wanted:
            self._tasks.pop(gone).cancel()
            self.known.pop(gone.name, None)
        for one in wanted - self._tasks.keys():
            places = _Places(one)
            self._tell(one, places)
            self._tasks[one] = asyncio.create_task(self._watch(one, places))

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, watched: Watched, places: _Places) -> None:
        while watched.names:
            for url in sorted(watched.names):
                places.lead(url, await self._addresses(url))
            self._tell(watched, places)
            await asyncio.sleep(self._every)

    async def _addresses(self, url: str) -> Sequence[str]:
        try:
            return await self._resolve(urlsplit(url).hostname or "")
        except (OSError, UnicodeError):
            return ()

    def _tell(self, watched: Watched, places: _Places) -> None:
        replicas = places.replicas()
        if replicas != self.known.get(watched.name, ()):
            self.known[watched.name] = replicas
            self._found(watched.name, replicas)


class _Places:
    """The addresses of one deployment. Invariant: an address of the file whose name has led to several places is told
    apart by IP address from then on, so that the last one that is left is still the same replica."""

    def __init__(self, watched: Watched) -> None:
        self._urls = watched.urls
        self._within = Networks(watched.networks)
        self._apart: dict[str, tuple[str, ...]] = {}

    def lead(self, url: str, addresses: Sequence[str]) -> None:
        """The name leads to these addresses now."""
        places = distinct([address for address in addresses if self._within.hold(address)])
        if len(places) > 1 or (places and url in self._apart):
            self._apart[url] = places

    def replicas(self) -> tuple[Replica, ...]:
        """None while there is one place that is not told apart."""
        if len(self._urls) == 1 and not self._apart:
            return ()
        apart = [Replica(url, place) for url in self._urls for place in self._apart.get(url, (None,))]
        return tuple(apart[:MOST_REPLICAS])


def distinct(addresses: Sequence[str]) -> tuple[str, ...]:
    """One address for each machine behind a name, in order. Where there are as many of IPv4 as of IPv6 they are taken
    to be of the same machines, and those of the family that came first count."""
    unique = list(dict.fromkeys(addresses))
    versions = [ip_address(address.partition("%")[0]).version for address in unique]
    if versions.count(4) == versions.count(6):
        unique = [address for address, version in zip(unique, versions, strict=True) if version == versions[0]]
    return tuple(sorted(unique))


async def system_addresses(host: str) -> list[str]:
    """What the system says. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]
