"""The relay's HTTP client where the environment names a proxy: aiohttp, which knows how to ask one.

Owns the environment's proxies and the translation of aiohttp's exceptions into our tree. Refuses to be used where there
is no proxy: http1_client.py costs a fraction of it.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from gateway.backends import upstream as say
from gateway.errors import ConnectFailed, ConnectionLost, Retryable, UpstreamFailed, UpstreamTimeout

FOREIGN = (aiohttp.ClientError, TimeoutError, OSError, ValueError)
_AT_ONCE = 1024 * 1024  # bytes of a body above which aiohttp wants to send it in pieces


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address now (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), or None."""
    parts = urlsplit(url)
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


def translated(error: Exception) -> Retryable:
    """aiohttp's exceptions in our tree; the enumeration is in tests/gateway/test_aiohttp_client.py."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return ConnectFailed(say.NOT_ACCEPTED)
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(say.SILENT)
    if isinstance(error, aiohttp.ClientConnectorError):
        return ConnectFailed(say.UNREACHABLE)
    if isinstance(error, aiohttp.ServerDisconnectedError | ConnectionError):
        return ConnectionLost(say.CLOSED)
    return UpstreamFailed(say.BROKE_OFF)


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
        return await say.whole(self)

    async def some(self) -> bytes:
        try:
            return await self._response.content.readany()
        except FOREIGN as error:
            self.close()
            raise translated(error) from None
        except asyncio.CancelledError:
            self.close()
            raise

    def close(self) -> None:
        self._response.close()


class AiohttpUpstream:
    """One deployment's address. Invariant: everything is sent to `url`, by way of `proxy` where there is one, whatever
    an answer or the environment says.

    The session is made at the first call, because it belongs to the running event loop.
    """

    def __init__(
        self, url: str, *, connect: float, proxy: str | None, authorities: ssl.SSLContext | None = None
    ) -> None:
        """`connect`: seconds to open a connection. `authorities`: whom to trust for https; None means the system's and
        what the environment adds."""
        self._base = url.rstrip("/")
        self._proxy = proxy
        self._connect = connect
        self._authorities = authorities
        self._urls: dict[str, URL] = {}
        self._timeouts: dict[float | None, aiohttp.ClientTimeout] = {}
        self._session: aiohttp.ClientSession | None = None

    def _open_session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=30, ssl=self._authorities or True),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"content-type": "application/json", "accept-encoding": "identity"},
            skip_auto_headers=("user-agent", "accept"),
            auto_decompress=False,
            proxy=self._proxy,
        )

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], silence: float | None) -> AiohttpResponse:
        session = self._session or self._open_session()
        self._session = session
        url = self._urls.get(path) or self._urls.setdefault(path, URL(self._base + path))
        timeout = self._timeouts.get(silence) or self._timeouts.setdefault(silence, self._timeout(silence))
        say.lines_of(headers)
        data = body if len(body) <= _AT_ONCE else io.BytesIO(body)
        try:
            response = await session.post(url, data=data, headers=headers, timeout=timeout, allow_redirects=False)
        except FOREIGN as error:
            raise translated(error) from None
        encoded = response.headers.get("content-encoding", "identity").lower() != "identity"
        if encoded or response.status < 200:
            response.close()
            raise UpstreamFailed(say.ENCODED if encoded else say.NOT_HTTP)
        return AiohttpResponse(response)

    def _timeout(self, silence: float | None) -> aiohttp.ClientTimeout:
        # The whole answer's time is watched by whoever reads it, without one more timer a request.
        return aiohttp.ClientTimeout(total=None, sock_connect=self._connect, sock_read=silence)

    @property
    def at_rest(self) -> bool:
        return self._session is None or self._session.closed

    def retire(self) -> None:
        """Its connections, which are the proxy's, stay until `close`."""

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
