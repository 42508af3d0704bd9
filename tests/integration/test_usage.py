"""Usage records of a running gateway: plain, streamed, refused and abandoned requests, summed by the command."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import httpx
import orjson
import pytest
from typer.testing import CliRunner

from gateway.app import build
from gateway.cli import main
from gateway.demo.providers import FakeProviders, serving
from gateway.loading import read_policy
from gateway.settings import Settings, SettingsError
from gateway.usage.files import files_of, read
from tests.fakes import Log
from tests.redis_server import redis_server
from tests.running import running

POLICY = """
version: 1
deployments: deployments.yaml
default: {candidates: [dead, cloud]}
"""
DEPLOYMENTS = """
version: 1
deployments:
  dead: {backend: openai, url: "http://127.0.0.1:1/v1", model: m0, zone: us_cloud, context_window: 100000,
    cost: {usd_per_million_tokens: {input: 1, output: 2}}}
  cloud: {backend: openai, url: "URL", model: m1, zone: us_cloud, context_window: 100000,
    cost: {usd_per_million_tokens: {input: 1, output: 2}}}
"""
SECRET = "a sentence that nobody else may read"


def body(**changes: object) -> dict[str, object]:
    return {"model": "auto", "messages": [{"role": "user", "content": SECRET}], **changes}


def test_every_request_is_kept_once_with_what_it_cost_and_nothing_of_what_it_said(tmp_path: Path) -> None:
    path = tmp_path / "usage.jsonl"

    async def scenario() -> None:
        async with serving(FakeProviders()) as url:
            (tmp_path / "policy.yaml").write_text(POLICY)
            (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{url}/v1"))
            loaded = read_policy(str(tmp_path / "policy.yaml"), {})
            assert loaded.policy is not None, loaded.problems
            settings = Settings(drain_seconds=1.0, usage_file=str(path))
            async with running(loaded.policy, settings) as g:
                plain = await g.http.post("/v1/chat/completions", json=body())
                assert plain.status_code == 200
                async with g.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as stream:
                    assert "[DONE]" in (await stream.aread()).decode()
                assert (await g.http.post("/v1/chat/completions", json=body(model="none"))).status_code == 404
                assert (await g.http.post("/v1/chat/completions", content=b"{")).status_code == 400
                with suppress(httpx.HTTPError, TimeoutError):
                    async with g.http.stream("POST", "/v1/chat/completions", json=body(stream=True)) as left:
                        await anext(left.aiter_raw())
                await g.until(lambda: path.read_bytes().count(b"\n") == 5)

    asyncio.run(scenario())
    entries = list(read(files_of(path), pytest.fail))
    assert [e.outcome for e in entries[:4]] == ["ok", "ok", "model_not_found", "invalid_value"]
    assert [e.status for e in entries[:4]] == [200, 200, 404, 400]
    assert len({e.id for e in entries}) == 5
    first = entries[0]
    assert (first.deployment, first.model, first.zone) == ("cloud", "m1", "us_cloud")
    assert [t.deployment for t in first.attempts] == ["dead", "cloud"]
    assert [t.outcome for t in first.attempts] == ["failed", "ok"]
    assert first.cost_nusd == first.prompt_tokens * 1_000 + first.completion_tokens * 2_000 > 0
    assert SECRET.encode() not in path.read_bytes()
    assert path.stat().st_mode & 0o007 == 0
    summed = orjson.loads(CliRunner().invoke(main, ["usage", str(path), "--json"]).stdout)
    assert summed["all"]["requests"] == 5
    assert summed["all"]["tokens"] == sum(e.tokens for e in entries)


def test_two_gateways_keep_their_records_in_one_stream(tmp_path: Path) -> None:
    async def scenario(url: str) -> None:
        async with serving(FakeProviders()) as providers:
            (tmp_path / "policy.yaml").write_text(POLICY)
            (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{providers}/v1"))
            loaded = read_policy(str(tmp_path / "policy.yaml"), {})
            assert loaded.policy is not None, loaded.problems
            settings = Settings(drain_seconds=1.0, redis_url=url, usage_stream=True)
            async with running(loaded.policy, settings) as one, running(loaded.policy, settings) as two:
                for g in (one, two, one):
                    assert (await g.http.post("/v1/chat/completions", json=body())).status_code == 200

    with redis_server(tmp_path) as url:
        asyncio.run(scenario(url))
        result = CliRunner().invoke(main, ["usage", "--redis", "--json"], env={"HYBRIDGATE_REDIS_URL": url})
    assert orjson.loads(result.stdout)["all"]["requests"] == 3


def test_a_stream_needs_redis(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(POLICY)
    (tmp_path / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", "http://127.0.0.1:1/v1"))
    loaded = read_policy(str(tmp_path / "policy.yaml"), {})
    assert loaded.policy is not None
    with pytest.raises(SettingsError, match="HYBRIDGATE_USAGE_STREAM needs HYBRIDGATE_REDIS_URL"):
        build(Settings(usage_stream=True), loaded.policy, Log(), list[str]().append)
