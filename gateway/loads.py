"""Asks engines how busy they are, four times a second, and engines elsewhere what they serve; each replica by itself,
and whether it is well.

Owns one task for each engine, and what is sent to it: GETs over httpx to its own address or Unix socket, without
redirects, and without the environment's proxies on premises. Refuses to judge: a reading goes to the fleet, one that
does not come is missed.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from math import inf
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from gateway.engines import Known, known_from
from gateway.readings import LoadReader, Reader, VllmReader
from gateway.snapshot import EngineLoad
from gateway.types import ON_PREMISES, Deployment, Replica

ASKED_EVERY = 0.25  # seconds
PATIENCE = 0.5  # seconds for an answer
DESCRIBED_EVERY = 2.0  # seconds between two tries to learn what an engine serves
HEALTH_EVERY = 1.0  # seconds between two questions whether a replica is well


class Told(Protocol):
    """Who is told; the fleet."""

    def loaded(
        self, name: str, load: EngineLoad, asked_at: float, now: float, replica: Replica | None = None
    ) -> None: ...

    def missed(self, name: str, replica: Replica | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Source:
    """Where a deployment says how busy it is. `uds` is the Unix socket of an engine that the gateway starts, which has
    told its supervisor what it serves; others are asked for that, too. `replica` is the one of several that it is."""

    name: str
    kind: str
    root: str
    uds: str | None = None
    api_key: str | None = field(default=None, repr=False)
    trust_env: bool = False
    replica: Replica | None = None
    authorities: ssl.SSLContext | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(
        cls,
        deployment: Deployment,
        uds: str | None,
        authorities: ssl.SSLContext | None,
        replica: Replica | None = None,
    ) -> Source | None:
        """None where the deployment does not say how busy it is, or has no address."""
        kind = "hybridgate" if deployment.is_ours else deployment.load
        if kind is None or deployment.unavailable is not None or not (uds or deployment.urls):
            return None
        url = deployment.urls[0] if deployment.urls else ""
        root = "http://engine" if uds is not None else (replica.url if replica else url).removesuffix("/v1")
        trust_env = deployment.zone != ON_PREMISES
        return cls(deployment.name, kind, root, uds, deployment.api_key, trust_env, replica, authorities)

    @property
    def extensions(self) -> dict[str, str]:
        """For each request: whose certificate a replica must have."""
        apart = self.replica is not None and self.replica.address is not None
        return {"sni_hostname": urlsplit(self.root).hostname or ""} if apart else {}

    def reader(self) -> Reader:
        return VllmReader() if self.kind == "vllm" else LoadReader()

    def client(self) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        root = self.root
        if self.replica is not None and (address := self.replica.address) is not None:
            parts = urlsplit(root)
            headers["host"] = parts.netloc
            host = f"[{address}]" if ":" in address else address
            root = parts._replace(netloc=host if parts.port is None else f"{host}:{parts.port}").geturl()
        verify: ssl.SSLContext | bool = True if self.authorities is None else self.authorities
        transport = httpx.AsyncHTTPTransport(uds=self.uds) if self.uds is not None else None
        return httpx.AsyncClient(
            base_url=root,
            headers=headers,
            timeout=PATIENCE,
            transport=transport,
            trust_env=self.trust_env,
            verify=verify,
        )


class Loads:
    """The engines that are asked. Invariant: after `follow` exactly its sources are asked, those that were asked
    before without a break; after `stop` none is."""

    def __init__(
        self,
        told: Told,
        described: Callable[[str, Known], None],
        clock: Callable[[], float],
        *,
        client: Callable[[Source], httpx.AsyncClient] = Source.client,
    ) -> None:
        """`described` is called with what an engine elsewhere says that it serves. `clock` is the fleet's."""
        self._told = told
        self._described = described
        self._clock = clock
        self._client = client
        self._tasks: dict[Source, asyncio.Task[None]] = {}
        self._said: dict[str, bytes] = {}
        self.known: dict[str, Known] = {}

    def follow(self, sources: Iterable[Source]) -> None:
        """Ask these from now on. Needs a running event loop."""
        wanted = set(sources)
        named = {source.name for source in wanted}
        for source in self._tasks.keys() - wanted:
            self._tasks.pop(source).cancel()
            if source.name not in named:
                self.known.pop(source.name, None)
                self._said.pop(source.name, None)
        for source in wanted - self._tasks.keys():
            self._tasks[source] = asyncio.create_task(self._ask(source))

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        self._tasks.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, source: Source) -> None:
        reader, loop = source.reader(), asyncio.get_running_loop()
        elsewhere = source.uds is None and source.kind == "hybridgate"
        describe_at = loop.time() if elsewhere else inf
        well, look_at = True, loop.time() if source.replica is not None else inf
        async with self._client(source) as client:
            while True:
                begun = loop.time()
                if begun >= look_at:
                    well = await _well(source, client)
                    look_at = begun + (HEALTH_EVERY if well else 0.0)
                heard = well and await self._read(source, reader, client)
                if not well:
                    self._told.missed(source.name, source.replica)
                if elsewhere and not heard:
                    describe_at = begun  # when it is back, it may serve something else
                elif begun >= describe_at:
                    describe_at = inf if await self._describe(source, client) else begun + DESCRIBED_EVERY
                await asyncio.sleep(max(0.0, begun + ASKED_EVERY - loop.time()))

    async def _read(self, source: Source, reader: Reader, client: httpx.AsyncClient) -> bool:
        asked_at = self._clock()
        try:
            response = await client.get(reader.path, extensions=source.extensions)
            response.raise_for_status()
            load = reader.read(response.content)
        except (httpx.HTTPError, ValueError):
            self._told.missed(source.name, source.replica)
            return False
        self._told.loaded(source.name, load, asked_at, self._clock(), source.replica)
        return True

    async def _describe(self, source: Source, client: httpx.AsyncClient) -> bool:
        """Learn what the engine serves; False where it is to be asked again."""
        with suppress(httpx.HTTPError, ValueError):
            response = await client.get("/tokenizer", timeout=10 * PATIENCE, extensions=source.extensions)
            if response.status_code == 404:
                return True  # it does not say
            response.raise_for_status()
            said = sha256(response.content).digest()
            if said == self._said.get(source.name):
                return True  # another replica has said it
            described: Mapping[str, Any] = response.json()
            known = self.known[source.name] = await known_from(described)
            self._said[source.name] = said
            self._described(source.name, known)
            return True
        return False


async def _well(source: Source, client: httpx.AsyncClient) -> bool:
    """Whether the engine calls itself well; one that does not say is."""
    try:
        response = await client.get("/health", extensions=source.extensions)
    except httpx.HTTPError:
        return False
    return response.is_success or response.status_code == 404
