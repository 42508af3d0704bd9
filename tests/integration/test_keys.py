"""Callers with keys, over HTTP: who is let in, to what, and how the file's changes take effect."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from openai import AuthenticationError, PermissionDeniedError
from typer.testing import CliRunner

from gateway.access import Access
from gateway.admin import admin_app
from gateway.cli import main
from gateway.demo.providers import FakeProviders, serving
from gateway.reload import KeysReloader, Reloader
from tests.running import Running, running_with_keys

POLICY = """
version: 1
deployments: deployments.yaml
labels: {personal: {any: [{detects: [email]}]}}
invariants: [{name: stays home, when: {any_label: personal}, stay_in: on_premises}]
slo: {fast: {first_token_p95: 1s}, slow: {first_token_p95: 9s}}
rules:
  - {name: to the cloud, when: {tools: true}, candidates: cloud, protected: skip}
default: {candidates: [cloud, home]}
"""
DEPLOYMENTS = """
version: 1
deployments:
  home: {backend: openai, url: URL, model: m, zone: on_premises, context_window: 100000}
  cloud: {backend: openai, url: URL, model: m, zone: us_cloud, context_window: 100000}
models: {gpt-4o: cloud, any: auto}
"""
BODY: Mapping[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}


def key(file: Path, *arguments: str, given: str | None = None) -> str:
    """What `hybridgate key` prints."""
    result = CliRunner().invoke(main, ["key", arguments[0], *arguments[1:], "--file", str(file)], input=given)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


@dataclass
class World:
    """A gateway with keys in `file`, whose `secrets` are known by id."""

    g: Running
    access: Access
    secrets: dict[str, str]
    providers: FakeProviders
    file: Path
    reloader: Reloader
    keys_reloader: KeysReloader

    @asynccontextmanager
    async def admin(self, *, guarded: bool = False) -> AsyncIterator[httpx.AsyncClient]:
        app = admin_app(self.g.gateway, self.reloader, self.keys_reloader, guarded=guarded)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://admin") as admin:
            yield admin


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    (folder / "policy.yaml").write_text(POLICY)
    file = folder / "keys.yaml"
    secrets = {
        "crm": key(file, "new", "crm", "--tenant", "acme"),
        "private": key(file, "new", "private", "--label", "personal"),
        "home": key(file, "new", "home", "--deployment", "home", "--slo", "slow", "--expires", "1d"),
        "ops": key(file, "new", "ops", "--admin"),
    }
    providers = FakeProviders()
    async with serving(providers) as url:
        (folder / "deployments.yaml").write_text(DEPLOYMENTS.replace("URL", f"{url}/v1"))
        async with running_with_keys(folder / "policy.yaml", file) as (g, reloader, keys_reloader):
            assert g.gateway.access is not None
            yield World(g, g.gateway.access, secrets, providers, file, reloader, keys_reloader)


def bearer(secret: str, **others: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}", **others}


async def ask(g: Running, secret: str, headers: Mapping[str, str] | None = None, **body: Any) -> httpx.Response:
    return await g.http.post("/v1/chat/completions", json={**BODY, **body}, headers=bearer(secret, **(headers or {})))


def test_a_key_says_who_asks_and_none_of_it_is_repeated(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            answer = await ask(g, secrets["crm"])
            assert answer.status_code == 200
            plain = await g.http.post("/v1/chat/completions", json=BODY, headers={"x-api-key": secrets["crm"]})
            assert plain.status_code == 200
            for path in ("/v1/chat/completions", "/v1/route"):
                for headers in ({}, bearer("hg-unknown"), {"x-api-key": secrets["ops"]}):
                    refused = await g.http.post(path, json=BODY, headers=headers)
                    assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
                    error = refused.json()["error"]
                    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
            assert (await g.http.get("/v1/models")).status_code == 401
            assert (await g.http.get("/v1/models/auto")).status_code == 401
            with pytest.raises(AuthenticationError):
                await g.openai.chat.completions.create(model="auto", messages=[{"role": "user", "content": "hi"}])
            lines = [line for line in g.log.lines if line["event"] == "request"]
            assert [line.get("key") for line in lines[:2]] == ["crm", "crm"] and lines[0]["tenant"] == "acme"
            assert {line["outcome"] for line in lines[2:]} == {"invalid_api_key"} and len(lines) == 9
            seen = repr([g.log.lines, g.told, refused.headers, refused.text, w.providers.log])
            assert not any(secret in seen for secret in secrets.values()) and "hg-unknown" not in seen

    asyncio.run(check())


def test_whoever_has_no_key_is_turned_away_before_the_body_is_read(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            host, port = w.g.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999999999\r\n\r\n{")
            async with asyncio.timeout(2):
                assert (await reader.readline()).startswith(b"HTTP/1.1 401"), "and not 413, which comes after it"
            writer.close()

    asyncio.run(check())


def test_a_key_reaches_what_it_may_use_and_no_more(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            answer = await ask(g, secrets["home"])
            assert answer.headers["x-hybridgate-deployment"] == "home"
            for model in ("cloud", "gpt-4o", "to the cloud"):
                refused = await ask(g, secrets["home"], model=model)
                assert refused.status_code == 403 and refused.json()["error"]["code"] == "not_allowed"
            assert (await ask(g, secrets["home"], {"x-hybridgate-slo": "fast"})).status_code == 403
            assert (await ask(g, secrets["home"], {"x-hybridgate-slo": "slow"})).status_code == 200
            assert (await ask(g, secrets["crm"], {"x-hybridgate-slo": "fast"})).status_code == 200

            async def models(name: str) -> set[str]:
                listed = (await g.http.get("/v1/models", headers=bearer(secrets[name]))).json()["data"]
                return {model["id"] for model in listed}

            assert await models("crm") == {"auto", "gpt-4o", "any", "to the cloud", "home", "cloud"}
            assert await models("home") == {"auto", "any", "home"}
            for name, status in (("cloud", 404), ("home", 200), ("gpt-4o", 404), ("auto", 200)):
                one = await g.http.get(f"/v1/models/{name}", headers=bearer(secrets["home"]))
                assert one.status_code == status
            with pytest.raises(PermissionDeniedError):
                await g.openai.with_options(api_key=secrets["home"]).chat.completions.create(
                    model="cloud", messages=[{"role": "user", "content": "hi"}]
                )

    asyncio.run(check())


def test_what_a_key_labels_stays_home_whatever_the_request_says(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            assert (await ask(g, secrets["crm"])).headers["x-hybridgate-deployment"] == "cloud"
            answer = await ask(g, secrets["private"])
            assert answer.headers["x-hybridgate-deployment"] == "home"
            refused = await ask(g, secrets["private"], model="cloud")
            assert refused.status_code == 403 and refused.json()["error"]["code"] == "protected_refused"

    asyncio.run(check())


def test_a_revoked_key_is_turned_away_within_a_second_of_the_files_change(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            for name in ("crm", "private"):
                await asyncio.to_thread(key, w.file, "revoke", name)
                began = time.monotonic()
                while (answer := await ask(g, secrets[name])).status_code == 200:
                    assert time.monotonic() - began < 1.0
                    await asyncio.sleep(0.01)
                assert answer.status_code == 401 and "revoked" in answer.json()["error"]["message"]
            fresh = await asyncio.to_thread(key, w.file, "new", "fresh")
            await g.until(lambda: w.access.standings()["valid"] == 2, 2)
            assert (await ask(g, fresh)).status_code == 200

    asyncio.run(check())


def test_a_file_that_does_not_load_keeps_the_keys_before_it_and_is_shown(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            right = w.file.read_text()
            os.rename(w.file, w.file.with_suffix(".gone"))
            await g.until(lambda: bool(w.access.state.problems), 2)
            assert (await ask(g, secrets["crm"])).status_code == 200, "what is gone revokes nothing"
            w.file.write_text(right + "kyes: []\n")
            await g.until(lambda: "kyes" in str(w.access.state.problems), 2)
            assert (await ask(g, secrets["crm"])).status_code == 200
            for headers, told in ((bearer(secrets["ops"]), True), (bearer(secrets["crm"]), False), ({}, False)):
                ready = (await g.http.get("/readyz", headers=headers)).json()
                assert ready["status"] == "ready"
                assert ("unknown field" in str(ready.get("keys"))) is told and ("policy" in ready) is told
            async with w.admin() as admin:
                text = (await admin.get("/metrics")).text
                assert "hybridgate_keys_last_load_successful 0.0" in text
                assert 'hybridgate_keys{standing="valid"} 3.0' in text
                assert (await admin.post("/reload")).status_code == 422
                w.file.write_text(right)
                reloaded = await admin.post("/reload")
                assert reloaded.status_code == 200 and reloaded.json()["keys"]["error_count"] == 0
                assert "hybridgate_keys_last_load_successful 1.0" in (await admin.get("/metrics")).text

    asyncio.run(check())


def test_a_policy_without_what_keys_name_is_shown_and_what_brings_it_back_mends_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            g, secrets = w.g, w.secrets
            (tmp_path / "policy.yaml").write_text(POLICY.replace("slow:", "later:"))
            await g.until(lambda: "latency class" in str(w.access.state.problems), 3)
            assert (await ask(g, secrets["home"])).status_code == 200
            await asyncio.to_thread(key, w.file, "revoke", "crm")
            await g.until(lambda: w.access.standings()["revoked"] == 1, 3)
            assert (await ask(g, secrets["crm"])).status_code == 401, "a revocation counts all the same"
            assert (await ask(g, secrets["home"])).status_code == 200
            (tmp_path / "policy.yaml").write_text(POLICY)
            await g.until(lambda: not w.access.state.problems, 3)

    asyncio.run(check())


def test_the_admin_port_is_for_operators_where_others_reach_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as w:
            secrets = w.secrets
            async with w.admin(guarded=True) as admin:
                for path in ("/metrics", "/nothing"):
                    assert (await admin.get(path)).status_code == 401
                    assert (await admin.get(path, headers=bearer(secrets["crm"]))).status_code == 401
                assert (await admin.post("/reload")).status_code == 401
                assert (await admin.get("/metrics", headers=bearer(secrets["ops"]))).status_code == 200
                assert (await admin.get("/livez")).status_code == 200
                assert (await admin.get("/readyz")).json() == {"status": "ready"}
                assert "keys" in (await admin.get("/readyz", headers=bearer(secrets["ops"]))).json()

    asyncio.run(check())


def test_the_command_tells_which_key_a_secret_belongs_to_and_lists_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    secret = key(file, "new", "crm", "--tenant", "acme", "--tag", "hr", "--expires", "2999-01-31")
    assert secret.startswith("hg-") and len(secret) == 46 and secret not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert key(file, "check", given=f"{secret}\n") == "crm: valid, of tenant acme, expires 2999-01-31T00:00+00:00"
    (row,) = orjson.loads(key(file, "list", "--json"))
    assert row["id"] == "crm" and row["standing"] == "valid" and row["tags"] == ["hr"]
    assert "acme" in key(file, "list") and secret[:8] not in key(file, "list")
    key(file, "revoke", "crm")
    for given, told in ((secret, "crm: revoked"), ("hg-other", "no key of this file")):
        result = CliRunner().invoke(main, ["key", "check", "--file", str(file)], input=f"{given}\n")
        assert result.exit_code == 1 and told in result.stdout and given not in result.output
