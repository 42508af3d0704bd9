"""The relay's HTTP client: every exception of aiohttp has a counterpart of ours, and a redirect goes nowhere."""

from __future__ import annotations

import asyncio
import inspect
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from gateway.backends.build import authorities_of
from gateway.backends.upstream import FOREIGN, AiohttpUpstream, translated
from gateway.errors import ConnectFailed, Retryable, UpstreamFailed, UpstreamTimeout
from gateway.types import Deployment
from tests.fakes import deployment

COUNTERPARTS: dict[str, type[Retryable]] = {
    "ClientConnectionError": UpstreamFailed,
    "ClientConnectionResetError": ConnectFailed,
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
    "ServerDisconnectedError": ConnectFailed,
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
    [(TimeoutError(), UpstreamTimeout), (ConnectionResetError(), ConnectFailed), (OSError(), UpstreamFailed)],
)
def test_what_the_system_raises_has_a_counterpart_too(error: Exception, ours: type[Retryable]) -> None:
    assert isinstance(error, FOREIGN) and type(translated(error)) is ours


def test_nobody_listening_is_a_failed_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    async def run(upstream: AiohttpUpstream) -> None:
        try:
            await upstream.post("/x", b"", {}, silence=5.0)
        finally:
            await upstream.close()

    with pytest.raises(ConnectFailed):
        asyncio.run(run(AiohttpUpstream(url, connect=2.0)))
    with pytest.raises(ConnectFailed):
        asyncio.run(run(AiohttpUpstream("http://engine", connect=2.0, uds="/nonexistent.sock")))


async def _serving(handle: Any, uds: str) -> web.AppRunner:
    app = web.Application()
    app.router.add_post("/{path:.*}", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, uds).start()
    return runner


def test_a_unix_socket_is_an_address_and_a_redirect_is_not_followed(tmp_path: Path) -> None:
    hits: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        hits.append(request.path)
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async def run() -> None:
        uds = str(tmp_path / "s")
        runner = await _serving(redirect, uds)
        upstream = AiohttpUpstream("http://engine/v1", connect=2.0, uds=uds)
        response = await upstream.post("/chat/completions", b"{}", {}, silence=5.0)
        assert response.status == 307
        response.close()
        await upstream.close()
        await runner.cleanup()

    asyncio.run(run())
    assert hits == ["/v1/chat/completions"]


def test_a_silent_server_is_given_up(tmp_path: Path) -> None:
    async def silent(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    async def run() -> None:
        uds = str(tmp_path / "s")
        runner = await _serving(silent, uds)
        upstream = AiohttpUpstream("http://engine", connect=2.0, uds=uds)
        try:
            await upstream.post("/x", b"{}", {}, silence=0.05)
        finally:
            await upstream.close()
            await runner.shutdown()
            await runner.cleanup()

    with pytest.raises(UpstreamTimeout):
        asyncio.run(run())


def test_https_trusts_the_deployments_authorities_and_on_premises_never_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate is self-signed. An environment that trusts it must count for a cloud zone alone."""
    pem = tmp_path / "server.pem"
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*openssl, *names, "-keyout", str(pem), "-out", str(pem) + ".crt"], check=True, capture_output=True)
    certificate = f"{pem}.crt"
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, pem)

    async def hello(_: web.Request) -> web.Response:
        return web.Response(text="{}")

    async def status(declared: Deployment) -> int:
        app = web.Application()
        app.router.add_post("/{path:.*}", hello)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server)
        await site.start()
        port = runner.addresses[0][1]
        upstream = AiohttpUpstream(
            f"https://127.0.0.1:{port}", connect=5.0, trust_env=True, authorities=authorities_of(declared)
        )
        try:
            response = await upstream.post("/x", b"{}", {}, silence=5.0)
            response.close()
            return response.status
        finally:
            await upstream.close()
            await runner.cleanup()

    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    assert asyncio.run(status(deployment("home", zone="on_premises", ca_file=certificate))) == 200
    with pytest.raises(ConnectFailed):
        asyncio.run(status(deployment("home", zone="on_premises")))
