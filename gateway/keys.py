"""Callers' keys: who presents one, and whether it still holds. Pure.

Owns what a request presents as its key, the look-up, and what a caller without a good key is told. Refuses files (see
keyfile.py) and clocks: the time is an argument.

A secret is known here only as its SHA-256 digest, and is looked up by the whole of it. How long that takes tells about
digests, which nobody can choose without the secret, and never how much of a secret is right.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Literal

from gateway.errors import Unauthenticated
from gateway.types import Caller

Standing = Literal["valid", "expired", "revoked"]

_LONGEST_SECRET = 1_024  # characters; ours have 46
_HOW = "send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"


@dataclass(frozen=True, slots=True)
class Key:
    """A caller's key, by its digest. `expires` is seconds since 1970 in UTC; None where it never does."""

    digest: bytes = field(repr=False)
    caller: Caller
    expires: float | None = None
    revoked: bool = False

    def standing(self, now: float) -> Standing:
        """Whether it holds at `now`, seconds since 1970 in UTC."""
        if self.revoked:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "valid"


class Keyring:
    """The keys of one file. Invariant: no two have the same digest or the same id."""

    __slots__ = ("_by_digest",)

    def __init__(self, keys: Iterable[Key]) -> None:
        self._by_digest = {key.digest: key for key in keys}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_digest.values())

    def __len__(self) -> int:
        return len(self._by_digest)

    def tightened_by(self, other: Keyring) -> Keyring:
        """Of these keys those that the other ring has as well, for as long as both say that they hold."""
        kept = []
        for digest, key in self._by_digest.items():
            found = other._by_digest.get(digest)
            if found is not None:
                expires = min((e for e in (key.expires, found.expires) if e is not None), default=None)
                kept.append(replace(key, expires=expires, revoked=key.revoked or found.revoked))
        return Keyring(kept)

    def without(self, digests: Collection[bytes]) -> Keyring:
        """These keys, those with such a digest revoked."""
        if not digests:
            return self
        return Keyring(replace(key, revoked=True) if key.digest in digests else key for key in self)

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is, whether it holds or not."""
        return self._by_digest.get(digest_of(secret))

    def caller_of(self, headers: Mapping[str, str], now: float) -> Caller:
        """Who presents a key that holds at `now`, seconds since 1970 in UTC. Header names are lower-case. Raises
        `Unauthenticated`."""
        key = self.find(presented(headers))
        if key is None:
            raise Unauthenticated("the key is not known here")
        standing = key.standing(now)
        if standing != "valid":
            was = "has expired" if standing == "expired" else "was revoked"
            raise Unauthenticated(f"the key {was}: ask for a new one")
        return key.caller


@dataclass(frozen=True, slots=True)
class Keys:
    """A key file: `callers` may ask for answers, `operators` may use the admin endpoints."""

    callers: Keyring
    operators: Keyring

    def tightened_by(self, other: Keys) -> Keys:
        """These keys without what the other file takes out, revokes or lets expire."""
        return Keys(self.callers.tightened_by(other.callers), self.operators.tightened_by(other.operators))

    def without(self, digests: Collection[bytes]) -> Keys:
        """These keys, those with such a digest revoked."""
        return Keys(self.callers.without(digests), self.operators.without(digests))


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    return sha256(secret.encode("utf-8", "surrogatepass")).digest()


def presented(headers: Mapping[str, str]) -> str:
    """The secret that a request presents: in `authorization` as a bearer's token, or in `x-api-key`. Both may be there
    if they are the same. Raises `Unauthenticated`."""
    authorization, plain = headers.get("authorization"), headers.get("x-api-key")
    if authorization is None and plain is None:
        raise Unauthenticated(f"a key is needed: {_HOW}")
    secret = plain or ""
    if authorization is not None:
        scheme, _, token = authorization.partition(" ")
        secret = token.strip() if scheme.lower() == "bearer" else ""
        if plain is not None and plain != secret:
            raise Unauthenticated("`authorization` and `x-api-key` hold different keys: send one of them")
    if not secret or len(secret) > _LONGEST_SECRET:
        raise Unauthenticated(f"this is no key: {_HOW}")
    return secret
