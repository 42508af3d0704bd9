"""A real gateway on a free port, in the test's own event loop: uvicorn with the settings that `hybridgate serve`
uses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import uvicorn
from openai import AsyncOpenAI

from gateway.app import Gateway, build
from gateway.demo.providers import embedded
from gateway.http1 import Http1
from gateway.policy import Policy
from gateway.settings import Settings
from tests.fakes import Log


@dataclass
class Running:
    """What a test may look at."""

    url: str
    gateway: Gateway
    log: Log
    told: list[str]
    http: httpx.AsyncClient
    openai: AsyncOpenAI

    async def ready(self, *deployments: str, patience: float = 60.0) -> None:
        """Wait until these deployments can be called."""
        async with asyncio.timeout(patience):
            while True:
                state = (await self.http.get("/readyz")).json()["deployments"]
                if all(state[name]["usable"] for name in deployments):
                    return
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running(policy: Policy, settings: Settings | None = None) -> AsyncIterator[Running]:
    """Serve the policy until the block ends."""
    log, told = Log(), list[str]()
    app, gateway = build(settings or Settings(drain_seconds=1.0), policy, log, told.append)
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=Http1, access_log=False, log_config=None, timeout_graceful_shutdown=1, server_header=False
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        async with (
            embedded(config, listener),
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http,
            httpx.AsyncClient(timeout=60, trust_env=False) as direct,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=direct) as openai,
        ):
            yield Running(url, gateway, log, told, http, openai)
