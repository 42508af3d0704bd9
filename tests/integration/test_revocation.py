"""A key that is revoked at one place is turned away everywhere that shares the Redis, before any file says so."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from typer.testing import CliRunner

from gateway.cli import main
from gateway.keys import Keys
from gateway.loading import known_names, read_keys, read_policy
from gateway.policy import Policy
from gateway.settings import Settings
from tests.redis_server import redis_server
from tests.running import Running, running

POLICY = "version: 1\ndeployments: deployments.yaml\ndefault: {candidates: dead}\n"
DEPLOYMENTS = """
version: 1
deployments:
  dead: {backend: openai, url: "http://127.0.0.1:1/v1", model: m, zone: on_premises, context_window: 1000}
"""


def key(*arguments: str, redis: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(main, ["key", *arguments], env={"HYBRIDGATE_REDIS_URL": redis})
    return result.exit_code, result.output


def files(folder: Path) -> tuple[Policy, Path, Path, str, str]:
    """A policy, two machines' copies of one file of keys, and the secrets of the keys `crm` and `ops`."""
    (folder / "policy.yaml").write_text(POLICY)
    (folder / "deployments.yaml").write_text(DEPLOYMENTS)
    loaded = read_policy(str(folder / "policy.yaml"), {})
    assert loaded.policy is not None, loaded.problems
    here, there = folder / "here.yaml", folder / "there.yaml"
    made = (CliRunner().invoke(main, ["key", "new", name, "--file", str(here)]).stdout for name in ("crm", "ops"))
    crm, ops = (text.strip() for text in made)
    shutil.copy(here, there)
    return loaded.policy, here, there, crm, ops


def keys_of(path: Path, policy: Policy) -> Keys:
    read = read_keys(str(path), known_names(policy))
    assert read.keys is not None, read.problems
    return read.keys


async def status(g: Running, secret: str) -> int:
    return (await g.http.get("/v1/models", headers={"authorization": f"Bearer {secret}"})).status_code


def test_a_gateway_turns_a_key_away_that_its_own_file_still_has(tmp_path: Path) -> None:
    policy, here, there, crm, ops = files(tmp_path)

    async def scenario(url: str) -> None:
        settings = Settings(drain_seconds=1.0, keys=str(there), redis_url=url)
        async with running(policy, settings, keys_of(there, policy)) as g:
            assert [await status(g, crm), await status(g, ops)] == [200, 200]
            code, said = await asyncio.to_thread(key, "revoke", "crm", "--file", str(here), redis=url)
            assert code == 0 and "turn it away now" in said, said
            began = time.monotonic()
            while await status(g, crm) == 200:
                assert time.monotonic() < began + 10
                await asyncio.sleep(0.02)
            assert [await status(g, crm), await status(g, ops)] == [401, 200]
            assert g.gateway.access is not None
            g.gateway.access.adopt(keys_of(there, policy))  # the file is read again, and still has it
            assert [await status(g, crm), await status(g, ops)] == [401, 200]

    with redis_server(tmp_path) as url:
        asyncio.run(scenario(url))


def test_where_redis_is_not_there_the_file_is_changed_and_the_operator_told(tmp_path: Path) -> None:
    policy, here, _, _, _ = files(tmp_path)
    code, said = key("revoke", "crm", "--file", str(here), redis="redis://127.0.0.1:1")
    assert code == 2
    assert "the file is changed, but Redis was not told" in said
    assert [k.revoked for k in keys_of(here, policy).callers] == [True, False]
