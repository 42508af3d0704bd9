"""The relay's HTTP client: one address, HTTP/1.1, and no more than the relay needs of it. It costs a fraction of what a
general client does.

Owns an address's connections: which to use, when to open one and where to. Refuses the environment's proxies
(aiohttp_client.py), redirects, cookies, compression, and to send a request twice that may have been read.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection
from aiohappyeyeballs.types import AddrInfoType

from gateway.backends import upstream as say
from gateway.backends.http1_connection import Http1Connection, Http1Response, NeverRead
from gateway.errors import ConnectFailed, UpstreamFailed
from gateway.networks import Networks

MOST_IDLE = 512  # connections that are kept
KNOWN_SECONDS = 30.0  # how long a name's addresses are believed
_NEXT_ADDRESS_AFTER = 0.25  # seconds until another address is tried beside one that does not answer (RFC 8305)
ANYWHERE = Networks(())
_PORTS = {"http": 80, "https": 443}


class Outside(OSError):
    """A name leads to addresses, none of which is in the networks in which they must be."""


class Addresses:
    """Where a name leads, as far as that is within its networks. Looked up beside the event loop, by one request for
    all that wait; each call begins with another of the addresses that the system prefers, so that machines behind one
    name share the connections."""

    def __init__(self, host: str, port: int, within: Networks = ANYWHERE) -> None:
        self._host = host
        self._port = port
        self._within = within
        self._known: list[AddrInfoType] = []
        self._until = 0.0
        self._turn = 0
        self._looking = asyncio.Lock()

    async def look_up(self) -> list[AddrInfoType]:
        """The addresses, the one to try first in front. Raises OSError."""
        loop = asyncio.get_running_loop()
        async with self._looking:
            if not self._known or loop.time() >= self._until:
                found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
                if not (found := [one for one in found if self._within.hold(str(one[4][0]))]):
                    raise Outside
                self._known = [(family, kind, proto, "", address) for family, kind, proto, _, address in found]
                self._until = loop.time() + KNOWN_SECONDS
        preferred = [one for one in self._known if one[0] == self._known[0][0]]
        others = [one for one in self._known if one[0] != self._known[0][0]]
        self._turn = (self._turn + 1) % len(preferred)
        return preferred[self._turn :] + preferred[: self._turn] + others

    def forget(self) -> None:
        """They led nowhere."""
        self._known = []


class Http1Upstream:
    """Implements `Upstream`. Invariant: everything is sent to `url` or to the Unix socket `uds`, whatever an answer or
    the environment says; a connection is either idle or has one request, and none outlives `close`."""

    def __init__(
        self,
        url: str,
        *,
        connect: float,
        uds: str | None = None,
        authorities: ssl.SSLContext | None = None,
        address: str | None = None,
        within: Networks = ANYWHERE,
    ) -> None:
        """`connect`: seconds to open a connection. `authorities`: whom to trust, required for an https address.
        `address`: the IP address of the one replica to connect to, which must prove to be `url`'s host all the same;
        without it that is looked up. Nothing outside of the networks `within` is connected to."""
        parts = urlsplit(url)
        if parts.scheme == "https" and authorities is None:
            raise ValueError("an https address needs authorities")
        self._host = parts.hostname or ""
        self._uds = uds
        self._tls = authorities if parts.scheme == "https" else None
        self._addresses = Addresses(address or self._host, parts.port or _PORTS[parts.scheme], within)
        self._connect_seconds = connect
        self._base = parts.path.rstrip("/")
        self._authority = parts.netloc
        self._heads: dict[str, bytes] = {}
        self._idle: dict[Http1Connection, None] = {}  # the one that was used last is last
        self._open: set[Http1Connection] = set()
        self._closed: asyncio.Future[None] | None = None
        self._most_idle = MOST_IDLE

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], silence: float | None) -> Http1Response:
        head = self._head(path, headers, len(body))
        idle = self._idle
        while idle:
            connection, _ = idle.popitem()
            if connection.usable:
                try:
                    return await connection.exchange(head, body, silence)
                except NeverRead:
                    break
        return await (await self._connected()).exchange(head, body, silence)

    async def close(self) -> None:
        if self._closed is None:
            self._closed = asyncio.get_running_loop().create_future()
            for connection in list(self._open):
                connection.give_up(UpstreamFailed, say.BROKE_OFF)
            if not self._open:
                self._closed.set_result(None)
        await self._closed

    @property
    def at_rest(self) -> bool:
        return not self._open

    def retire(self) -> None:
        self._most_idle = 0
        for connection in list(self._idle):
            connection.close()

    def _head(self, path: str, headers: Mapping[str, str], length: int) -> bytes:
        head = self._heads.get(path)
        if head is None:
            head = self._heads[path] = (
                f"POST {self._base}{path} HTTP/1.1\r\nhost: {self._authority}\r\n"
                "content-type: application/json\r\naccept-encoding: identity\r\n"
            ).encode("ascii")
        own = say.lines_of(headers)
        return b"%b%bcontent-length: %d\r\n\r\n" % (head, own.encode("ascii"), length)

    async def _connected(self) -> Http1Connection:
        """A new connection. Raises `ConnectFailed`."""
        try:
            if self._closed is not None:
                raise OSError("closed")
            async with asyncio.timeout(self._connect_seconds):
                connection = await self._connect()
        except TimeoutError:
            self._addresses.forget()
            raise ConnectFailed(say.NOT_ACCEPTED) from None
        except Outside:
            raise ConnectFailed(say.OUTSIDE) from None
        except (OSError, ValueError, RuntimeError):  # of TLS and of names too; uvloop has RuntimeErrors of its own
            self._addresses.forget()
            raise ConnectFailed(say.UNREACHABLE) from None
        return connection

    async def _connect(self) -> Http1Connection:
        loop = asyncio.get_running_loop()
        if self._uds is not None:
            _, connection = await loop.create_unix_connection(lambda: Http1Connection(loop, None, self), self._uds)
            return connection
        sock = await start_connection(
            await self._addresses.look_up(), happy_eyeballs_delay=_NEXT_ADDRESS_AFTER, loop=loop
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _, connection = await loop.create_connection(
            lambda: Http1Connection(loop, sock, self),
            sock=sock,
            ssl=self._tls,
            server_hostname=self._host if self._tls else None,
        )
        return connection

    # What connections tell.

    def opened(self, connection: Http1Connection) -> None:
        self._open.add(connection)
        if self._closed is not None:
            connection.give_up(ConnectFailed, say.UNREACHABLE)

    def freed(self, connection: Http1Connection) -> None:
        if self._closed is None and len(self._idle) < self._most_idle:
            self._idle[connection] = None
        else:
            connection.close()

    def gone(self, connection: Http1Connection) -> None:
        self._idle.pop(connection, None)

    def lost(self, connection: Http1Connection) -> None:
        self._open.discard(connection)
        if self._closed is not None and not self._open and not self._closed.done():
            self._closed.set_result(None)
