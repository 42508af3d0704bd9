"""How the program ends and begins again: signals, draining, and a kill that nobody can prepare for."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.embedded import embedded
from tests.running import running_from

POLICY = """
version: 1
deployments: deployments.yaml
default: {candidates: home}
"""
DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: URL/v1, model: m, zone: on_premises}
"""
ENGINE = """
version: 1
deployments:
  engine: {backend: local, url: URL/v1, model: demo, zone: on_premises}
  OTHER
"""
LOAD = {
    "version": 1,
    "waiting": 0,
    "running": 0,
    "max_running": 64,
    "max_batch_tokens": 512,
    "queued_prefill_tokens": 0,
    "free_blocks": 64,
    "total_blocks": 64,
    "block_size": 16,
    "prefill_tokens_per_second": None,
    "decode_tokens_per_second": None,
    "step_ms": None,
    "steps_total": 0,
    "aborted_total": 0,
    "finished_total": 0,
    "preempted_total": 0,
    "out_of_memory_total": 0,
    "prefix_asked_tokens_total": 0,
    "prefix_found_tokens_total": 0,
    "acceptance": None,
}
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


class Program:
    """`hybridgate serve` as a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, admin_port: int) -> None:
        self.process = process
        self.http = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False)
        self.admin = httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_port}", timeout=30, trust_env=False)

    async def ready(self) -> None:
        async with asyncio.timeout(60):
            while True:
                try:
                    if (await self.http.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)

    async def stream(self) -> str:
        """All of a streamed answer, or as much of it as came."""
        text = ""
        try:
            async with self.http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
                async for part in answer.aiter_text():
                    text += part
        except httpx.RemoteProtocolError:  # closed in the middle of it
            pass
        return text


@asynccontextmanager
async def program(folder: Path, upstream: str, ports: tuple[int, int], *flags: str) -> AsyncIterator[Program]:
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", upstream))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYBRIDGATE_")}
    command = [sys.executable, "-m", "gateway.cli", "serve", "--policy", str(folder / "policy.yaml")]
    command += ["--port", str(ports[0]), "--admin-port", str(ports[1]), "--log", str(folder / "log"), *flags]
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)
    running = Program(process, *ports)
    try:
        await running.ready()
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await running.http.aclose()
        await running.admin.aclose()


@pytest.mark.slow
def test_a_stop_is_announced_then_drains_then_ends_what_is_left_with_an_error(tmp_path: Path) -> None:
    async def check() -> None:
        providers, ports = FakeProviders(), (free_port(), free_port())
        flags = ("--drain-delay-seconds", "1", "--drain-seconds", "2")
        async with serving(providers) as upstream, program(tmp_path, upstream, ports, *flags) as gateway:
            fits, too_long = Behaviour(chunks=30, chunk_delay=0.08), Behaviour(chunks=200, chunk_delay=0.1)
            providers.behave(fits, too_long)
            streams = [asyncio.create_task(gateway.stream()), asyncio.create_task(gateway.stream())]
            async with asyncio.timeout(10):
                while providers.in_flight < 2:  # noqa: ASYNC110 - what is awaited has no event
                    await asyncio.sleep(0.01)
            assert "connection" not in (await gateway.http.get("/livez")).headers
            gateway.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.3)
            kept = await gateway.http.get("/livez")
            assert (kept.status_code, kept.headers["connection"]) == (200, "close")
            for port in (gateway.http, gateway.admin):
                told = await port.get("/readyz")
                assert (told.status_code, told.json()["status"]) == (503, "stopping")
            late = await gateway.http.post("/v1/chat/completions", json=BODY)
            assert late.status_code == 200, "requests are still taken while balancers learn of the stop"
            await asyncio.sleep(1.2)
            with pytest.raises(httpx.ConnectError):
                async with httpx.AsyncClient(trust_env=False) as newcomer:
                    await newcomer.get(f"http://127.0.0.1:{ports[0]}/readyz")
            assert (await gateway.admin.get("/readyz")).json()["status"] == "stopping"
            texts = sorted([await stream for stream in streams], key=len)
            async with asyncio.timeout(10):
                await gateway.process.wait()
        finished = [text for text in texts if text.endswith("data: [DONE]\n\n")]
        cut = [text for text in texts if "[DONE]" not in text]
        assert len(finished) == 1 and len(cut) == 1
        assert cut[0].count("data: ") > 5 and '"error"' in cut[0].rstrip().rsplit("\n\n", 1)[-1]
        assert "the gateway is stopping" in cut[0]
        log = (tmp_path / "log").read_text()
        assert '"state":"stopping"' in log and log.count('"event":"request"') == 3

    asyncio.run(check())


@pytest.mark.slow
def test_a_second_signal_ends_the_delay(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(FakeProviders()) as upstream:
            ports = (free_port(), free_port())
            async with program(tmp_path, upstream, ports, "--drain-delay-seconds", "600") as gateway:
                gateway.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                assert gateway.process.returncode is None
                gateway.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(10):
                    await gateway.process.wait()

    asyncio.run(check())


@pytest.mark.slow
def test_a_killed_gateway_starts_again_on_the_same_port_with_the_same_files(tmp_path: Path) -> None:
    async def check() -> None:
        providers, ports = FakeProviders(), (free_port(), free_port())
        async with serving(providers) as upstream:
            async with program(tmp_path, upstream, ports) as killed:
                providers.behave(Behaviour(chunks=500, chunk_delay=0.02))
                stream = asyncio.create_task(killed.stream())
                async with asyncio.timeout(10):
                    while providers.in_flight < 1:  # noqa: ASYNC110 - what is awaited has no event
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.3)
                killed.process.kill()
                assert "[DONE]" not in await stream
            async with asyncio.timeout(10):
                while providers.in_flight:  # noqa: ASYNC110 - the kernel has closed the connection to the provider
                    await asyncio.sleep(0.01)
            async with program(tmp_path, upstream, ports) as restarted:
                assert (await restarted.stream()).endswith("data: [DONE]\n\n")
        lines = (tmp_path / "log").read_bytes().splitlines()
        assert all(line.startswith(b"{") and line.endswith(b"}") for line in lines), "no half line is left"

    asyncio.run(check())


class Engine:
    """As much of an engine as says that it is there."""

    def __init__(self) -> None:
        self.app = Starlette(routes=[Route("/load", self._load), Route("/health", self._health)])

    async def _load(self, request: Request) -> Response:
        return JSONResponse(LOAD)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ready"})

    @asynccontextmanager
    async def at(self, port: int) -> AsyncIterator[None]:
        config = uvicorn.Config(self.app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
        with socket.create_server(("127.0.0.1", port)) as listener:
            async with embedded(config, listener):
                yield


@pytest.mark.parametrize(
    ("other", "ready", "not_there"),
    [
        ("", (200, "ready"), (503, "not ready")),
        (
            "cloud: {backend: openai, url: http://127.0.0.1:9/v1, model: m, zone: us_cloud}",
            (200, "ready"),
            (200, "degraded"),
        ),
    ],
    ids=["alone", "beside a cloud"],
)
def test_a_gateway_is_ready_once_its_engine_elsewhere_says_that_it_is_there(
    other: str, ready: tuple[int, str], not_there: tuple[int, str], tmp_path: Path
) -> None:
    async def check() -> None:
        port = free_port()
        candidates = "[engine, cloud]" if other else "engine"
        (tmp_path / "policy.yaml").write_text(POLICY.replace("home", candidates))
        deployments = ENGINE.replace("URL", f"http://127.0.0.1:{port}").replace("OTHER", other)
        (tmp_path / "deployments.yaml").write_text(deployments)
        async with running_from(tmp_path / "policy.yaml") as (gateway, _):

            async def until(wanted: tuple[int, str]) -> dict[str, Any]:
                async with asyncio.timeout(20):
                    while True:
                        answer = await gateway.http.get("/readyz")
                        told: dict[str, Any] = answer.json()
                        if (answer.status_code, told["status"]) == wanted:
                            return told
                        await asyncio.sleep(0.05)

            told = await until(not_there)
            assert told["deployments"]["engine"]["reason"] == "its engine does not answer"
            async with Engine().at(port):
                await until(ready)
            await until(not_there)
            async with Engine().at(port):
                await until(ready)

    asyncio.run(check())
