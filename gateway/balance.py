"""Which of a deployment's replicas gets a request.

Owns the choice, a pure function of what is known of them and of the request's affinity. Two replicas are looked at and
the less busy one is taken (the power of two choices: Mitzenmacher, IEEE TPDS 12(10), 2001), so that gateways that know
the same do not all run to the same replica. Where the request belongs to a conversation, the first of the two is the
conversation's own: the one with the highest hash of both (rendezvous hashing: Thaler and Ravishankar, IEEE/ACM Trans.
Networking 6(1), 1998), so that a replica that comes or goes moves its own conversations and no others. It has computed
the beginning of the prompt before, and is taken as long as it is not busier by more than that saves. Owns also which
failures lead to another replica. Refuses to keep anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import orjson

from gateway.errors import ConnectFailed, ConnectionLost, GatewayError, UpstreamFailed, UpstreamOverloaded

MOST_LOST = 1  # replicas beside the first that may get a request of which one may have died
SEQUENCE_TOKENS = 64.0  # of prompts to compute, that a sequence which waits or runs weighs as much as
HEADROOM = 2  # sequences that a conversation's own replica may have more than another
_MOST_LOOKED_AT = 16 * 1024  # characters of each of the leading messages: they tell conversations apart
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Affinity:
    """What a request brings to the choice: chance (0 <= draw < 1), what its conversation begins with as 64 bits of a
    hash (None where that cannot be told), and the tokens of its prompt. Of content it holds the hash alone, which goes
    nowhere."""

    draw: float
    conversation: int | None = None
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Reading:
    """How busy a replica is: our own attempts there, and what the engine says, corrected by what was sent since:
    prompt tokens to compute (None where it does not say), sequences that wait or run, prompt tokens a second."""

    in_flight: int = 0
    tokens: float | None = None
    sequences: float = 0.0
    tokens_per_s: float | None = None


def choose(keys: Sequence[int], reading: Callable[[int], Reading], affinity: Affinity) -> int:
    """The index of the replica that gets the request. `keys` are 64 bits of each (see `key_of`), at least one;
    `reading` is asked for two of them at most."""
    if len(keys) == 1:
        return 0
    first, second = two_of(keys, affinity)
    one, other = reading(first), reading(second)
    loads = _by_tokens(one, other)
    if loads is None:
        most = other.in_flight + (HEADROOM if affinity.conversation is not None else 0)
        return first if one.in_flight <= most else second
    spare = affinity.tokens + HEADROOM * SEQUENCE_TOKENS if affinity.conversation is not None else 0.0
    return first if loads[0] <= loads[1] + spare else second


def two_of(keys: Sequence[int], affinity: Affinity) -> tuple[int, int]:
    """The two that are compared: the conversation's own and another, or any two. At least two keys."""
    count = len(keys)
    scaled = affinity.draw * count
    first = min(int(scaled), count - 1)
    scaled = (scaled - first) * (count - 1)
    if affinity.conversation is not None:
        conversation = affinity.conversation
        first = max(range(count), key=lambda index: _mixed(conversation ^ keys[index]))
    second = min(int(scaled), count - 2)
    return first, second + (second >= first)


def _by_tokens(one: Reading, other: Reading) -> tuple[float, float] | None:
    """Both replicas' work in prompt tokens of the first one's speed; None where either does not say."""
    if one.tokens is None or other.tokens is None:
        return None
    faster = 1.0  # how much of the first one's time the other takes for the same
    if one.tokens_per_s and other.tokens_per_s:
        faster = one.tokens_per_s / other.tokens_per_s
    return (
        one.tokens + one.sequences * SEQUENCE_TOKENS,
        (other.tokens + other.sequences * SEQUENCE_TOKENS) * faster,
    )


def leads_on(errors: Sequence[GatewayError]) -> bool:
    """Whether the next replica may get a request that failed at the replicas before with these errors, the last one
    just now. A replica that did not take it says nothing of the others. One that broke off may have died of it, and it
    must not kill them all. Time that ran out is out, and wrong credentials are wrong at all of them."""
    last = errors[-1]
    if isinstance(last, ConnectFailed | UpstreamOverloaded) and not isinstance(last, ConnectionLost):
        return True
    lost = sum(isinstance(error, ConnectionLost | UpstreamFailed) for error in errors)
    return isinstance(last, ConnectionLost | UpstreamFailed) and lost <= MOST_LOST


def key_of(name: str) -> int:
    """64 bits that stand for a replica, the same in every gateway."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def conversation_of(body: Mapping[str, Any]) -> int | None:
    """64 bits that stand for what a chat begins with: its tools and its messages to the first one of a user. Later
    turns of a conversation begin alike. None where there is no such message."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    digest = blake2b(digest_size=8)
    if "tools" in body:
        digest.update(orjson.dumps(body["tools"])[:_MOST_LOOKED_AT])
    for message in messages:
        if not isinstance(message, dict):
            return None
        role, content = message.get("role"), message.get("content")
        digest.update(f"\0{role}\0".encode("utf-8", "surrogatepass"))
        for text in [content] if isinstance(content, str) else _texts(content):
            digest.update(text[:_MOST_LOOKED_AT].encode("utf-8", "surrogatepass"))
        if role == "user":
            return int.from_bytes(digest.digest(), "big")
    return None


def _texts(content: object) -> list[str]:
    parts = content if isinstance(content, list) else []
    return [text for part in parts if isinstance(part, dict) and isinstance(text := part.get("text"), str)]


def _mixed(bits: int) -> int:
    """The bits well mixed (the finalizer of SplitMix64: Steele, Lea and Flood, OOPSLA 2014)."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & _MASK
    return bits ^ (bits >> 31)
