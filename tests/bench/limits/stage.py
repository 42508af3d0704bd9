"""What a scenario plays on, all as processes: one Redis, the provider, and gateways behind which nobody balances.

Owns their lives, kills included. Refuses to let one outlive the block that started it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import orjson
from redis.asyncio import Redis

from gateway.keys import digest_of
from tests.bench.limits.judge import Seen
from tests.bench.limits.provider import NUSD_A_TOKEN
from tests.bench.program import ROOT, BenchError, clean_environment, free_port
from tests.redis_proxy import Proxy, proxied
from tests.redis_server import RedisProcess, redis_process

PATIENCE = 120.0  # seconds for a process to start; the machine may be busy
POLICY = "version: 1\ndeployments: deployments.yaml\ndefault: {candidates: [cloud, backup], order_by: listed}\n"
DEPLOYMENTS = "version: 1\ndeployments:\n" + "".join(
    f"""  {name}:
    backend: openai
    url: http://127.0.0.1:PORT/v1
    model: m
    zone: us_cloud
    cost: {{usd_per_million_tokens: {{input: PRICE, output: PRICE}}}}
    default_max_tokens: 100
"""
    for name in ("cloud", "backup")
)


def secret_of(key: str) -> str:
    """The secret of a key, by its id."""
    return f"hg-{key}"


@dataclass
class Stage:
    """`urls` of the gateways, in order; a killed one has its own again when it is started. `usage` is the file that
    they share, `proxy` what stands between them and Redis where `stage` was told so."""

    folder: Path
    redis: RedisProcess
    redis_url: str
    provider: str
    ports: Sequence[int]
    proxy: Proxy
    http: aiohttp.ClientSession
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    killed_at: list[float] = field(default_factory=list)

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    @property
    def usage(self) -> Path:
        return self.folder / "usage.jsonl"

    def log_of(self, index: int) -> Path:
        """The decision records of one gateway."""
        return self.folder / f"records-{index}.jsonl"

    def start(self, index: int) -> None:
        """Start a gateway, and wait for nothing."""
        flags = {
            "port": self.ports[index],
            "admin-port": -1,
            "policy": self.folder / "policy.yaml",
            "keys": self.folder / "keys.yaml",
            "redis-url": self.redis_url,
            "usage-file": self.usage,
            "drain-seconds": 5,
            "log": self.log_of(index),
        }
        command = [sys.executable, "-m", "gateway.cli", "serve"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        with (self.folder / f"gateway-{index}.log").open("ab") as log:
            self.running[index] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=clean_environment({})
            )

    async def ready(self, index: int) -> None:
        """Wait until it answers. Raises `BenchError`."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            with suppress(aiohttp.ClientError, OSError):
                async with self.http.get(f"{self.urls[index]}/readyz") as answer:
                    if answer.status == 200:
                        return
            if (status := self.running[index].poll()) is not None:
                log = self.folder / f"gateway-{index}.log"
                raise BenchError(f"gateway {index} ended with {status}: {log.read_text()[-500:]}")
            await asyncio.sleep(0.1)
        raise BenchError(f"gateway {index} was not ready within {PATIENCE:.0f} s")

    def kill(self, index: int) -> None:
        """As nobody can prepare for."""
        self.killed_at.append(time.time())
        self.running[index].kill()
        self.running[index].wait()

    async def stop_gateways(self) -> None:
        """Let them end what they have begun, and tell the ledger."""
        for process in self.running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            try:
                await asyncio.to_thread(process.wait, 30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    async def seen(self) -> list[Seen]:
        """All that the provider saw so far."""
        async with self.http.get(f"{self.provider}/log") as answer:
            return [Seen(**one) for one in orjson.loads(await answer.read())]

    async def unended(self) -> list[str]:
        """The decisions' ids of the attempts that nobody has ended, with the number of the attempt."""
        return list(await self.leases())

    async def leases(self) -> dict[str, float]:
        """Of each attempt that nobody has ended, until when its slots are held, in seconds since 1970. Forgotten a
        minute after that."""
        async with self.ask_redis() as redis:
            names = [name async for name in redis.scan_iter(match="hybridgate:{ledger}:open:*")]
            values = await redis.mget(names) if names else []
        return {
            name.decode().rpartition(":")[2]: int(ends[0]) / 1000
            for name, value in zip(names, values, strict=True)
            if isinstance(value, bytes) and (ends := re.match(rb"\d+", value))  # not one that is cancelled
        }

    async def booked(self, key: str, what: str) -> int:
        """What the ledger holds of a key's day or month: `tokens/day`, `usd/day` (in nano-dollars)."""
        async with self.ask_redis() as redis:
            return int(await redis.hget(f"hybridgate:{{ledger}}:key:{key} {what}", "s") or 0)

    def ask_redis(self) -> Redis:
        """A client of the server itself, past any proxy."""
        return Redis.from_url(self.redis.url)


def keys_file(limits: Mapping[str, str]) -> str:
    """Keys by their ids, each with its limits in the key file's language."""
    lines = ["version: 1", "keys:"]
    for key, stated in limits.items():
        digest = digest_of(secret_of(key)).hex()
        lines.append(f'  - {{id: {key}, sha256: "{digest}", limits: {{{stated}}}}}')
    return "\n".join(lines) + "\n"


def _started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, cwd=ROOT, env=clean_environment({}))


@asynccontextmanager
async def stage(
    folder: Path, limits: Mapping[str, str], gateways: int = 4, delay: float = 0.2, *, through_proxy: bool = False
) -> AsyncIterator[Stage]:
    """All of it, started. `delay`: seconds that an answer takes."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    (folder / "policy.yaml").write_text(POLICY)
    written = DEPLOYMENTS.replace("PORT", str(port)).replace("PRICE", str(NUSD_A_TOKEN // 1000))
    (folder / "deployments.yaml").write_text(written)
    (folder / "keys.yaml").write_text(keys_file(limits))
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_process(folder))
        command = [sys.executable, "-m", "tests.bench.limits.provider", "--port", str(port), "--delay", str(delay)]
        provider = stack.enter_context(_started(command))
        stack.callback(provider.kill)
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=60)
        http = await stack.enter_async_context(aiohttp.ClientSession(connector=connector, timeout=timeout))
        ports: list[int] = []
        while len(ports) < gateways:
            if (free := free_port()) not in ports:
                ports.append(free)
        proxy = await stack.enter_async_context(proxied(server.url))
        redis_url = proxy.url if through_proxy else server.url
        made = Stage(folder, server, redis_url, f"http://127.0.0.1:{port}", ports, proxy, http)
        stack.push_async_callback(made.stop_gateways)
        for index in range(gateways):
            made.start(index)
        for index in range(gateways):
            await made.ready(index)
        yield made
