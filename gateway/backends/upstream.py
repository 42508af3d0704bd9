"""The seam between the relay and its HTTP client: what the relay asks of an address, and what it gets back.

Owns the two protocols, and what is said to a caller when an address fails: http1_client.py and aiohttp_client.py say it
alike. Refuses redirects, always: an answer that points elsewhere is an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from gateway.errors import UpstreamFailed

MOST_ANSWER_BYTES = 256 * 1024 * 1024  # of an answer that is read whole; one of a model has a few thousand

NOT_ACCEPTED = "the deployment did not accept a connection in time"
UNREACHABLE = "the deployment cannot be reached"
OUTSIDE = "the deployment's name leads outside of its networks"
CLOSED = "the deployment closed the connection"
SILENT = "the deployment did not answer in time"
BROKE_OFF = "the deployment's answer broke off"
NOT_HTTP = "the deployment's answer is not valid HTTP/1.1"
ENCODED = "the deployment's answer is compressed, which was not asked for"
TOO_LONG = f"the deployment's answer is longer than {MOST_ANSWER_BYTES} bytes"
UNSENDABLE = "a header of the request holds what HTTP cannot carry (a line break in the deployment's key?)"


def lines_of(headers: Mapping[str, str]) -> str:
    """The headers as they are written. Raises `UpstreamFailed` where a value is more than one line of ASCII: what
    follows the line's end would be a header, or a request, of its own."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if not (lines.isascii() and lines.replace("\r\n", "", len(headers)).isprintable()):
        raise UpstreamFailed(UNSENDABLE)
    return lines


class Response(Protocol):
    """An upstream's answer whose body has not been read. `close` is idempotent and drops the connection unless the
    whole body has come."""

    @property
    def status(self) -> int: ...

    @property
    def at_end(self) -> bool:
        """Whether the whole body has come and been read."""

    def header(self, name: str) -> str | None:
        """The first header of that name, which is given in lower case."""

    async def read(self) -> bytes:
        """The whole body. Raises a `Retryable`."""

    async def some(self) -> bytes:
        """What has arrived of the body, together, and at least one byte; empty at its end. Raises a `Retryable`."""

    def close(self) -> None: ...


async def whole(response: Response) -> bytes:
    """The rest of a response's body; one that is longer than an answer may be is closed. Raises a `Retryable`."""
    pieces, size = [], 0
    while piece := await response.some():
        pieces.append(piece)
        size += len(piece)
        if size > MOST_ANSWER_BYTES:
            response.close()
            raise UpstreamFailed(TOO_LONG)
    return b"".join(pieces)


class Upstream(Protocol):
    """One address that takes POSTs of JSON. Cancelling a call closes its connection at once."""

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], silence: float | None) -> Response:
        """Send, and wait for the head of the answer. `silence`: seconds that may pass without a byte once all is
        sent, then and later; None where the caller watches the time. Raises a `Retryable`.

        A request that an application may have read is never sent again: who gets `ConnectFailed` decides whether to.
        """

    @property
    def at_rest(self) -> bool:
        """Whether no connection is open."""

    def retire(self) -> None:
        """Take no more requests: connections close when their answers have ended, idle ones now."""

    async def close(self) -> None: ...
