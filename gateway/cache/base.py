"""What a cache is: the contract of `claim`, `put` and the rest, whoever keeps the entries.

Owns what may be told of a cache and what may be chosen of it. Refuses policy: who may get an answer is not asked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from gateway.cache.entry import Entry

Claim = Literal["won", "taken"]
LEASE_SECONDS = 0.8  # of a claim: so long after a replica died, others go on


class CacheUnavailable(Exception):
    """The store did not answer in time, or refused. It counts as a miss."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Entries of this tenant, of the model asked for, of the deployment that answered; None is any."""

    tenant: str | None = None
    model: str | None = None
    deployment: str | None = None

    def has(self, entry: Entry) -> bool:
        """Whether it is one of them."""
        return (
            self.tenant in (None, entry.tenant)
            and self.model in (None, entry.model)
            and self.deployment in (None, entry.deployment)
        )


EVERYTHING = Chosen()


@dataclass(frozen=True, slots=True)
class Figures:
    """How many entries there are and their bytes; and so by (tenant, model asked for, deployment)."""

    entries: int
    bytes: int
    by: Mapping[tuple[str, str, str], tuple[int, int]]


@dataclass(slots=True)
class Counts:
    """Since start. `unavailable`: how often what replicas share could not be asked, which counts as a miss."""

    hits: int = 0
    misses: int = 0
    stores: int = 0
    too_large: int = 0
    unavailable: int = 0


class Cache(Protocol):
    """Keeps entries by key, each until its time is over or something newer needs the room. `now`: seconds since
    1970."""

    async def get(self, key: bytes, now: float) -> Entry | None:
        """The entry. Raises `CacheUnavailable`."""

    async def claim(self, key: bytes, token: str, now: float) -> Entry | Claim:
        """The entry; or, where there is none, `won` for whoever is to make it, and `taken` while somebody else is.
        A claim ends with `release` or LEASE_SECONDS after it was made or renewed last. Raises `CacheUnavailable`."""

    async def renew(self, key: bytes, token: str) -> None:
        """Go on with a claim. Raises `CacheUnavailable`."""

    async def release(self, key: bytes, token: str) -> None:
        """Give a claim up, if it is still that one. Raises `CacheUnavailable`."""

    async def put(self, key: bytes, entry: Entry, ttl: float, now: float, token: str = "") -> bool:
        """Keep the entry for `ttl` seconds, and give up the claim of that token, if it is still that one; false where
        it is too large, and then nothing is done. Raises `CacheUnavailable`."""

    async def purge(self, chosen: Chosen) -> int:
        """Forget what is chosen, and say how many entries that were. Raises `CacheUnavailable`."""

    async def figures(self, now: float) -> Figures:
        """What is there. Raises `CacheUnavailable`."""
