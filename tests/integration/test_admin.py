"""The admin port: metrics of what the gateway did, and reload on demand."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import orjson
import pytest

from gateway.admin import admin_app
from gateway.demo.providers import FakeProviders, serving
from gateway.livestate import state_from
from gateway.loading import load_policy
from gateway.replaylog import replay
from tests.running import running_from

POLICY = """
version: 1
deployments: deployments.yaml
rules: [{name: all of it, when: {tools: false}, candidates: home}]
default: {candidates: home}
"""
DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: URL, model: m, zone: on_premises, cost: {usd_per_million_tokens: {input: 1, output: 2}}}
"""
BODY = {"messages": [{"role": "user", "content": "hi"}]}


def write(folder: Path, url: str) -> Path:
    (folder / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{url}/v1"))
    (folder / "policy.yaml").write_text(POLICY)
    return folder / "policy.yaml"


def test_requests_are_counted_and_a_reload_tells_what_came_of_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with serving(FakeProviders()) as url, running_from(write(tmp_path, url)) as (g, reloader):
            transport = httpx.ASGITransport(admin_app(g.gateway, reloader))
            async with httpx.AsyncClient(transport=transport, base_url="http://admin") as admin:
                await g.http.post("/v1/chat/completions", json=BODY)
                await g.http.post("/v1/chat/completions", json={**BODY, "stream": True})
                answer = await admin.get("/metrics")
                assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
                text = answer.text
                assert 'hybridgate_requests_total{deployment="home",outcome="ok",rule="all of it"} 2.0' in text
                assert 'hybridgate_first_token_seconds_count{deployment="home"} 1.0' in text
                assert 'hybridgate_deployment_up{deployment="home",zone="on_premises"} 1.0' in text
                assert "hybridgate_policy_last_load_successful 1.0" in text and "process_cpu_seconds_total" in text

                kept = await admin.post("/reload")
                assert kept.status_code == 200 and kept.json()["policy"]["hash"] == g.gateway.policy_state.hash
                (tmp_path / "policy.yaml").write_text(POLICY.replace("home}]", "hom}]"))
                refused = await admin.post("/reload")
                assert refused.status_code == 422 and "(did you mean" in refused.json()["policy"]["errors"][0]
                assert "hybridgate_policy_errors 1.0" in (await admin.get("/metrics")).text
                assert (await admin.get("/readyz")).status_code == 200
                assert (await admin.get("/livez")).status_code == 200
                live = state_from((await admin.get("/state")).json())
                assert live.policy_hash == g.gateway.policy_state.hash and live.unavailable == {"home": None}
                assert live.statuses.keys() == {"home"} and url not in (await admin.get("/state")).text
                assert (await admin.post("/metrics")).status_code == 405
                assert (await admin.post("/v1/chat/completions", json=BODY)).status_code == 404

    asyncio.run(check())


@pytest.mark.slow
def test_the_program_serves_both_ports_and_reloads_on_sighup(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        ports = [str(listener.getsockname()[1]) for listener in (one, two)]
    path = write(tmp_path, "http://127.0.0.1:1")
    flags = ["--port", ports[0], "--admin-port", ports[1], "--policy", str(path), "--log", str(tmp_path / "log")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYBRIDGATE_")}
    command = [sys.executable, "-m", "gateway.cli", "serve", *flags]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) as process:
        try:
            admin = httpx.Client(base_url=f"http://127.0.0.1:{ports[1]}", trust_env=False)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    first = admin.get("/readyz").json()["policy"]["hash"]
                    break
                except httpx.HTTPError:
                    time.sleep(0.1)
            main = httpx.get(f"http://127.0.0.1:{ports[0]}/readyz", trust_env=False)
            assert main.json()["policy"]["hash"] == first
            assert httpx.get(f"http://127.0.0.1:{ports[0]}/metrics", trust_env=False).status_code == 404
            path.write_text(POLICY.replace("all of it", "all"))
            process.send_signal(signal.SIGHUP)
            while admin.get("/readyz").json()["policy"]["hash"] == first:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert "hybridgate_policy_loads_total" in admin.get("/metrics").text
            admin.close()
        finally:
            process.terminate()
        assert process.stderr is not None
        told = process.stderr.read().decode()
    assert "is loaded: " in told and f"metrics: http://127.0.0.1:{ports[1]}/metrics" in told
    assert '"state":"loaded"' in (tmp_path / "log").read_text()


def test_what_the_server_writes_can_be_replayed(tmp_path: Path) -> None:
    """Plain, streamed and refused requests: by the same policy nothing changes, by another what it says."""

    async def check() -> None:
        async with serving(FakeProviders()) as url, running_from(write(tmp_path, url)) as (g, _):
            await g.http.post("/v1/chat/completions", json=BODY)
            await g.http.post("/v1/chat/completions", json={**BODY, "stream": True})
            await g.http.post("/v1/chat/completions", json={**BODY, "model": "nobody"})
            lines = [orjson.dumps(line) + b"\n" for line in g.log.lines]
        (tmp_path / "log").write_bytes(b"".join(lines))
        sums, skipped = replay([str(tmp_path / "log")], load_policy(tmp_path / "policy.yaml", {}), 10)
        assert (sums.requests, sums.changed, skipped.others, skipped.unreadable) == (2, 0, 1, 0)
        assert sums.cost_increase == 0 and sums.whole.costed == 2
        text = DEPLOYMENTS.replace("URL", f"{url}/v1").replace("on_premises", "us_cloud").replace("  home:", "  away:")
        (tmp_path / "deployments.yaml").write_text(text.replace("input: 1, output: 2", "input: 2, output: 4"))
        (tmp_path / "policy.yaml").write_text(POLICY.replace("home", "away"))
        sums, _ = replay([str(tmp_path / "log")], load_policy(tmp_path / "policy.yaml", {}), 10)
        assert sums.changed == 2 and sums.cost_increase == pytest.approx(1.0) and sums.after.local_share == 0

    asyncio.run(check())
