"""Stored answers on the request path: which requests may have one, where it may lie, and who may be given it.

Owns these three questions, and the figures of the cache. Refuses to call anything: sharing.py does, where there is no
answer yet.

An answer to a request that carries a label, or that an invariant concerns, lies in this process, or in what replicas
share only where that is on premises and all invariants allow it. Nothing of a request that may leave masked is stored:
what another one with the same text may see depends on how each of them went out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson

from gateway.backends.base import Chunk
from gateway.cache import (
    Cache,
    CacheUnavailable,
    Chosen,
    Claim,
    Counts,
    Entry,
    Figures,
    Flights,
    MemoryCache,
    Unfit,
    Wanted,
    is_complete,
    is_deterministic,
    kept_of,
    key_of,
    packed,
    target_of,
    uncacheable,
    wanted_in,
    whole_of,
)
from gateway.cache.base import LEASE_SECONDS
from gateway.decision import Caching, Decision
from gateway.gates import static_gate
from gateway.policy import Policy
from gateway.types import ON_PREMISES, ChatRequest, Permit, RequestFacts, Usage

RENEW_EVERY = LEASE_SECONDS / 4
LOOK_EVERY = 0.05  # seconds between looks at what another replica is making; the first come sooner


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the answer of a flight comes from. `headers` are those of the request that made the call, `stream` its
    form."""

    deployment: str
    zone: str
    target: str
    headers: list[tuple[bytes, bytes]]
    stream: bool


@dataclass(slots=True)
class Use:
    """How one request uses the cache: its key, and the cache where its answer may lie. `tenant` is empty where others
    may have the answer; `claimed` is whether a claim to make it is still to be given up."""

    key: bytes
    cache: Cache
    caching: Caching
    wanted: Wanted
    tenant: str
    claimed: bool = False

    @property
    def most_age(self) -> float:
        """Seconds that a stored answer may be old: by today's policy, whatever counted when it was stored."""
        ttl, asked = self.caching.ttl, self.wanted.max_age
        return ttl if asked is None else min(ttl, asked)


@dataclass(slots=True)
class Answers:
    """The stored answers of one gateway. `shared` is what replicas share, in the zone `shared_zone`; None where there
    is none. `secret` keys the digests. `wall`: seconds since 1970."""

    memory: MemoryCache
    wall: Callable[[], float]
    new_token: Callable[[], str]
    shared: Cache | None = None
    shared_zone: str | None = None
    secret: bytes = b""
    flights: Flights[Chunk, Origin] = field(default_factory=Flights)
    counts: Counts = field(default_factory=Counts)

    def use(
        self,
        chat: ChatRequest,
        facts: RequestFacts,
        permit: Permit,
        decision: Decision,
        headers: Mapping[str, str],
    ) -> Use | None:
        """How the request uses the cache; None where it does not."""
        caching, wanted = decision.caching, wanted_in(headers)
        if caching is None or not wanted.stores or facts.masked_labels is not None:
            return None
        if caching.when == "deterministic" and not wanted.asks and not is_deterministic(chat):
            return None
        if uncacheable(chat) is not None:
            return None
        tenant = "" if caching.scope == "shared" and not facts.labels and permit.zones is None else facts.tenant
        key = key_of(chat, tenant or None, facts.labels, self.secret)
        return Use(key, self._place(facts, permit), caching, wanted, tenant)

    def _place(self, facts: RequestFacts, permit: Permit) -> Cache:
        shared, zone = self.shared, self.shared_zone
        if shared is None:
            return self.memory
        if not facts.labels and permit.zones is None:
            return shared
        return shared if zone == ON_PREMISES and permit.allows(zone) else self.memory

    def at_once(self, use: Use) -> Entry | None:
        """The stored answer, where nothing must be waited for."""
        return self.memory.at_once(use.key, self.wall()) if use.cache is self.memory else None

    async def look(self, use: Use, token: str) -> Entry | Claim:
        """The stored answer; or `won` where this request is to make it, and then the claim is its own, or `taken` where
        another replica is making it. What cannot be asked is a miss."""
        try:
            return await use.cache.claim(use.key, token, self.wall())
        except CacheUnavailable:
            self.counts.unavailable += 1
            return "won"

    async def made_elsewhere(self, use: Use, token: str) -> Entry | None:
        """The answer that another replica is making; None where this request is to make it after all, and then the
        claim is its own."""
        pause = LOOK_EVERY / 8
        while True:
            await asyncio.sleep(pause)
            said = await self.look(use, token)
            if said != "taken":
                return said if isinstance(said, Entry) else None
            pause = min(2 * pause, LOOK_EVERY)

    @contextlib.asynccontextmanager
    async def claimed(self, use: Use, token: str) -> AsyncIterator[None]:
        """Go on with the claim until the block ends, or `keep` has given it up."""
        if use.cache is self.memory:
            yield
            return
        use.claimed = True
        renewing = asyncio.create_task(_renewed(use, token))
        try:
            yield
        finally:
            renewing.cancel()
            if use.claimed:
                with contextlib.suppress(CacheUnavailable):
                    await use.cache.release(use.key, token)

    def permits(
        self, policy: Policy, facts: RequestFacts, permit: Permit, decision: Decision, origin: Origin | Entry
    ) -> bool:
        """Whether the policy permits this request, today and as it is, what answered there: the deployment still is
        what it was, the rule names it, and no gate but those of the moment is in the way."""
        name = origin.deployment
        deployment = policy.deployments.get(name)
        if deployment is None or deployment.zone != origin.zone or target_of(deployment) != origin.target:
            return False
        named = any(c.deployment == name for c in decision.candidates) or any(
            r.deployment == name for r in decision.rejections
        )
        return named and permit.allows(origin.zone) and static_gate(deployment, facts, permit) is None

    def fresh(self, use: Use, entry: Entry) -> bool:
        """Whether the entry is as young as it must be."""
        return entry.age(self.wall()) <= use.most_age

    def entry_of(
        self, use: Use, chat: ChatRequest, origin: Origin, chunks: Sequence[Chunk], usage: Usage, dropped: Sequence[str]
    ) -> tuple[Entry | None, bool]:
        """The answer that the chunks make up, None where that cannot be given again; and whether it may be stored."""
        data = b"".join([chunk.data for chunk in chunks])
        try:
            answer = whole_of(data, usage) if origin.stream else orjson.loads(data)
            body, deflated = packed(kept_of(answer))
        except Unfit:
            return None, False
        entry = Entry(
            tenant=use.tenant,
            model=chat.model,
            deployment=origin.deployment,
            zone=origin.zone,
            target=origin.target,
            stored_at=self.wall(),
            usage=usage,
            body=body,
            deflated=deflated,
            dropped=tuple(dropped),
        )
        return entry, is_complete(answer, chat.n)

    async def keep(self, use: Use, entry: Entry, token: str) -> None:
        """Store the answer, and give the claim up."""
        try:
            kept = await use.cache.put(use.key, entry, use.caching.ttl, self.wall(), token)
        except CacheUnavailable:
            self.counts.unavailable += 1
            return
        if kept:
            use.claimed = False
            self.counts.stores += 1
        else:
            self.counts.too_large += 1

    async def purge(self, chosen: Chosen) -> int:
        """Forget what is chosen, here and in what replicas share; how many entries that were. Raises
        `CacheUnavailable`."""
        forgotten = await self.memory.purge(chosen)
        return forgotten if self.shared is None else forgotten + await self.shared.purge(chosen)

    async def figures(self) -> Mapping[str, Figures]:
        """What is there, by `memory` and `redis`. Raises `CacheUnavailable`."""
        now = self.wall()
        told = {"memory": await self.memory.figures(now)}
        if self.shared is not None:
            told["redis"] = await self.shared.figures(now)
        return told


async def _renewed(use: Use, token: str) -> None:
    while True:
        await asyncio.sleep(RENEW_EVERY)
        with contextlib.suppress(CacheUnavailable):
            await use.cache.renew(use.key, token)
