"""The edge protocol: what the request path asks of a backend, and what it gets back.

Owns the seam between the request path and everything that answers. Refuses to know any provider.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from gateway.masking import Masked
from gateway.types import ChatRequest, Patience, Replica, Timeouts, Usage


@dataclass(frozen=True, slots=True)
class Call:
    """One attempt's request.

    `prompt_tokens` is our estimate, for a deployment that reports no usage. `first_token_by_ms` is how long the
    caller's latency class still leaves, None where it has none. `imposed_max_tokens` bounds an answer that the caller
    left unbounded, where a cost cap needs it. `masked` is the request's masked form, where it has one: what a zone gets
    that may not have the request as it is. `timeouts` replace the deployment's, but for `connect`; None where they
    count. `patience` is how long the request path waits in an engine's queue, None for as long as the timeouts say.
    `replica` is where it goes, None where the deployment has one address.
    """

    chat: ChatRequest
    request_id: str
    prompt_tokens: int = 0
    imposed_max_tokens: int | None = None
    priority: int = 0
    first_token_by_ms: float | None = None
    masked: Masked | None = None
    timeouts: Timeouts | None = None
    patience: Patience | None = None
    replica: Replica | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Bytes ready for the caller's wire: the JSON body of a plain answer, or whole SSE events of a stream.

    `usage` is set on the chunk where the tokens became known; until then `tokens` counts them roughly, one an event.
    `last` is set only when the answer is proved complete; a stream that ends without it has been cut.
    """

    data: bytes
    tokens: int = 1
    usage: Usage | None = None
    last: bool = False


class Answer(Protocol):
    """An upstream answer under way. Iterating yields at least one token in the first chunk, and raises an
    `UpstreamError` where the answer fails: a `Retryable` before the first chunk, `UpstreamCut` after it. `close` is
    idempotent and ends the upstream's work."""

    @property
    def dropped(self) -> tuple[str, ...]:
        """Parameters of the request that this provider does not know and did not get."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...

    async def __anext__(self) -> Chunk: ...

    async def close(self) -> None: ...


class Backend(Protocol):
    """Something that answers. Built at start, for one deployment; holds its connections until `close`."""

    async def open(self, call: Call) -> Answer:
        """Send the request. Raises an `UpstreamError`, a `Retryable` one where another deployment may be tried."""

    async def close(self) -> None: ...
