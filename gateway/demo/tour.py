"""`hybridgate demo`: a real gateway with the bundled model, fake cloud providers, and requests that show the policy at
work.

Owns the script and its table. Refuses to decide anything: every line of the table is what the gateway answered over
HTTP. A request that does not end where the script says is marked, and makes the exit status 1.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import httpx
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from gateway.app import build
from gateway.demo.providers import Behaviour, FakeProviders, serving
from gateway.edge import Application
from gateway.embedded import embedded
from gateway.loading import load_policy
from gateway.running import Gateway
from gateway.server import config_of
from gateway.settings import Settings

POLICY = Path(__file__).parent / "policy" / "demo.yaml"
CARD = "4111 1111 1111 1111"  # the test number that card issuers publish
LONG = "Continuous batching lets new requests join a running batch. " * 200
ENGINE_PATIENCE = 120.0  # seconds for the bundled model to load

Change = Literal["claude fails", "engine stops"]


@dataclass(frozen=True, slots=True)
class Step:
    """One request of the tour. `ends_at`: the deployment that answers, or the status of a refusal. `after`: what
    happens first."""

    title: str
    prompt: str
    ends_at: str
    headers: Mapping[str, str] = field(default_factory=dict)
    after: Change | None = None


SCRIPT = (
    Step("a plain question", "What is TTFT?", "local"),
    Step("a card number", f"My card number is {CARD}, is it sent to the cloud?", "local"),
    Step("a long document", f"Summarise: {LONG}", "mistral-small"),
    Step("a long document with a card number", f"Summarise: {LONG} Paid with {CARD}.", "400"),
    Step("quality first", "What is TTFT?", "claude-sonnet", {"x-hybridgate-tags": "best"}),
    Step(
        "quality first, at most 0.001 USD",
        "What is TTFT?",
        "gpt-4o-mini",
        {"x-hybridgate-tags": "best", "x-hybridgate-max-cost-usd": "0.001"},
    ),
    Step(
        "quality first, while Claude fails",
        "What is TTFT?",
        "gpt-4o-mini",
        {"x-hybridgate-tags": "best"},
        "claude fails",
    ),
    Step("a plain question, engine stopped", "What is TTFT?", "mistral-small", after="engine stops"),
    Step("a card number, engine stopped", f"My card number is {CARD}.", "503"),
)


@dataclass(frozen=True, slots=True)
class Shown:
    """What became of a step. `as_told`: it ended where the script says."""

    step: Step
    rule: str
    deployment: str
    zone: str
    cost: str
    why: str
    as_told: bool


class Records:
    """The gateway's log, as one line a request once somebody plays with it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.live = False

    def info(self, event: str, **fields: object) -> None:
        if self.live and event == "request":
            told = (
                f"{key}={fields[key]}" for key in ("status", "rule", "deployment", "zone", "cost_usd") if key in fields
            )
            self._console.print(" ".join(told), markup=False)

    def error(self, event: str, **fields: object) -> None:
        """The tour changes no policy."""


async def tour(*, stay: bool, port: int, console: Console | None = None) -> int:
    """Run the script, print the table; with `stay`, keep serving until interrupted. The exit status: 0 where everything
    ended as the script says, 1 where not, 2 where the tour could not start."""
    console = console or Console(highlight=False)
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        console.print(
            f"error: cannot listen on 127.0.0.1:{port} ({error.strerror}): choose another with --port", markup=False
        )
        return 2
    providers = FakeProviders()
    with listener:
        async with serving(providers) as cloud:
            records = Records(console)
            environ = {**os.environ, **addresses(cloud)}
            policy = load_policy(POLICY, environ)
            app, gateway = build(Settings(drain_seconds=1.0), policy, records, lambda _: None)
            async with (
                served(app, listener) as url,
                httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as client,
            ):
                with console.status("starting the bundled model and litellm ..."):
                    problem = await ready(client)
                if problem:
                    console.print(f"error: the bundled model does not start: {problem}", markup=False)
                    return 1
                shown = [await played(step, client, gateway, providers) for step in SCRIPT]
                report(console, shown, providers)
                if stay:
                    await restored(gateway, providers)
                    await play(console, url, records)
    return 0 if all(one.as_told for one in shown) and not leaked(providers) else 1


def addresses(cloud: str) -> dict[str, str]:
    """The variables of deployments.yaml: every provider is the same local server."""
    return {
        "DEMO_KEY": "not-a-key",
        "DEMO_OPENAI": f"{cloud}/v1",
        "DEMO_ANTHROPIC": cloud,
        "DEMO_MISTRAL": f"{cloud}/mistral/v1",
    }


@asynccontextmanager
async def served(app: Application, listener: socket.socket) -> AsyncIterator[str]:
    """The gateway on its socket; yields its URL."""
    async with embedded(config_of(app, drain_seconds=1.0), listener):
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def ready(client: httpx.AsyncClient) -> str:
    """Wait for the bundled model. Returns why it does not come, or nothing."""
    reason = ""
    try:
        async with asyncio.timeout(ENGINE_PATIENCE):
            while True:
                local = (await client.get("/readyz")).json()["deployments"]["local"]
                if local["usable"]:
                    return ""
                reason = str(local["reason"])
                await asyncio.sleep(0.1)
    except TimeoutError:
        return f"{reason}; is the extra `engine` installed?"


async def played(step: Step, client: httpx.AsyncClient, gateway: Gateway, providers: FakeProviders) -> Shown:
    """Send one request, after what is to happen first."""
    if step.after == "claude fails":
        providers.behave(provider="anthropic", always=Behaviour(status=500))
    elif step.after == "engine stops":
        await gateway.supervisors["local"].stop()
    body = {"model": "auto", "max_tokens": 60, "messages": [{"role": "user", "content": step.prompt}]}
    route = (await client.post("/v1/route", json=body, headers=step.headers)).json()
    answer = await client.post("/v1/chat/completions", json=body, headers=step.headers)
    told = answer.headers
    deployment = told.get("x-hybridgate-deployment", str(answer.status_code))
    return Shown(
        step,
        unquote(told.get("x-hybridgate-rule", "-")),
        deployment,
        told.get("x-hybridgate-zone", "-"),
        told.get("x-hybridgate-cost-usd", "-"),
        why(route, answer),
        deployment == step.ends_at,
    )


def why(route: Mapping[str, Any], answer: httpx.Response) -> str:
    """The reason in words: of a refusal its message; else the rule's, with labels, failovers and what was ruled out."""
    if answer.is_error:
        return str(answer.json()["error"]["message"])
    parts = [str(route.get("because", ""))]
    if labels := route.get("labels"):
        parts.append(f"labels: {', '.join(labels)}")
    attempts = answer.headers.get("x-hybridgate-attempts", "1")
    if attempts != "1":
        parts.append(f"{attempts} attempts: the first deployment failed")
    parts += [f"not {one['deployment']}: {one['reason']}" for one in route.get("rejections", ())]
    return "; ".join(part for part in parts if part)


def leaked(providers: FakeProviders) -> int:
    """How many requests with the card number reached the fake cloud."""
    return sum(CARD in str(received.body) for received in providers.log)


def report(console: Console, shown: list[Shown], providers: FakeProviders) -> None:
    table = Table("request", "rule", "goes to", "zone", "cost, USD", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, one in enumerate(shown, 1):
        ended = one.deployment if one.as_told else f"{one.deployment} (expected {one.step.ends_at})"
        table.add_row(f"{number}. {one.step.title}", one.rule, ended, one.zone, one.cost)
    console.print(table)
    console.print("Why:")
    for number, one in enumerate(shown, 1):
        console.print(Padding(Text(f"{number}. {one.why}"), (0, 0, 0, 2)))
    console.print()
    console.print(
        f"The fake cloud received {providers.received} requests; {leaked(providers)} of them held the card number.",
        markup=False,
    )


async def restored(gateway: Gateway, providers: FakeProviders) -> None:
    """Everything works again, for whoever plays."""
    providers.script.clear()
    gateway.supervisors["local"].start()


async def play(console: Console, url: str, records: Records) -> None:
    """Serve until SIGINT or SIGTERM."""
    console.print(
        f"Now yours, with one line a request; Ctrl-C ends it:\n"
        f"  curl -i {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f'    -d \'{{"model": "auto", "messages": [{{"role": "user", "content": "What is TTFT?"}}]}}\'',
        markup=False,
        soft_wrap=True,
    )
    records.live = True
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    await interrupted.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(tour(stay=False, port=0)))
