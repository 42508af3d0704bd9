"""One stored answer: what it says, and where it came from.

Owns the written form and the compression. Pure. Refuses to be read by another version of itself: such an entry is none.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from gateway.types import Deployment, Usage

T = TypeVar("T")

_VERSION = 1
_COMPRESS_ABOVE = 512  # bytes; below, compressing gains little
_LEVEL = 1
_LENGTH = 4  # bytes that say how long the head is


@dataclass(frozen=True, slots=True)
class Entry:
    """The answer of `deployment` in `zone`, as a plain answer on the OpenAI wire, in `body`, deflated where `deflated`.
    `tenant` is empty where all may share it; `model` is the name asked for; `target` what stood behind the
    deployment's name; `stored_at` is in seconds since 1970. `dropped` are parameters that the provider did not get."""

    tenant: str
    model: str
    deployment: str
    zone: str
    target: str
    stored_at: float
    usage: Usage
    body: bytes
    deflated: bool = False
    dropped: tuple[str, ...] = ()

    @property
    def answer(self) -> bytes:
        """The plain answer's JSON. Raises ValueError where the body is none of ours."""
        if not self.deflated:
            return self.body
        try:
            return zlib.decompress(self.body)
        except zlib.error:
            raise ValueError("the body cannot be inflated") from None

    @property
    def size(self) -> int:
        """Bytes, with what it takes to keep it."""
        return len(self.body) + _OVERHEAD

    def age(self, now: float) -> float:
        """Seconds; never negative, though clocks of replicas differ."""
        return max(0.0, now - self.stored_at)

    def head(self, sealed: str | None = None) -> bytes:
        """What stands in clear beside the rest, as JSON: whose it is and where it came from. `sealed` names the secret
        of the rest."""
        told: dict[str, Any] = {
            "v": _VERSION,
            "tenant": self.tenant,
            "model": self.model,
            "deployment": self.deployment,
            "zone": self.zone,
            "target": self.target,
            "at": self.stored_at,
            "deflated": self.deflated,
            "sealed": sealed,
        }
        return orjson.dumps(told)

    def rest(self) -> bytes:
        """What does not, but for the body: as JSON. Parameters that were dropped are the caller's words."""
        usage = self.usage
        counts = [usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens]
        return orjson.dumps({"usage": counts, "dropped": self.dropped, "crc": zlib.crc32(self.body)})


_OVERHEAD = 600  # of an entry and its key in memory, measured with tracemalloc


def packed(body: bytes) -> tuple[bytes, bool]:
    """The body as it is stored, and whether that is deflated."""
    if len(body) > _COMPRESS_ABOVE:
        smaller = zlib.compress(body, _LEVEL)
        if len(smaller) < len(body):
            return smaller, True
    return body, False


def framed(head: bytes, body: bytes) -> bytes:
    """Head and body as one value."""
    return len(head).to_bytes(_LENGTH, "big") + head + body


def unframed(value: bytes) -> tuple[bytes, bytes]:
    """Head and body again. Raises ValueError where the value is none of ours; of one that is cut off, the body is."""
    end = _LENGTH + int.from_bytes(value[:_LENGTH], "big")
    if not _LENGTH < end <= len(value):
        raise ValueError("no entry")
    return value[_LENGTH:end], value[end:]


def entry_of(head: bytes, rest: bytes, body: bytes) -> Entry:
    """The entry that was written. Raises ValueError where it cannot be read, is not whole, or was by another
    version."""
    told, more = orjson.loads(head), orjson.loads(rest)
    try:
        if told["v"] != _VERSION:
            raise ValueError("another version's")
        if more["crc"] != zlib.crc32(body):
            raise ValueError("the body is another one")
        return Entry(
            tenant=_of(str, told["tenant"]),
            model=_of(str, told["model"]),
            deployment=_of(str, told["deployment"]),
            zone=_of(str, told["zone"]),
            target=_of(str, told["target"]),
            stored_at=_of(float, told["at"]),
            usage=Usage(*(_of(int, count) for count in more["usage"])),
            body=body,
            deflated=_of(bool, told["deflated"]),
            dropped=tuple(_of(str, name) for name in more["dropped"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("no entry") from error


def _of(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise ValueError("no entry")
    return value


def target_of(deployment: Deployment) -> str:
    """What stands behind the name: after a change of the model its stored answers are another one's."""
    return f"{deployment.backend} {deployment.model} {deployment.quantization}"
