"""aiohttp behind the relay's seam: every exception of its own has a counterpart of ours, and proxies of the environment
are asked for what is not on premises."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import aiohttp
import pytest

from gateway.backends.aiohttp_client import FOREIGN, AiohttpUpstream, proxy_for, translated
from gateway.backends.build import upstream_of
from gateway.backends.http1_client import Http1Upstream
from gateway.errors import ConnectFailed, ConnectionLost, Retryable, UpstreamFailed, UpstreamTimeout
from gateway.types import Replica
from tests.fakes import deployment
from tests.raw_http import always, answer, serving

COUNTERPARTS: dict[str, type[Retryable]] = {
    "ClientConnectionError": UpstreamFailed,
    "ClientConnectionResetError": ConnectionLost,
    "ClientConnectorCertificateError": ConnectFailed,
    "ClientConnectorDNSError": ConnectFailed,
    "ClientConnectorError": ConnectFailed,
    "ClientConnectorSSLError": ConnectFailed,
    "ClientError": UpstreamFailed,
    "ClientHttpProxyError": UpstreamFailed,
    "ClientOSError": UpstreamFailed,
    "ClientPayloadError": UpstreamFailed,
    "ClientProxyConnectionError": ConnectFailed,
    "ClientResponseError": UpstreamFailed,
    "ClientSSLError": ConnectFailed,
    "ConnectionTimeoutError": ConnectFailed,
    "ContentTypeError": UpstreamFailed,
    "InvalidURL": UpstreamFailed,
    "InvalidUrlClientError": UpstreamFailed,
    "InvalidUrlRedirectClientError": UpstreamFailed,
    "NonHttpUrlClientError": UpstreamFailed,
    "NonHttpUrlRedirectClientError": UpstreamFailed,
    "RedirectClientError": UpstreamFailed,
    "ServerConnectionError": UpstreamFailed,
    "ServerDisconnectedError": ConnectionLost,
    "ServerFingerprintMismatch": UpstreamFailed,
    "ServerTimeoutError": UpstreamTimeout,
    "SocketTimeoutError": UpstreamTimeout,
    "TooManyRedirects": UpstreamFailed,
    "UnixClientConnectorError": ConnectFailed,
    "UploadAbortedError": UpstreamFailed,
}


def exceptions_of_aiohttp() -> dict[str, type[Exception]]:
    found = inspect.getmembers(aiohttp.client_exceptions, lambda x: inspect.isclass(x) and issubclass(x, Exception))
    return {name: kind for name, kind in found if not name.startswith("WS")}  # no WebSockets here


def test_every_exception_of_aiohttp_has_a_counterpart() -> None:
    assert set(exceptions_of_aiohttp()) == set(COUNTERPARTS)


@pytest.mark.parametrize(("name", "ours"), sorted(COUNTERPARTS.items()))
def test_an_exception_becomes_its_counterpart_and_loses_its_text(name: str, ours: type[Retryable]) -> None:
    kind = exceptions_of_aiohttp()[name]
    assert issubclass(kind, FOREIGN)
    error = kind.__new__(kind)
    assert type(translated(error)) is ours


@pytest.mark.parametrize(
    ("error", "ours"),
    [(TimeoutError(), UpstreamTimeout), (ConnectionResetError(), ConnectionLost), (OSError(), UpstreamFailed)],
)
def test_what_the_system_raises_has_a_counterpart_too(error: Exception, ours: type[Retryable]) -> None:
    assert isinstance(error, FOREIGN) and type(translated(error)) is ours


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_the_environment_names_proxies_by_scheme_and_may_except_hosts(proxies: pytest.MonkeyPatch) -> None:
    assert proxy_for("https://api.example/v1") is None
    proxies.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert proxy_for("https://api.example/v1") == "http://proxy.example:3128"
    assert proxy_for("http://api.example/v1") is None
    proxies.setenv("NO_PROXY", "localhost,.example")
    assert proxy_for("https://api.example/v1") is None


def client_of(**declared: Any) -> type:
    one = deployment("it", **declared)
    return type(upstream_of(one, None, Replica(one.urls[0])))


def test_only_what_a_proxy_applies_to_is_asked_by_way_of_it(proxies: pytest.MonkeyPatch) -> None:
    urls = ("http://api.example/v1",)
    assert client_of(zone="us_cloud", urls=urls) is Http1Upstream
    proxies.setenv("http_proxy", "http://proxy.example:3128")
    assert client_of(zone="us_cloud", urls=urls) is AiohttpUpstream
    assert client_of(zone="on_premises", urls=urls) is Http1Upstream
    proxies.setenv("no_proxy", "api.example")
    assert client_of(zone="us_cloud", urls=urls) is Http1Upstream


def test_a_proxy_is_asked_for_the_whole_address_and_told_its_own_password_alone(proxies: pytest.MonkeyPatch) -> None:
    async def asked() -> bytes:
        async with serving(always(answer(b"through"))) as proxy:
            proxies.setenv("http_proxy", proxy.url.replace("//", "//user:word@"))
            upstream = upstream_of(deployment("it", zone="us_cloud"), None, Replica("http://api.example/v1"))
            proxies.delenv("http_proxy")  # what counts is what it named at start
            try:
                response = await upstream.post("/chat/completions", b"{}", {"authorization": "Bearer k"}, 5.0)
                assert await response.read() == b"through"
                response.close()
            finally:
                await upstream.close()
            return proxy.requests[0]

    head = asyncio.run(asked())
    assert head.startswith(b"POST http://api.example/v1/chat/completions HTTP/1.1\r\n")
    assert b"host: api.example\r\n" in head.replace(b"Host", b"host")
    assert b"authorization: Bearer k\r\n" in head.replace(b"Authorization: Bearer", b"authorization: Bearer")
    assert b"proxy-authorization: basic dxnlcjp3b3jk" in head.lower()
