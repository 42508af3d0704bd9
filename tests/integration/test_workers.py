"""`hybridgate serve --workers`: several processes on one port that share limits and engines, as one gateway to callers,
balancers and Prometheus. Real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.front import joined, stored_of, with_label
from gateway.keys import digest_of
from gateway.settings import Settings, SettingsError, settings_from
from gateway.workers import environment_of
from tests.redis_server import free_port, redis_server

ROOT = Path(__file__).parents[2]
POLICY = "version: 1\ndeployments: deployments.yaml\ndefault: {candidates: [there], order_by: listed}\n"
DEPLOYMENTS = """
version: 1
deployments:
  there: {backend: openai, url: URL, model: m, zone: us_cloud, cost: {usd_per_million_tokens: {input: 0, output: 0}}}
"""
LOCAL = """
version: 1
deployments:
  there: {backend: local, model: demo, zone: on_premises}
"""
LIMITS = "requests_per_minute: 1000"
IN_FLIGHT = "hybridgate_deployment_in_flight{"
PATIENCE = 120.0  # the machine of a test may be busy


@dataclass
class Front:
    """The parent, as a process."""

    process: subprocess.Popen[bytes]
    url: str
    admin: str
    http: httpx.AsyncClient

    def workers(self) -> list[psutil.Process]:
        places: dict[str, psutil.Process] = {}
        for process in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # it has just ended
                command = process.cmdline()
                if "worker" in command:
                    places[command[command.index("worker") + 1]] = process
        return [places[place] for place in sorted(places)]

    async def ready(self) -> dict[str, Any] | None:
        try:
            told = await self.http.get(f"{self.admin}/readyz")
        except httpx.HTTPError:
            return None
        return told.json() if told.status_code == 200 else None

    async def until_all_ready(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while ((await self.ready()) or {}).get("status") != "ready":
                assert self.process.poll() is None
                await asyncio.sleep(0.1)

    async def in_flight(self) -> float:
        text = (await self.http.get(f"{self.admin}/metrics")).text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(IN_FLIGHT))

    async def ask(self, **changed: Any) -> int:
        """Until it was not too late for Redis, which it may be where the machine is busy."""
        while (status := await self.ask_once(**changed)) == 503:  # noqa: ASYNC110 - another process' event
            await asyncio.sleep(0.1)
        return status

    async def ask_once(self, **changed: Any) -> int:
        """On a connection of its own, so that any worker may get it. The status; 0 where the connection breaks."""
        body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, **changed}
        headers = {"authorization": "Bearer hg-crm", "connection": "close"}
        try:
            async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
                return (await http.post(f"{self.url}/v1/chat/completions", json=body, headers=headers)).status_code
        except httpx.HTTPError:
            return 0


def started(command: list[str], environ: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)


@asynccontextmanager
async def front(folder: Path, redis: str, deployments: str, limits: str, *flags: str) -> AsyncIterator[Front]:
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "deployments.yaml").write_text(deployments)
    digest = digest_of("hg-crm").hex()
    (folder / "keys.yaml").write_text(f'version: 1\nkeys: [{{id: crm, sha256: "{digest}", limits: {{{limits}}}}}]\n')
    port, admin = free_port(), free_port()
    command = [sys.executable, "-m", "gateway.cli", "serve", "--port", str(port), "--admin-port", str(admin)]
    command += ["--policy", str(folder / "policy.yaml"), "--keys", str(folder / "keys.yaml"), "--workers", "2"]
    command += ["--redis-url", redis, "--drain-seconds", "8", *flags]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HYBRIDGATE_")}
    process = started(command, environ, folder / "gateway.log")
    try:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            made = Front(process, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", http)
            await made.until_all_ready()
            yield made
    finally:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.kill()
        process.wait()
        for one in left:
            with suppress(psutil.Error):
                one.kill()


async def gone(processes: list[psutil.Process], within: float) -> None:
    async with asyncio.timeout(within):
        while any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.slow
def test_workers_keep_limits_together_and_one_that_is_killed_comes_back(tmp_path: Path) -> None:
    async def check(redis: str) -> None:
        async with serving(FakeProviders(Behaviour(chunk_delay=0.05))) as upstream:
            deployments = DEPLOYMENTS.replace("URL", f"{upstream}/v1")
            limits = "requests_per_minute: 40, on_redis_down: closed"
            async with front(tmp_path, redis, deployments, limits) as g:
                told: Counter[int] = Counter()
                while told[429] < 10:
                    told.update(await asyncio.gather(*(g.ask(max_tokens=1) for _ in range(10))))
                assert told[200] == 40 and set(told) == {200, 429}, told
                text = (await g.http.get(f"{g.admin}/metrics")).text
                counted = requests_of(text)
                assert sum(counted.values()) >= told.total() and set(counted) == {"0", "1"}, "both have answered"
                assert 'hybridgate_worker_up{worker="1"} 1.0' in text
                assert text.count("# TYPE hybridgate_requests_total counter") == 1
                assert 'process_resident_memory_bytes{worker="0"}' in text

                first, second = g.workers()
                first.kill()
                answered = [await g.ask(max_tokens=1) for _ in range(20)]
                assert set(answered) == {429}, "the other answers, and counts on"
                assert (await g.http.get(f"{g.admin}/readyz")).status_code == 200
                await g.until_all_ready()
                assert [w.pid for w in g.workers()][1] == second.pid and g.workers()[0].pid != first.pid
                text = (await g.http.get(f"{g.admin}/metrics")).text
                assert 'hybridgate_worker_restarts_total{worker="0"} 1.0' in text

    with redis_server(tmp_path) as redis:
        asyncio.run(check(redis))


def requests_of(text: str) -> Counter[str]:
    """Requests that ended, by worker."""
    counted: Counter[str] = Counter()
    for line in text.splitlines():
        if line.startswith("hybridgate_requests_total{"):
            counted[line.split('worker="')[1].split('"')[0]] += int(float(line.rsplit(" ", 1)[1]))
    return counted


@pytest.mark.slow
def test_a_signal_lets_streams_end_and_leaves_no_process(tmp_path: Path) -> None:
    async def check(redis: str) -> None:
        async with serving(FakeProviders(Behaviour(chunk_delay=1.5))) as upstream:
            deployments = DEPLOYMENTS.replace("URL", f"{upstream}/v1")
            async with front(tmp_path, redis, deployments, LIMITS, "--drain-seconds", "40") as g:
                workers = g.workers()
                asked = [asyncio.create_task(g.ask(stream=True, max_tokens=20)) for _ in range(3)]
                async with asyncio.timeout(PATIENCE):
                    while await g.in_flight() < 3:  # noqa: ASYNC110 - another process' event
                        await asyncio.sleep(0.02)
                g.process.terminate()
                assert await asyncio.gather(*asked) == [200] * 3
                assert await asyncio.to_thread(g.process.wait, 60) == 0
                await gone(workers, 5)
                assert await g.ask_once() == 0

    with redis_server(tmp_path) as redis:
        asyncio.run(check(redis))


@pytest.mark.slow
def test_a_hangup_reads_the_files_again_and_ends_no_worker_that_is_still_starting(tmp_path: Path) -> None:
    async def check(redis: str) -> None:
        async with front(tmp_path, redis, DEPLOYMENTS.replace("URL", "http://127.0.0.1:9/v1"), LIMITS) as g:
            before = g.workers()
            before[0].kill()
            async with asyncio.timeout(PATIENCE):
                while len(now := g.workers()) < 2 or now[0].pid == before[0].pid:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            g.process.send_signal(signal.SIGHUP)
            await g.until_all_ready()
            assert g.workers() == now
            async with asyncio.timeout(PATIENCE):
                while loads_of((await g.http.get(f"{g.admin}/metrics")).text)["1"] < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

    with redis_server(tmp_path) as redis:
        asyncio.run(check(redis))


def loads_of(text: str) -> dict[str, float]:
    """How often each worker has read its policy."""
    loads = 'hybridgate_policy_loads_total{worker="'
    samples = [line for line in text.splitlines() if line.startswith(loads) and 'result="success"' in line]
    return {s.removeprefix(loads)[0]: float(s.rsplit(" ", 1)[1]) for s in samples}


@pytest.mark.slow
def test_an_engine_is_started_once_and_outlives_a_worker_but_nothing_outlives_the_parent(tmp_path: Path) -> None:
    async def check(redis: str) -> None:
        async with front(tmp_path, redis, LOCAL, LIMITS) as g:
            assert set(await asyncio.gather(*(g.ask() for _ in range(20)))) == {200}
            text = (await g.http.get(f"{g.admin}/metrics")).text
            assert set(requests_of(text)) == {"0", "1"}
            engines = engines_of(g)
            assert len(engines) == 1
            worker = g.workers()[0]
            worker.kill()
            assert set(await asyncio.gather(*(g.ask() for _ in range(8)))) == {200}
            await g.until_all_ready()
            assert engines_of(g) == engines
            left = [*g.workers(), *engines]
            g.process.kill()
            await gone(left, 20)

    with redis_server(tmp_path) as redis:
        asyncio.run(check(redis))


def engines_of(g: Front) -> list[psutil.Process]:
    return [
        p for p in psutil.Process(g.process.pid).children(recursive=True) if "local_engine" in " ".join(p.cmdline())
    ]


def test_several_workers_are_refused_without_redis() -> None:
    with pytest.raises(SettingsError, match="HYBRIDGATE_WORKERS must be 1 without HYBRIDGATE_REDIS_URL"):
        settings_from({"HYBRIDGATE_WORKERS": "2"})
    with pytest.raises(SettingsError, match="HYBRIDGATE_WORKERS must be 1 to"):
        settings_from({"HYBRIDGATE_WORKERS": "0"})
    assert settings_from({"HYBRIDGATE_WORKERS": "2", "HYBRIDGATE_REDIS_URL": "redis://r"}).workers == 2


def test_a_worker_is_told_what_its_parent_was_told() -> None:
    settings = Settings(port=1, workers=3, redis_url="redis://r", drain_seconds=2.5, usage_stream=True)
    environ = {"HOME": "/h", "HYBRIDGATE_PORT": "7", "HYBRIDGATE_LOG": "x", "HYBRIDGATE_ENGINE_TOKEN": "t"}
    told = environment_of(settings, environ)
    assert settings_from(told) == settings and told["HOME"] == "/h" and told["HYBRIDGATE_ENGINE_TOKEN"] == "t"


@pytest.mark.parametrize(
    ("sample", "with_it"),
    [
        ("up 1.0", 'up{w="0"} 1.0'),
        ('up{a="b"} 1.0', 'up{w="0",a="b"} 1.0'),
        ('up{a="b {c} d"} 1.0', 'up{w="0",a="b {c} d"} 1.0'),
        ("up{} 1.0", 'up{w="0"} 1.0'),
    ],
)
def test_each_sample_says_whose_it_is(sample: str, with_it: str) -> None:
    assert with_label(sample, 'w="0"') == with_it


def test_a_metric_is_described_once_and_followed_by_all_its_samples() -> None:
    one = '# HELP a x\n# TYPE a gauge\na{n="1"} 1\n# HELP b y\n# TYPE b gauge\nb 2\n'
    two = "# HELP b y\n# TYPE b gauge\nb 3\n"
    assert joined({0: one, 1: two}).splitlines() == [
        "# HELP a x",
        "# TYPE a gauge",
        'a{worker="0",n="1"} 1',
        "# HELP b y",
        "# TYPE b gauge",
        'b{worker="0"} 2',
        'b{worker="1"} 3',
    ]


def test_stored_answers_of_all_workers_are_added_up_and_what_they_share_counts_once() -> None:
    def told(entries: int) -> dict[str, Any]:
        row = {"tenant": "t", "model": "m", "deployment": "d", "entries": entries, "bytes": 10 * entries}
        memory = {"entries": entries, "bytes": 10 * entries, "by": [row]}
        return {"counts": {"hits": entries, "misses": 1}, "stored": {"memory": memory, "redis": {"entries": 7}}}

    both = stored_of([told(1), told(2)])
    assert both["counts"] == {"hits": 3, "misses": 2} and both["stored"]["redis"] == {"entries": 7}
    assert both["stored"]["memory"]["entries"] == 3 and both["stored"]["memory"]["by"][0]["bytes"] == 30
