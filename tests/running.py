"""A real gateway on a free port, in the test's own event loop: uvicorn with the settings that `hybridgate serve`
uses."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from openai import AsyncOpenAI

from gateway.app import build
from gateway.embedded import embedded
from gateway.follow import Follower
from gateway.keys import Keys
from gateway.loading import known_names, read_keys, read_policy
from gateway.policy import Policy
from gateway.reload import KeysReloader, Reloader
from gateway.replicas import Resolve
from gateway.running import Gateway
from gateway.server import config_of
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

    async def until(self, condition: Callable[[], bool], patience: float = 10.0) -> None:
        """Wait for something that happens in the server."""
        async with asyncio.timeout(patience):
            while not condition():  # noqa: ASYNC110 - without an event
                await asyncio.sleep(0.005)

    async def ready(self, *deployments: str, patience: float = 60.0) -> None:
        """Wait until these deployments can be called."""
        async with asyncio.timeout(patience):
            while True:
                state = (await self.http.get("/readyz")).json()["deployments"]
                if all(state[name]["usable"] for name in deployments):
                    return
                await asyncio.sleep(0.02)


@asynccontextmanager
async def running(
    policy: Policy, settings: Settings | None = None, keys: Keys | None = None, resolve: Resolve | None = None
) -> AsyncIterator[Running]:
    """Serve the policy until the block ends; for callers with these keys only, where there are any."""
    log, told = Log(), list[str]()
    app, gateway = build(settings or Settings(drain_seconds=1.0), policy, log, told.append, keys, resolve)
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with listener:
        async with (
            embedded(config_of(app, drain_seconds=1.0), listener),
            httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http,
            httpx.AsyncClient(timeout=60, trust_env=False) as direct,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, http_client=direct) as openai,
        ):
            yield Running(url, gateway, log, told, http, openai)


@asynccontextmanager
async def running_from(
    path: Path, environ: Mapping[str, str] | None = None, settings: Settings | None = None
) -> AsyncIterator[tuple[Running, Reloader]]:
    """Serve the policy at `path` and follow its files."""
    environ = environ or {}
    loaded = read_policy(str(path), environ)
    assert loaded.policy is not None, loaded.problems
    async with running(loaded.policy, settings) as gateway:
        reloader = Reloader(loaded.policy, loaded.states, environ, gateway.gateway)
        async with following(reloader):
            yield gateway, reloader


@asynccontextmanager
async def running_with_keys(path: Path, keys: Path) -> AsyncIterator[tuple[Running, Reloader, KeysReloader]]:
    """Serve the policy at `path` for callers with these keys, and follow all files."""
    loaded = read_policy(str(path), {})
    assert loaded.policy is not None, loaded.problems
    loaded_keys = read_keys(str(keys), known_names(loaded.policy))
    assert loaded_keys.keys is not None, loaded_keys.problems
    settings = Settings(drain_seconds=1.0, keys=str(keys))
    async with running(loaded.policy, settings, loaded_keys.keys) as gateway:
        reloader = Reloader(loaded.policy, loaded.states, {}, gateway.gateway)
        assert gateway.gateway.access is not None
        keys_reloader = KeysReloader(loaded_keys.states, gateway.gateway.access)
        async with following(reloader, keys_reloader):
            yield gateway, reloader, keys_reloader


@asynccontextmanager
async def following(*followers: Follower) -> AsyncIterator[None]:
    """Follow files until the block ends."""
    watching = asyncio.gather(*(follower.watch() for follower in followers))
    try:
        yield
    finally:
        for follower in followers:
            follower.stop()
        await watching
