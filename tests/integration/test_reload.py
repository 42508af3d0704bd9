"""A policy that changes under load: no request fails, each is decided by one policy and names it; what is removed is
closed when its last request has ended; what does not load changes nothing."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
from openai import AsyncStream
from openai.types.chat import ChatCompletionChunk

from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.loading import load_policy
from gateway.settings import Settings
from tests.running import Running, running_from
from tests.tiny_models import write_endless

BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def write(path: Path, text: str) -> None:
    """Replace the file as an editor does."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def deployments(*named: tuple[str, str]) -> str:
    entries = [
        f"  {name}: {{backend: openai, url: {url}/v1, model: m, zone: on_premises, context_window: 100000}}"
        for name, url in named
    ]
    return "\n".join(["version: 1", "deployments:", *entries, ""])


def policy(rule: str, candidates: str, file: str = "deployments.yaml") -> str:
    return f"""
version: 1
deployments: {file}
rules:
  - {{name: {rule}, when: {{tools: false}}, candidates: [{candidates}]}}
default: {{candidates: [{candidates}]}}
"""


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[tuple[Running, Path, FakeProviders, FakeProviders]]:
    """A gateway whose policy knows `a` and `b`, two fake providers."""
    one, two = FakeProviders(), FakeProviders()
    async with serving(one) as url_of_a, serving(two) as url_of_b:
        both = ("a", url_of_a), ("b", url_of_b)
        (folder / "deployments.yaml").write_text(deployments(*both))
        (folder / "a.yaml").write_text(deployments(both[0]))
        (folder / "b.yaml").write_text(deployments(both[1]))
        (folder / "policy.yaml").write_text(policy("first", "a, b"))
        async with running_from(folder / "policy.yaml") as (gateway, _):
            yield gateway, folder / "policy.yaml", one, two


@pytest.mark.parametrize(
    ("requests", "changes"), [(400, 6), pytest.param(10_000, 50, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_no_request_fails_while_the_policy_changes_and_each_names_the_one_that_decided(
    tmp_path: Path, requests: int, changes: int
) -> None:
    """Half of the changes are broken. The others name another rule, and take a deployment away or bring it back."""
    answers = Counter[tuple[str, str]]()
    asked = 0

    async def client(g: Running) -> None:
        nonlocal asked
        while asked < requests:
            asked += 1
            answer = await g.http.post("/v1/chat/completions", json={**BODY, "stream": asked % 4 == 0})
            assert answer.status_code == 200 and answer.content, answer.text
            if asked % 4 == 0 and answer.headers["content-type"].startswith("text/event-stream"):
                assert answer.text.endswith("data: [DONE]\n\n")
            answers[answer.headers["x-hybridgate-policy"], unquote(answer.headers["x-hybridgate-rule"])] += 1

    async def operator(g: Running, path: Path) -> dict[str, str]:
        """Change the file, each time once the last change was taken up. The rule of each hash."""
        state = g.gateway.policy_state
        rules = {state.hash: "first"}
        for number in range(changes):
            if number % 2:
                write(path, policy(f"change-{number}", "a, nowhere"))
                await g.until(lambda: bool(g.gateway.policy_state.problems))
            else:
                write(path, policy(f"change-{number}", *(("a", "a.yaml") if number % 4 else ("b", "b.yaml"))))
                changed = load_policy(path, {}).hash
                rules[changed] = f"change-{number}"
                await g.until(partial(in_use, g, changed))
            # The load is spread over all changes, whatever the machine.
            await g.until(partial(reached, requests * (number + 1) // (changes + 1)), 60)
        return rules

    def reached(number: int) -> bool:
        return asked >= number

    async def check() -> None:
        async with world(tmp_path) as (g, path, *_):
            clients = asyncio.gather(*(client(g) for _ in range(16)))
            rules = await operator(g, path)
            await clients
            booked = [line for line in g.log.lines if line["event"] == "request"]
        assert sum(answers.values()) >= requests
        assert dict(answers.keys()).items() <= rules.items(), "each rule is of the policy that the answer names"
        assert len(answers) == len(rules) == 1 + changes // 2, "every policy that loads has decided something"
        assert Counter((line["policy"], line["rule"]) for line in booked) == answers
        assert {line["outcome"] for line in booked} == {"ok"} and len({line["decision"] for line in booked}) >= requests
        assert [line["failed"] for line in booked if "failed" in line] == []
        assert {line["attempts"] for line in booked} == {1}

    asyncio.run(check())


def in_use(g: Running, policy_hash: str) -> bool:
    """Whether that policy serves, and its files say so."""
    state = g.gateway.policy_state
    return state.hash == policy_hash and not state.problems


def test_a_stream_ends_under_the_policy_that_began_it_though_its_deployment_is_gone(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as (g, path, one, two):
            one.behave(always=Behaviour(chunks=40, chunk_delay=0.02))
            stream = await asked(g)
            await anext(aiter(stream))
            old = stream.response.headers["x-hybridgate-policy"]
            write(path, policy("later", "b", "b.yaml"))
            await g.until(lambda: g.gateway.policy_state.hash != old)
            assert (await g.http.post("/v1/chat/completions", json=BODY)).headers["x-hybridgate-deployment"] == "b"
            assert "a" not in (await g.http.get("/readyz")).json()["deployments"]
            assert g.gateway.fleet.snapshot(0.0, 0.0).deployments["a"].in_flight == 1
            assert len([chunk async for chunk in stream]) >= 39
            await g.until(lambda: "a" not in g.gateway.fleet.snapshot(0.0, 0.0).deployments)
            assert (one.received, two.received) == (1, 1)
            assert next(line for line in g.log.lines if line.get("stream"))["policy"] == old

    asyncio.run(check())


async def asked(g: Running) -> AsyncStream[ChatCompletionChunk]:
    """A stream of many tokens, begun."""
    return await g.openai.chat.completions.create(
        model="auto", messages=[{"role": "user", "content": "x"}], stream=True, max_tokens=8000
    )


def test_what_does_not_load_is_shown_and_the_gateway_stays_ready(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as (g, path, *_):
            before = (await g.http.get("/readyz")).json()["policy"]
            assert (before["error_count"], before["errors"]) == (0, []) and before["loaded_at"]
            write(path, policy("x", "a, nowhere").replace("tools: false", "tols: false"))
            await g.until(lambda: g.gateway.policy_state.refusals == 1)
            answer = await g.http.get("/readyz")
            shown = answer.json()["policy"]
            assert answer.status_code == 200 and answer.json()["status"] == "ready"
            assert (shown["hash"], shown["loaded_at"], shown["error_count"]) == (before["hash"], before["loaded_at"], 3)
            assert f'{path}:5:22: rule "x": unknown field "when.tols" (did you mean "tools"?)' in shown["errors"]
            lines = [line for line in g.log.lines if line["event"] == "policy"]
            assert len(lines) == 3 and all(line["level"] == "error" and line["line"] > 0 for line in lines)
            assert (await g.http.post("/v1/chat/completions", json=BODY)).headers["x-hybridgate-rule"] == "first"

    asyncio.run(check())


def test_of_a_file_where_all_is_wrong_the_log_has_the_beginning(tmp_path: Path) -> None:
    """No request waits until thousands of lines are written."""

    async def check() -> None:
        async with world(tmp_path) as (g, path, *_):
            write(path, policy("x", "a") + "slo:\n" + "".join(f"  c{number}: 1s\n" for number in range(500)))
            await g.until(lambda: g.gateway.policy_state.refusals == 1)
            lines = [line for line in g.log.lines if line["event"] == "policy"]
            assert len(lines) == 101 and lines[-1]["message"] == "and 400 more things that are wrong"
            assert (await g.http.get("/readyz")).json()["policy"]["error_count"] == 500

    asyncio.run(check())


def test_a_deployment_that_is_unchanged_keeps_what_is_known_of_it_and_one_that_moved_does_not(tmp_path: Path) -> None:
    async def check() -> None:
        async with world(tmp_path) as (g, path, one, _):
            one.behave(always=Behaviour(status=500))
            for _ in range(3):
                await g.http.post("/v1/chat/completions", json=BODY)

            def state() -> str:
                return g.gateway.fleet.snapshot(g.gateway.path.clock(), 0.0).deployments["a"].circuit

            assert state() == "open"
            write(path, policy("second", "a, b"))
            await g.until(lambda: g.gateway.policy_state.loads == 2)
            assert state() == "open"
            one.behave(always=None)
            text = (tmp_path / "deployments.yaml").read_text()
            write(tmp_path / "deployments.yaml", text.replace("model: m", "model: n", 1))
            await g.until(lambda: g.gateway.policy_state.loads == 3)
            assert state() == "closed"
            assert (await g.http.post("/v1/chat/completions", json=BODY)).headers["x-hybridgate-deployment"] == "a"

    asyncio.run(check())


ENGINES = """
version: 1
deployments:
  local: {backend: local, model: MODEL, zone: on_premises}
"""


@pytest.mark.slow
def test_another_model_waits_for_the_requests_to_the_one_before_and_an_unchanged_engine_stays(tmp_path: Path) -> None:
    model = str(write_endless(tmp_path))
    path = tmp_path / "policy.yaml"
    (tmp_path / "deployments.yaml").write_text(ENGINES.replace("MODEL", model))
    path.write_text(policy("first", "local"))

    async def check() -> None:
        async with running_from(path, settings=Settings(drain_seconds=1.0)) as (g, _):
            await g.ready("local")
            pid = g.gateway.supervisors["local"].pid
            window = g.gateway.path.serving.policy.deployments["local"].window
            write(path, policy("second", "local"))
            await g.until(lambda: g.gateway.policy_state.loads == 2)
            assert g.gateway.supervisors["local"].pid == pid, "a rule is no reason to load a model anew"
            assert g.gateway.path.serving.policy.deployments["local"].window == window is not None
            assert (await g.http.get("/readyz")).json()["status"] == "ready"

            stream = await asked(g)
            await anext(aiter(stream))
            write(tmp_path / "deployments.yaml", ENGINES.replace("MODEL", "demo"))
            await g.until(lambda: g.gateway.policy_state.loads == 3)
            told = (await g.http.get("/readyz")).json()["deployments"]["local"]
            assert told["reason"] == "its engine waits until the requests to its former model have ended"
            assert g.gateway.supervisors["local"].pid is None
            assert (await anext(aiter(stream))).choices, "it goes on"
            await stream.close()
            await g.ready("local")
            answer = await g.http.post("/v1/chat/completions", json=BODY)
            assert answer.json()["model"] == "demo" and g.gateway.supervisors["local"].pid != pid

    asyncio.run(check())
