"""The HTTP client of the relay, behind a seam of its own: it is half of what a relayed request costs, and may be
replaced by something faster.

Owns connections, timeouts on sockets, and the translation of aiohttp's exceptions into our tree. Refuses redirects
always, and the environment's proxies for on-premises deployments: a request that must stay home goes to the configured
address or nowhere.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Protocol

import aiohttp
from yarl import URL

from gateway.errors import ConnectFailed, Retryable, UpstreamFailed, UpstreamTimeout


class Response(Protocol):
    """An upstream's answer whose body has not been read. `close` is idempotent and drops the connection unless the body
    was read whole."""

    @property
    def status(self) -> int: ...

    @property
    def at_end(self) -> bool:
        """Whether the whole body has come and been read."""

    def header(self, name: str) -> str | None: ...

    async def read(self) -> bytes:
        """The whole body. Raises a `Retryable`."""

    async def some(self) -> bytes:
        """What has arrived of the body, together, and at least one byte; empty at its end. Raises a `Retryable`."""

    def close(self) -> None: ...


class Upstream(Protocol):
    """One address that takes POSTs."""

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], silence: float | None) -> Response:
        """Send, and wait for the head of the answer. `silence`: seconds that may pass without a byte, then and later;
        None where the caller watches the time. Raises a `Retryable`."""

    async def close(self) -> None: ...


def translated(error: Exception) -> Retryable:
    """aiohttp's exceptions in our tree; the enumeration is in tests/gateway/test_upstream.py."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return ConnectFailed("the deployment did not accept a connection in time")
    if isinstance(error, TimeoutError):
        return UpstreamTimeout("the deployment did not answer in time")
    if isinstance(error, aiohttp.ClientConnectorError):
        return ConnectFailed("the deployment cannot be reached")
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return ConnectFailed("the deployment closed the connection")
    return UpstreamFailed("the deployment's answer broke off")


FOREIGN = (aiohttp.ClientError, TimeoutError, OSError, ValueError)


class AiohttpResponse:
    """Implements `Response` over aiohttp."""

    __slots__ = ("_response", "status")

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.status = response.status

    @property
    def at_end(self) -> bool:
        return self._response.content.at_eof()

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    async def read(self) -> bytes:
        try:
            return await self._response.read()
        except FOREIGN as error:
            raise translated(error) from None

    async def some(self) -> bytes:
        try:
            return await self._response.content.readany()
        except FOREIGN as error:
            raise translated(error) from None

    def close(self) -> None:
        self._response.close()


class AiohttpUpstream:
    """One deployment's address. Invariant: everything is sent to `url` or to the Unix socket `uds`, whatever an answer
    or the environment says.

    The session is made at the first call, because it belongs to the running event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        connect: float,
        uds: str | None = None,
        trust_env: bool = False,
        authorities: ssl.SSLContext | None = None,
    ) -> None:
        """`connect`: seconds to open a connection. `authorities`: whom to trust for https; None means the system's and
        what the environment adds."""
        self._base = url.rstrip("/")
        self._uds = uds
        self._trust_env = trust_env
        self._connect = connect
        self._authorities = authorities
        self._urls: dict[str, URL] = {}
        self._timeouts: dict[float | None, aiohttp.ClientTimeout] = {}
        self._session: aiohttp.ClientSession | None = None

    def _open_session(self) -> aiohttp.ClientSession:
        connector: aiohttp.BaseConnector
        if self._uds is not None:
            connector = aiohttp.UnixConnector(self._uds, limit=0)
        else:
            connector = aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, ssl=self._authorities or True)
        return aiohttp.ClientSession(
            connector=connector,
            trust_env=self._trust_env,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            skip_auto_headers=("user-agent", "accept"),
        )

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], silence: float | None) -> AiohttpResponse:
        session = self._session or self._open_session()
        self._session = session
        url = self._urls.get(path) or self._urls.setdefault(path, URL(self._base + path))
        timeout = self._timeouts.get(silence) or self._timeouts.setdefault(silence, self._timeout(silence))
        try:
            response = await session.post(url, data=body, headers=headers, timeout=timeout, allow_redirects=False)
        except FOREIGN as error:
            raise translated(error) from None
        return AiohttpResponse(response)

    def _timeout(self, silence: float | None) -> aiohttp.ClientTimeout:
        # The whole answer's time is watched by whoever reads it, without one more timer a request.
        return aiohttp.ClientTimeout(total=None, sock_connect=self._connect, sock_read=silence)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
